"""Checkpoints: whole, safe, and bit-exact to resume from.

The long forms: KILLS=50 FUZZ=1000 pytest -s -k "killed_runs or fuzzed"
"""

import contextlib
import copy
import errno
import hashlib
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

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import damage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

import utils
from utils import BatchLoader, RandomAffine, load_checkpoint, save_checkpoint

EPOCHS = 4


class Run:
    """A training in small: 200 digits, a network with dropout and batch norm, a weight average."""

    def __init__(self, path, seed=0, width=8, epochs=EPOCHS):
        utils.set_seed(seed)
        self.drawn = []
        train_data, test_data = utils.load_data("digits")
        train_data, test_data = (
            torch.utils.data.Subset(data, range(200)) for data in (train_data, test_data)
        )
        augment = RandomAffine(10)
        self.path = path
        self.epochs = epochs
        self.loader = BatchLoader(train_data, 50, shuffle=True, augment=augment, seed=seed)
        self.test_loader = BatchLoader(test_data, 100)
        self.model = nn.Sequential(
            *(nn.Conv2d(1, width, 5, stride=3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten()),
            *(nn.Dropout(0.2), nn.Linear(64 * width, 10)),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.curves = [], [], [], []
        self.more = {
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, 0.01, total_steps=epochs * len(self.loader)
            ),
            "average": AveragedModel(self.model),
            "hyperparameters": {"EPOCHS": epochs, "SEED": seed},
        }

    def load(self):
        load_checkpoint(self.path, self.model, self.optimizer, *self.curves, **self.more)

    def save(self):
        save_checkpoint(self.path, self.model, self.optimizer, *self.curves, **self.more)

    def go(self, until=None):
        train_losses, train_acc, test_losses, test_acc = self.curves
        self.loader.epoch = len(train_losses)
        for _ in range(len(train_losses), until or self.epochs):
            utils.train(
                *(self.model, "cpu", self.loader, self.optimizer, F.cross_entropy),
                *(train_losses, train_acc),
                scheduler=self.more["scheduler"],
                progress=False,
            )
            self.more["average"].update_parameters(self.model)
            self.drawn = [random.random(), np.random.rand()]
            utils.test(
                *(self.model, "cpu", self.test_loader, F.cross_entropy, test_losses, test_acc),
                progress=False,
            )
            self.save()

    def state(self):
        parts = self.model, self.optimizer, self.more["scheduler"], self.more["average"]
        return copy.deepcopy(([part.state_dict() for part in parts], self.curves, self.drawn))


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
    """A run that went through, and the state in which it ended."""
    run = Run(tmp_path_factory.mktemp("finished") / "checkpoint.pt")
    run.go()
    return run


# --- saving and loading


def test_resumed_run_ends_bit_for_bit_like_one_that_ran_through(tmp_path, finished):
    first = Run(tmp_path / "checkpoint.pt")
    first.go(until=2)
    second = Run(tmp_path / "checkpoint.pt")
    torch.rand(3), random.random(), np.random.rand()  # whatever happens in between
    second.load()
    second.go()
    assert equal(second.state(), finished.state())
    assert len(second.curves[0]) == EPOCHS


def test_checkpoint_returns_what_was_saved(finished):
    checkpoint = load_checkpoint(finished.path)
    assert checkpoint["epoch"] == EPOCHS
    assert checkpoint["hyperparameters"] == {"EPOCHS": EPOCHS, "SEED": 0}
    for name, values in zip(utils.CURVES, finished.curves, strict=True):
        assert checkpoint[name] == values
    assert equal(checkpoint["model"], dict(finished.model.state_dict()))
    assert torch.load(finished.path, weights_only=True).keys() == checkpoint.keys()
    assert [path.name for path in finished.path.parent.iterdir()] == ["checkpoint.pt"]


def test_reading_changes_nothing_and_what_is_returned_stays(finished):
    utils.set_seed(5)
    state = torch.get_rng_state()
    load_checkpoint(finished.path)
    load_checkpoint(finished.path, finished.model)
    assert torch.equal(torch.get_rng_state(), state)

    run = Run(finished.path)
    checkpoint = load_checkpoint(run.path, run.model, run.optimizer, *run.curves, **run.more)
    before = copy.deepcopy(checkpoint)
    run.optimizer.zero_grad()
    run.model(torch.randn(4, 1, 28, 28)).sum().backward()
    run.optimizer.step()
    run.curves[0].append(0.0)
    assert equal(checkpoint, before)


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
    curves=st.lists(st.tuples(*[st.floats(allow_nan=False)] * 4), max_size=5),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=50, deadline=None)
