"""Checkpoints: whole, safe, and bit-exact to resume from.

The long forms: KILLS=50 FUZZ=1000 pytest -n 0 -s -k "killed_runs or fuzzed"
"""

import contextlib
import copy
import errno
import io
import itertools
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

    def __init__(self, path, seed=0, width=8, epochs=EPOCHS, optimizer=torch.optim.AdamW):
        utils.set_seed(seed)
        train_data, test_data = utils.load_data("digits")
        train_data = torch.utils.data.Subset(train_data, range(200))
        augment = RandomAffine(10)
        self.path = path
        self.epochs = epochs
        self.loader = BatchLoader(train_data, 50, shuffle=True, augment=augment, seed=seed)
        self.test_loader = BatchLoader(test_data, 100)
        self.model = nn.Sequential(
            nn.Conv2d(1, width, 5, stride=3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64 * width, 10),
        )
        self.optimizer = optimizer(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.01, total_steps=epochs * len(self.loader)
        )
        self.hyperparameters = {"EPOCHS": epochs, "SEED": seed, "sizes": (width, [0.5])}
        self.losses, self.accuracies = [], []

    def state(self):
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "losses": self.losses,
            "accuracies": self.accuracies,
        }

    def parts(self):
        """The content of the state, copied."""
        parts = self.model, self.optimizer, self.scheduler
        states = [part.state_dict() for part in parts]
        return copy.deepcopy([*states, self.losses, self.accuracies])

    def resume(self):
        return resume(self.path, self.hyperparameters, **self.state())

    def save(self, epoch):
        save_checkpoint(self.path, epoch, self.hyperparameters, **self.state())

    def go(self, until=None, stop=lambda epoch: None):
        for epoch in range(self.resume(), (until or self.epochs) + 1):
            self.loader.epoch = epoch - 1
            utils.train(
                self.model,
                "cpu",
                self.loader,
                self.optimizer,
                F.cross_entropy,
                self.losses,
                scheduler=self.scheduler,
                progress=False,
            )
            stop(epoch)
            tested = utils.test(
                self.model, "cpu", self.test_loader, F.cross_entropy, progress=False
            )
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
    run = Run(tmp_path_factory.mktemp("finished") / "checkpoint.pt")
    run.go()
    return run


# --- saving and resuming


def test_a_resumed_run_ends_bit_for_bit_like_one_that_ran_through(tmp_path, finished, capsys):
    path = tmp_path / "new" / "folder" / "checkpoint.pt"
    Run(path).go(until=2)
    second = Run(path)
    torch.rand(3)  # whatever happens in between
    second.go()
    assert equal(second.parts(), finished.parts()) and len(second.losses) == EPOCHS
    printed = capsys.readouterr().out
    assert printed == (
        f"There is no {path} yet: training starts with epoch 1\n"
        f"Going on after epoch 2, from {path}\n"
    )


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_stopped_run_goes_on_in_the_same_process(tmp_path, finished, epoch):
    def stop(now):
        if now == epoch:
            raise KeyboardInterrupt

    run = Run(tmp_path / "checkpoint.pt")
    with pytest.raises(KeyboardInterrupt):
        run.go(stop=stop)
    assert len(run.losses) == epoch  # of which the last has no accuracy
    run.go()
    assert equal(run.parts(), finished.parts())


def test_a_checkpoint_can_be_read_by_itself(finished):
    checkpoint = load_checkpoint(finished.path)
    assert checkpoint["epoch"] == EPOCHS
    assert checkpoint["hyperparameters"] == {"EPOCHS": 4, "SEED": 0, "sizes": (8, [0.5])}
    assert equal(checkpoint["losses"], finished.losses)
    assert equal(checkpoint["model"], finished.model.state_dict())
    assert torch.load(finished.path, weights_only=True).keys() == checkpoint.keys()
    assert [path.name for path in finished.path.parent.iterdir()] == ["checkpoint.pt"]


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    hyperparameters=st.dictionaries(st.text(max_size=5), PLAIN, max_size=4),
    losses=st.lists(st.floats(allow_nan=False), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=30, deadline=None)
def test_any_state_comes_back(tmp_path_factory, hyperparameters, losses, dtype):
    path = tmp_path_factory.mktemp("any") / "checkpoint.pt"
    model, other = (nn.Linear(3, 2).to(dtype) for _ in range(2))
    optimizer, other_optimizer = (
        torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, other)
    )
    model(torch.ones(2, 3, dtype=dtype)).sum().backward()
    optimizer.step()
    save_checkpoint(path, 7, hyperparameters, model=model, optimizer=optimizer, losses=losses)
    back = []
    same = copy.deepcopy(hyperparameters)
    assert resume(path, same, model=other, optimizer=other_optimizer, losses=back) == 8
    assert equal(load_checkpoint(path)["hyperparameters"], hyperparameters)
    assert equal(other.state_dict(), model.state_dict())
    assert equal(other_optimizer.state_dict(), optimizer.state_dict())
    assert equal(back, losses)


def test_what_cannot_be_read_back_is_refused_and_the_old_checkpoint_stays(tmp_path):
    run = Run(tmp_path / "checkpoint.pt")
    run.resume()
    before = run.path.read_bytes()
    run.hyperparameters["augment"] = RandomAffine(10)
    with pytest.raises(ValueError, match="checkpoint.pt.new' cannot be read") as error:
        run.save(1)
    assert "RandomAffine" in str(error.value.__cause__)
    assert run.path.read_bytes() == before


