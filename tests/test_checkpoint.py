"""Checkpoints: whole, safe, and bit-exact to resume from.

The long forms: KILLS=50 FUZZ=1000 pytest -n 0 -s -k "killed_runs or fuzzed"
"""

import contextlib
import copy
import errno
import functools
import io
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import damage
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from utils import BatchLoader, RandomAffine, load_checkpoint, resume, save_checkpoint

EPOCHS = 4


class Run:
    """A training in small: 200 digits, a network with dropout and batch norm."""

    def __init__(self, path):
        utils.set_seed(0)
        train_data, test_data = utils.load_data("digits")
        train_data = torch.utils.data.Subset(train_data, range(200))
        self.path = path
        self.loader = BatchLoader(train_data, 50, shuffle=True, augment=RandomAffine(10))
        self.test_loader = BatchLoader(test_data, 100)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(512, 10),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.01, total_steps=EPOCHS * len(self.loader)
        )
        self.losses, self.accuracies = [], []
        self.hyperparameters = {"EPOCHS": EPOCHS, "SEED": 0, "sizes": (8, [0.5])}
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "losses": self.losses,
            "accuracies": self.accuracies,
        }

    def content(self):
        """Return a copy of what the state holds."""
        parts = self.model, self.optimizer, self.scheduler
        return copy.deepcopy([[part.state_dict() for part in parts], self.losses, self.accuracies])

    def resume(self):
        return resume(self.path, self.hyperparameters, **self.state)

    def save(self, epoch):
        save_checkpoint(self.path, epoch, self.hyperparameters, **self.state)

    def go(self, stop=None):
        """Train, to be stopped in epoch `stop`."""
        model, scheduler = self.model, self.scheduler
        options = {"criterion": F.cross_entropy, "progress": False}
        for epoch in range(self.resume(), EPOCHS + 1):
            self.loader.epoch = epoch - 1
            trained = utils.train(
                model, "cpu", self.loader, self.optimizer, scheduler=scheduler, **options
            )
            self.losses.append(trained.loss)
            if epoch == stop:
                raise KeyboardInterrupt
            tested = utils.test(model, "cpu", self.test_loader, **options)
            self.accuracies.append(tested.accuracy)
            self.save(epoch)


def equal(one, other):
    """Compare nested states bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went through."""
    start = time.perf_counter()
    run = Run(tmp_path_factory.mktemp("finished") / "checkpoint.pt")
    run.go()
    run.seconds = time.perf_counter() - start
    return run


# --- saving and resuming


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("process", ["the same", "another"])
def test_a_stopped_run_ends_like_one_that_ran_through(tmp_path, finished, capsys, process, epoch):
    path = tmp_path / "new" / "folder" / "checkpoint.pt"
    run = Run(path)
    with pytest.raises(KeyboardInterrupt):
        run.go(stop=epoch)
    assert len(run.losses) == epoch  # of which the last has no accuracy
    if process == "another":
        run = Run(path)
        torch.rand(3)  # whatever happens in between
    run.go()
    assert equal(run.content(), finished.content()) and len(run.losses) == EPOCHS
    lines = [f"There is no {path} yet: training starts with epoch 1"]
    if epoch == 3:
        lines.append(f"Restored epoch 2 from {path}")
    assert capsys.readouterr().out.splitlines() == lines


def test_a_checkpoint_can_be_read_by_itself(finished):
    checkpoint = load_checkpoint(finished.path)
    assert checkpoint["epoch"] == EPOCHS
    assert checkpoint["hyperparameters"] == {"EPOCHS": 4, "SEED": 0, "sizes": (8, [0.5])}
    assert equal(checkpoint["losses"], finished.losses)
    assert equal(checkpoint["model"], finished.model.state_dict())
    assert [path.name for path in finished.path.parent.iterdir()] == ["checkpoint.pt"]


SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)
TEXT = st.text(max_size=5)
PLAIN = st.recursive(
    SCALARS | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=8
)