def test_any_state_comes_back(tmp_path_factory, hyperparameters, curves, shape, dtype):
    path = tmp_path_factory.mktemp("any") / "checkpoint.pt"
    model = nn.Linear(*shape).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lists = [list(values) for values in zip(*curves, strict=True)] or [[], [], [], []]
    model(torch.ones(2, shape[0], dtype=dtype)).sum().backward()
    optimizer.step()
    save_checkpoint(path, model, optimizer, *lists, hyperparameters=hyperparameters)
    other = nn.Linear(*shape).to(dtype)
    empty = [], [], [], []
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    checkpoint = load_checkpoint(
        path, other, optimizer, *empty, hyperparameters=copy.deepcopy(hyperparameters)
    )
    assert equal(checkpoint["hyperparameters"], hyperparameters)
    assert equal(dict(other.state_dict()), dict(model.state_dict()))
    assert equal(optimizer.state_dict()["state"], checkpoint["optimizer"]["state"])
    assert len(checkpoint["optimizer"]["state"]) == 2
    assert equal(list(empty), lists)


def test_what_is_derived_from_numbers_and_strings_becomes_plain(tmp_path, linear):
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    curves = [[np.float64(1.5)]] * 4
    special = {"EPOCHS": np.int64(3), "torch": torch.__version__, "fast": np.bool_(True)}
    path = tmp_path / "new" / "folder" / "checkpoint.pt"
    save_checkpoint(path, linear, optimizer, *curves, hyperparameters=special)
    plain = {"EPOCHS": 3, "torch": str(torch.__version__), "fast": True}
    checkpoint = load_checkpoint(path, hyperparameters=special)
    assert equal(checkpoint["hyperparameters"], plain) and equal(checkpoint["train_acc"], [1.5])


def test_what_cannot_be_saved_is_named_and_the_old_checkpoint_stays(tmp_path, finished):
    run = Run(tmp_path / "checkpoint.pt")
    run.save()
    before = run.path.read_bytes()
    run.more["hyperparameters"]["augment"] = RandomAffine(10)
    with pytest.raises(TypeError, match="hyperparameters.augment is of type RandomAffine"):
        run.save()
    run.more["hyperparameters"]["augment"] = {1.5: 2}
    with pytest.raises(TypeError, match="keys of hyperparameters.augment must be strings"):
        run.save()
    del run.more["hyperparameters"]["augment"]
    run.curves[0].append(0.5)
    with pytest.raises(ValueError, match=r"one length.*\[1, 0, 0, 0\]"):
        run.save()
    assert run.path.read_bytes() == before


# --- what does not fit


def change_optimizer(run):
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)


def change_groups(run):
    one, two, *more = run.model.parameters()
    run.optimizer = torch.optim.AdamW([{"params": [one, two]}, {"params": more}])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda run: run.more["hyperparameters"].update(EPOCHS=9), "EPOCHS is 4 there and 9 here"),
        (lambda run: run.more["hyperparameters"].update(DEPTH=2), "DEPTH is absent there and 2"),
        (lambda run: run.more["hyperparameters"].pop("SEED"), "SEED is 0 there and absent here"),
        (lambda run: run.more["hyperparameters"].update(x=None), "x is absent there and None"),
        (lambda run: run.model.pop(1), "model.1.weight is .* there and absent here"),
        (lambda run: run.model.append(nn.Linear(10, 3)), "model.6.weight is absent there"),
        (
            lambda run: run.model.double(),
            r"model.0.bias is \(8,\) torch.float32 there and \(8,\) t",
        ),
        (lambda run: run.more.pop("scheduler"), "scheduler is OneCycleLR there and absent here"),
        (lambda run: run.more["scheduler"].__dict__.update(total_steps=9), "total_steps is 16"),
        (lambda run: run.more.pop("average"), "average.n_averaged"),
        (change_optimizer, "optimizer is AdamW there and SGD here"),
        (change_groups, r"number of parameters is \[6\] there and \[2, 4\] here"),
    ],
)
def test_another_run_is_refused_and_nothing_half_loaded(finished, change, message):
    run = Run(finished.path)
    change(run)
    parts = [run.model, run.optimizer, run.more.get("scheduler"), run.more.get("average")]
    parts = [part for part in parts if part]
    before = copy.deepcopy([part.state_dict() for part in parts])
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message) as error:
        run.load()
    assert str(finished.path) in str(error.value)
    assert equal([part.state_dict() for part in parts], before)
    assert run.curves == ([], [], [], [])
    assert torch.equal(torch.get_rng_state(), random_state)


def test_other_shapes_are_named(finished):
    with pytest.raises(ValueError, match=r"model.0.weight is \(8, 1, 5, 5\) .* there and \(6, 1"):
        load_checkpoint(finished.path, Run(finished.path, width=6).model)


