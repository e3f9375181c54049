"""Checkpoints: whole, safe, and bit-exact to resume from.

The long forms: KILLS=50 FUZZ=1000 pytest -n 0 -s -k "killed or damaged"
"""

import copy
import io
import multiprocessing
import os
import pickle
import random
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import damage

import utils
from utils import BatchLoader, RandomAffine, load_checkpoint, save_checkpoint

EPOCHS = 4


class Run:
    """A training in small: 200 digits, a network with dropout and batch norm."""

    def __init__(self, path, padding=0):
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
        self.model.register_buffer("padding", torch.zeros(padding))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.01, total_steps=EPOCHS * len(self.loader)
        )
        self.losses, self.accuracies = [], []
        self.hyperparameters = {"EPOCHS": EPOCHS, "SEED": 0, "augment": str(RandomAffine(10))}
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

    def load(self):
        return load_checkpoint(self.path, self.hyperparameters, **self.state)

    def save(self, epoch):
        save_checkpoint(self.path, epoch, self.hyperparameters, **self.state)

    def go(self, stop=None):
        """Train, to be stopped in epoch `stop`."""
        if not self.path.exists():
            self.save(0)
        for epoch in range(self.load() + 1, EPOCHS + 1):
            utils.set_seed(epoch)
            self.loader.epoch = epoch - 1
            options = {"criterion": F.cross_entropy, "verbose": False}
            parts = self.model, "cpu", self.loader, self.optimizer
            loss, _ = utils.train(*parts, scheduler=self.scheduler, **options)
            self.losses.append(loss)
            if epoch == stop:
                raise KeyboardInterrupt
            self.accuracies += utils.test(self.model, "cpu", self.test_loader, **options)
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


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("process", ["the same", "another"])
def test_a_stopped_run_ends_like_one_that_ran_through(tmp_path, finished, process, epoch):
    run = Run(tmp_path / "checkpoint.pt")
    with pytest.raises(KeyboardInterrupt):
        run.go(stop=epoch)
    assert len(run.losses) == epoch  # of which the last has no accuracy
    if process == "another":
        run = Run(run.path)
        torch.rand(3)  # whatever happens in between
    run.go()
    assert equal(run.content(), finished.content()) and len(run.losses) == EPOCHS
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("here, there", [("cpu", "cuda"), ("cuda", "cpu")])
def test_other_device(tmp_path, samples, here, there):
    def make(device):
        model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)).to(device)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), fused=True)}

    def step(device, model, optimizer):
        loader = torch.utils.data.DataLoader(samples, 250)
        utils.train(model, device, loader, optimizer, F.cross_entropy)

    one, other = make(here), make(there)
    step(here, **one)
    save_checkpoint(tmp_path / "checkpoint.pt", 1, {}, **one)
    load_checkpoint(tmp_path / "checkpoint.pt", {}, **other)
    step(here, **one)
    step(there, **other)
    for ours, theirs in zip(one["model"].parameters(), other["model"].parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), atol=1e-5, rtol=1e-4)


def train_until_killed(path):
    run = Run(path, padding=5_000_000)  # saving 20 MB takes most of the time
    run.path.with_suffix(".ready").touch()
    run.go()


def test_killed_runs_go_on_bit_for_bit(tmp_path):
    """Kill runs again and again at random moments, most of them while saving."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["utils", "sklearn.datasets"])
    expected = Run(tmp_path / "expected.pt", padding=5_000_000)
    start = time.perf_counter()
    expected.go()
    duration = time.perf_counter() - start
    generator, kills, while_saving, runs = random.Random(0), 0, 0, 0
    wanted = int(os.environ.get("KILLS", 6))
    while kills < wanted:
        runs += 1
        path, exitcode = tmp_path / f"{runs}.pt", None
        while exitcode != 0:
            process = context.Process(target=train_until_killed, args=(path,))
            process.start()
            while process.is_alive() and not path.with_suffix(".ready").exists():
                time.sleep(0.01)
            path.with_suffix(".ready").unlink()
            process.join(generator.uniform(0, duration) if kills < wanted else None)
            process.kill()
            process.join()
            exitcode = process.exitcode
            assert exitcode in (0, -signal.SIGKILL)
            kills += exitcode != 0
            while_saving += exitcode != 0 and path.with_suffix(".pt.new").exists()
        run = Run(path, padding=5_000_000)
        assert run.load() == EPOCHS
        assert equal(run.content(), expected.content())
    print(f"{kills} kills in {runs} runs, {while_saving} of them while a file was being written")
    assert wanted < 50 or while_saving > 0


# --- what does not fit


def test_what_could_not_be_loaded_is_not_saved(tmp_path, finished):
    run = Run(tmp_path / "checkpoint.pt")
    run.save(0)
    run.losses.append(np.float32(0.5))
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        run.save(1)
    run.losses.clear()
    assert run.load() == 0


def test_another_run_is_refused_by_name_and_nothing_is_restored(finished):
    run = Run(finished.path)
    run.hyperparameters = {"EPOCHS": 9, "augment": str(RandomAffine(10)), "DEPTH": 3}
    before = run.content()
    with pytest.raises(ValueError) as error:
        run.load()
    changes = "(then, now): {'EPOCHS': (4, 9), 'SEED': (0, None), 'DEPTH': (None, 3)}"
    assert f"'{finished.path}'" in str(error.value) and changes in str(error.value)
    assert equal(run.content(), before)


def test_files_of_another_kind_are_refused(tmp_path, finished):
    path, weights = tmp_path / "checkpoint.pt", io.BytesIO()
    torch.save(finished.model.state_dict(), weights)
    for content in (b"", b"epoch 3", weights.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.pt' is damaged or not a checkpoint"):
            load_checkpoint(path, {})
    with pytest.raises(FileNotFoundError, match="no.pt"):
        load_checkpoint(tmp_path / "no.pt", {})


def test_damaged_checkpoints_are_refused_or_the_same(tmp_path, finished):
    """Bytes flipped, cut out or put in: each time it is our error, or nothing was lost."""
    content, run = finished.path.read_bytes(), Run(tmp_path / "checkpoint.pt")
    generator, refused, count = random.Random(0), 0, int(os.environ.get("FUZZ", 100))
    for _ in range(count):
        run.path.write_bytes(damage(content, generator))
        try:
            assert run.load() == EPOCHS
            assert equal(run.content(), finished.content())
        except ValueError as error:
            assert f"'{run.path}' is damaged or not a checkpoint" in str(error)
            refused += 1
    print(f"{refused} of {count} damaged checkpoints refused, the others are complete")
    assert refused > 0.9 * count


class Evil:
    """When unpickled, creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", ["zip", "legacy", "pickle"])
def test_a_hostile_file_is_refused_and_its_code_is_not_run(tmp_path, protocol):
    path, mark = tmp_path / "checkpoint.pt", tmp_path / "mark"
    content = {"epoch": 1, "hyperparameters": {}, "losses": Evil(mark)}
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(ValueError, match="checkpoint.pt' is damaged or not a checkpoint"):
        load_checkpoint(path, {}, losses=[])
    assert not mark.exists()
    pickle.loads(pickle.dumps(content))
    assert mark.exists()  # it would have