@given(hyperparameters=st.dictionaries(TEXT, PLAIN), losses=st.lists(st.floats(allow_nan=False)))
@settings(max_examples=30, deadline=None)
def test_any_hyperparameters_and_lists_come_back(tmp_path_factory, hyperparameters, losses):
    path = tmp_path_factory.mktemp("any") / "checkpoint.pt"
    save_checkpoint(path, 7, hyperparameters, losses=losses)
    assert equal(load_checkpoint(path)["hyperparameters"], hyperparameters)
    restored = []
    assert resume(path, copy.deepcopy(hyperparameters), losses=restored) == 8
    assert equal(restored, losses)


def test_what_cannot_be_read_back_is_refused_and_the_old_checkpoint_stays(tmp_path):
    run = Run(tmp_path / "checkpoint.pt")
    run.resume()
    before = run.path.read_bytes()
    run.hyperparameters["augment"] = RandomAffine(10)
    with pytest.raises(ValueError, match="checkpoint.pt' was not saved") as error:
        run.save(1)
    assert "RandomAffine" in str(error.value.__cause__)
    assert run.path.read_bytes() == before


def test_a_backup_is_only_replaced_by_what_was_trained(tmp_path):
    path, backup = tmp_path / "it.pt", tmp_path / "it.pt.bak"
    utils.back_up_checkpoint(path)  # nothing is there
    for epoch in (3, 0):
        save_checkpoint(path, epoch, {}, losses=[])
        utils.back_up_checkpoint(path)
        assert not path.exists() and load_checkpoint(backup)["epoch"] == 3
    path.write_bytes(b"damaged")
    utils.back_up_checkpoint(path)
    assert not path.exists() and load_checkpoint(backup)["epoch"] == 3
    assert (tmp_path / "it.pt.damaged").read_bytes() == b"damaged"


# --- what does not fit


def test_another_run_is_refused_by_name_and_nothing_is_restored(finished):
    run = Run(finished.path)
    run.hyperparameters = {"EPOCHS": 9, "sizes": (6, [0.5]), "DEPTH": None}
    run.state["optimizer"] = torch.optim.SGD(run.model.parameters())
    del run.state["scheduler"]
    before, random_state = run.content(), torch.get_rng_state()
    with pytest.raises(ValueError) as error:
        run.resume()
    for part in (
        "EPOCHS was 4 and is now 9",
        "SEED was 0 and is now absent",
        "sizes was (8, [0.5]) and is now (6, [0.5])",
        "DEPTH was absent and is now None",
        "optimizer was AdamW and is now SGD",
        "scheduler was OneCycleLR and is now absent",
        f"'{finished.path}'",
        "RESUME = False",
    ):
        assert part in str(error.value)
    assert equal(run.content(), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_new_run_starts_from_the_weights_as_the_message_says(finished):
    run = Run(finished.path)
    run.hyperparameters["EPOCHS"] = 9
    with pytest.raises(ValueError, match="parameters: EPOCHS was 4 and is now 9. Set") as error:
        run.resume()
    command = str(error.value).split("weights: ")[1].replace(".bak", "")
    exec(command, {"model": run.model, "load_checkpoint": load_checkpoint})
    assert equal(run.model.state_dict(), finished.model.state_dict())


# --- files that are not what they should be


def test_files_of_another_kind_are_refused(tmp_path, finished):
    path, weights = tmp_path / "checkpoint.pt", io.BytesIO()
    torch.save(finished.model.state_dict(), weights)
    for content in (b"", b"epoch 3", weights.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.pt' is damaged, or not a checkpoint"):
            load_checkpoint(path)


def test_fuzzed_checkpoint_is_refused_or_the_same(tmp_path, finished):
    """Bytes flipped, cut out or put in: each time it is our error, or nothing was lost."""
    content, whole = finished.path.read_bytes(), load_checkpoint(finished.path)
    path, generator, outcomes = tmp_path / "checkpoint.pt", random.Random(0), Counter()
    for _ in range(int(os.environ.get("FUZZ", 100))):
        path.write_bytes(damage(content, generator))
        try:
            assert equal(load_checkpoint(path), whole)
            outcomes["the same"] += 1
        except ValueError as error:
            assert f"'{path}'" in str(error)
            outcomes["refused"] += 1
    print(f"damaged checkpoints: {dict(outcomes)}")
    assert outcomes["refused"] > 0.9 * outcomes.total()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("here, there", [("cpu", "cuda"), ("cuda", "cpu")])
def test_other_device(tmp_path, samples, here, there):
    def make(device):
        model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)).to(device)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), fused=True)}

    def step(device, model, optimizer):
        loader = torch.utils.data.DataLoader(samples, 250)
        utils.train(model, device, loader, optimizer, F.cross_entropy, progress=False)

    one, other = make(here), make(there)
    step(here, **one)
    save_checkpoint(tmp_path / "checkpoint.pt", 1, {}, **one)
    resume(tmp_path / "checkpoint.pt", {}, **other)
    step(here, **one)
    step(there, **other)
    for ours, theirs in zip(one["model"].parameters(), other["model"].parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), atol=1e-5, rtol=1e-4)