def test_a_backup_is_made_of_what_was_trained(tmp_path):
    path, backup = tmp_path / "it.pt", tmp_path / "it.pt.bak"
    utils.back_up_checkpoint(path)  # nothing is there
    for epoch in (3, 0):
        save_checkpoint(path, epoch, {}, losses=[])
        utils.back_up_checkpoint(path)
        assert not path.exists() and load_checkpoint(backup)["epoch"] == 3
    path.write_bytes(b"damaged")
    utils.back_up_checkpoint(path)
    assert not path.exists() and backup.read_bytes() == b"damaged"


# --- what does not fit


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 9}, "EPOCHS was 4 and is now 9"),
        ({"seed": 1}, "SEED was 0 and is now 1"),
        ({"width": 6}, r"sizes was \(8, \[0.5\]\) and is now \(6, "),
        ({"optimizer": torch.optim.SGD}, "optimizer was AdamW and is now SGD"),
    ],
)
def test_another_run_is_refused_and_nothing_is_restored(finished, options, message):
    run = Run(finished.path, **options)
    before, random_state = run.parts(), torch.get_rng_state()
    with pytest.raises(ValueError, match=message) as error:
        run.resume()
    assert str(finished.path) in str(error.value) and "RESUME = False" in str(error.value)
    assert equal(run.parts(), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_part_more_or_less_is_named(finished):
    run = Run(finished.path)
    run.hyperparameters["DEPTH"] = None
    state = run.state()
    del state["scheduler"]
    with pytest.raises(ValueError) as error:
        resume(run.path, run.hyperparameters, **state)
    for part in ("DEPTH was absent and is now None", "scheduler was OneCycleLR and is now absent"):
        assert part in str(error.value)


def test_a_new_run_starts_from_the_weights_as_the_message_says(finished):
    run = Run(finished.path, epochs=9)
    with pytest.raises(ValueError) as error:
        run.resume()
    command = str(error.value).split("weights: ")[1].replace(".bak", "")
    exec(command, {"model": run.model, "load_checkpoint": load_checkpoint})
    assert equal(run.model.state_dict(), finished.model.state_dict())


# --- files that are not what they should be


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        load_checkpoint(tmp_path / "missing.pt")


@pytest.mark.parametrize("kind", ["empty", "text", "weights", "list", "half"])
def test_files_of_another_kind_are_refused(tmp_path, finished, kind):
    path = tmp_path / "checkpoint.pt"
    content = finished.path.read_bytes()
    path.write_bytes({"text": b"epoch 3", "half": content[: len(content) // 2]}.get(kind, b""))
    if kind in ("weights", "list"):
        torch.save(finished.model.state_dict() if kind == "weights" else [1, 2], path)
    with pytest.raises(ValueError, match="checkpoint.pt' cannot be read: it is damaged"):
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
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save, load", [(pickle.dump, pickle.load), (torch.save, torch.load)])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_does_not_run(tmp_path, finished, save, load):
    path, mark = tmp_path / "checkpoint.pt", tmp_path / "executed"
    with path.open("wb") as file:
        save({**load_checkpoint(finished.path), "model": Evil(mark)}, file)
    with pytest.raises(ValueError, match="checkpoint.pt' "):
        load_checkpoint(path)
    assert not mark.exists()
    with path.open("rb") as file:
        load(file, **({"weights_only": False} if load is torch.load else {}))
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


def test_folder_that_cannot_be_made_is_named(tmp_path, linear):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write the checkpoint.*file/checkpoint.pt"):
        save_checkpoint(tmp_path / "file" / "checkpoint.pt", 0, {}, model=linear)


SAVING = ("while writing", "before fsync", "before replace", "after replace")


def train_and_die(path, moment, count):
    """Go on with the run of `path`, and be killed at a moment of the `count`-th saving."""
    calls = 0

    def die():
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

    class Half(io.FileIO):
        def write(self, content):
            half = len(content) // 2
            super().write(content[:half])
            die()
            return super().write(content[half:])

    replace, fsync = os.replace, os.fsync
    if moment == "while writing":
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
    whole = 0.0  # seconds that a run takes which is not killed

    def start(path, moment, patience=None):
        """Train until done or killed, after `patience` seconds at the latest."""
        process = context.Process(
            target=train_and_die, args=(path, moment, generator.randint(1, EPOCHS))
        )
        process.start()
        process.join(patience)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode == 0

    for number in itertools.count():
        begin = time.perf_counter()
        path = tmp_path / f"{number}.pt"
        while True:
            moment = generator.choice((*SAVING, "any"))
            if number < 2 or kills.total() >= wanted:
                moment = "never"
            patience = generator.uniform(0, whole) if moment == "any" else None
            if start(path, moment, patience):
                break
            kills[moment] += 1
            if path.exists():
                load_checkpoint(path)  # never half a file
        if number < 2:  # the first also waits for the server
            whole = time.perf_counter() - begin
        run = Run(path)
        run.resume()
        assert equal(run.parts(), finished.parts())
        if kills.total() >= wanted:
            break
    print(f"{kills.total()} kills in {number - 1} runs: {dict(kills)}")  # two were left alone
    assert wanted < 50 or set(kills) == {*SAVING, "any"}, kills