def test_a_model_that_reads_its_version_comes_back(tmp_path):
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            assert local_metadata["version"] == 2
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    model, other = Versioned(3, 2), Versioned(3, 2)
    save_checkpoint(tmp_path / "it.pt", model, None, [], [], [], [])
    load_checkpoint(tmp_path / "it.pt", other)
    assert torch.equal(model.weight, other.weight)


def test_what_fails_while_it_is_restored_is_taken_back(tmp_path, linear):
    def make(parts):
        model = copy.deepcopy(linear)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(parts)]
        milestones = list(range(1, parts))
        return (
            *(model, optimizer),
            torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones),
        )

    model, optimizer, scheduler = make(3)
    nn.init.zeros_(model[1].weight)
    save_checkpoint(tmp_path / "it.pt", model, optimizer, [], [], [], [], scheduler=scheduler)
    model, optimizer, scheduler = make(2)
    with pytest.raises(ValueError, match="it.pt' does not fit the scheduler given"):
        load_checkpoint(tmp_path / "it.pt", model, optimizer, scheduler=scheduler)
    assert torch.equal(model[1].weight, linear[1].weight)


# --- files that are not what they should be


def test_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        load_checkpoint(tmp_path / "missing.pt")


@pytest.mark.parametrize("kind", ["empty", "text", "weights", "half"])
def test_files_of_another_kind_are_refused(tmp_path, finished, kind):
    path = tmp_path / "checkpoint.pt"
    content = finished.path.read_bytes()
    path.write_bytes({"text": b"epoch 3", "half": content[: len(content) // 2]}.get(kind, b""))
    if kind == "weights":
        torch.save(finished.model.state_dict(), path)
    with pytest.raises(ValueError, match="checkpoint.pt' is damaged, or not a checkpoint"):
        load_checkpoint(path)


def test_fuzzed_checkpoint_is_refused(tmp_path, finished):
    """Bytes flipped, cut out or put in: each time it is our error."""
    content = finished.path.read_bytes()
    path, generator = tmp_path / "checkpoint.pt", random.Random(0)
    for _ in range(int(os.environ.get("FUZZ", 100))):
        path.write_bytes(damage(content, generator))
        with pytest.raises(ValueError, match="is damaged"):
            load_checkpoint(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("here, there", [("cpu", "cuda"), ("cuda", "cpu")])
def test_other_device(tmp_path, samples, here, there):
    def make(device):
        model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)).to(device)
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    def step(device, model, optimizer):
        loader = torch.utils.data.DataLoader(samples, 250)
        utils.train(model, device, loader, optimizer, F.cross_entropy, progress=False)

    model, optimizer = make(here)
    step(here, model, optimizer)
    save_checkpoint(tmp_path / "checkpoint.pt", model, optimizer, [], [], [], [])
    other, other_optimizer = make(there)
    load_checkpoint(tmp_path / "checkpoint.pt", other, other_optimizer)
    step(here, model, optimizer)
    step(there, other, other_optimizer)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), two.cpu(), atol=1e-5, rtol=1e-4)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save, load", [(pickle.dump, pickle.load), (torch.save, torch.load)])
def test_code_in_a_checkpoint_does_not_run(tmp_path, save, load):
    path, mark, buffer = tmp_path / "checkpoint.pt", tmp_path / "executed", io.BytesIO()
    save(dict.fromkeys(utils.CHECKPOINT_KEYS, Evil(mark)), buffer)
    path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    with pytest.raises(ValueError, match="checkpoint.pt' was not read"):
        load_checkpoint(path)
    assert not mark.exists()
    buffer.seek(0)
    load(buffer, **({"weights_only": False} if load is torch.load else {}))
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
    run.save()
    before = run.path.read_bytes()
    assert len(before) > 10_000
    with small_files(), pytest.raises(OSError, match="could not write.*checkpoint.pt") as error:
        run.save()
    assert error.value.errno == errno.EFBIG
    assert run.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_folder_that_cannot_be_made_is_named(tmp_path, linear):
    (tmp_path / "file").write_text("")
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    with pytest.raises(OSError, match="could not write the checkpoint.*file/checkpoint.pt"):
        save_checkpoint(tmp_path / "file" / "checkpoint.pt", linear, optimizer, [], [], [], [])


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
    run = Run(path)
    if path.exists():
        run.load()
    run.go()


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
        run.load()
        assert equal(run.state()[:2], finished.state()[:2])
        if kills.total() >= wanted:
            break
    print(f"{kills.total()} kills in {number - 1} runs: {dict(kills)}")  # two were left alone
    assert wanted < 50 or set(kills) == {*SAVING, "any"}, kills