class Evil:
    """When unpickled, creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


UNSAFE_LOAD = functools.partial(torch.load, weights_only=False)


@pytest.mark.parametrize("save, load", [(pickle.dump, pickle.load), (torch.save, UNSAFE_LOAD)])
def test_code_in_a_checkpoint_does_not_run(tmp_path, finished, save, load):
    path, mark = tmp_path / "checkpoint.pt", tmp_path / "executed"
    with path.open("wb") as file:
        save({**load_checkpoint(finished.path), "model": Evil(mark)}, file)
    with pytest.raises(ValueError, match="checkpoint.pt' "):
        load_checkpoint(path)
    assert not mark.exists()
    with path.open("rb") as file:
        load(file)
    assert mark.exists()  # it would have


# --- dying


@contextlib.contextmanager
def small_files():
    """Let no file grow beyond 10,000 bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    run = Run(tmp_path / "checkpoint.pt")
    run.resume()
    before = run.path.read_bytes()
    assert len(before) > 10_000
    with small_files(), pytest.raises(OSError, match="could not write.*checkpoint.pt") as error:
        run.save(1)
    assert error.value.errno == errno.EFBIG
    assert run.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


MOMENTS = ("any time", "while writing", "before fsync", "before replace", "after replace")


def train_and_die(path, moment, saving, seconds):
    """Go on with the run of `path`, and be killed in the given saving or after some seconds."""
    savings = 0

    def die():
        nonlocal savings
        savings += 1
        if savings == saving:
            os.kill(os.getpid(), signal.SIGKILL)

    class Half(io.FileIO):
        def write(self, content):
            half = len(content) // 2
            super().write(content[:half])
            die()
            return super().write(content[half:])

    replace, fsync = os.replace, os.fsync
    if moment == "any time":
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, which ends the process at once
    elif moment == "while writing":
        utils.open = Half
    elif moment == "before fsync":
        utils.os.fsync = lambda file: (die(), fsync(file))
    elif moment == "before replace":
        utils.os.replace = lambda *names: (die(), replace(*names))
    elif moment == "after replace":
        utils.os.replace = lambda *names: (replace(*names), die())
    Run(path).go()


def test_killed_runs_resume_bit_for_bit(tmp_path, finished):
    """Kill a run again and again, at random moments and within saving, until it gets through."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torchvision", "matplotlib.pyplot", "sklearn.datasets"]
    )
    generator, kills, wanted = random.Random(0), Counter(), int(os.environ.get("KILLS", 6))
    runs, duration = 0, finished.seconds
    while kills.total() < wanted:
        runs += 1
        path = tmp_path / f"{runs}.pt"
        exitcode = None
        while exitcode != 0:
            moment = generator.choice(MOMENTS) if kills.total() < wanted else "never"
            saving, seconds = generator.randint(1, EPOCHS), generator.uniform(0, duration)
            start = time.perf_counter()
            process = context.Process(target=train_and_die, args=(path, moment, saving, seconds))
            process.start()
            process.join()
            exitcode = process.exitcode
            if exitcode == 0:
                duration = min(duration, time.perf_counter() - start)
            assert exitcode in (0, -signal.SIGKILL, -signal.SIGALRM)
            kills[moment] += exitcode != 0
            if path.exists():
                load_checkpoint(path)  # never half a file
        run = Run(path)
        run.resume()
        assert equal(run.content(), finished.content())
    print(f"{kills.total()} kills in {runs} runs: {dict(kills)}")
    assert wanted < 50 or all(kills[moment] > 0 for moment in MOMENTS), kills
