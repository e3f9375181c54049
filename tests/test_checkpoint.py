"""The README gives the long form of the tests of killed runs and damaged checkpoints."""

import io
import multiprocessing
import os
import pickle
import random
import resource
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
        train_data = torch.utils.data.Subset(utils.load_data("digits")[0], range(200))
        self.path = path
        self.loader = BatchLoader(train_data, 50, shuffle=True, augment=RandomAffine(10))
        layers = [nn.Conv2d(1, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
        self.model = nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(512, 10))
        self.model.register_buffer("padding", torch.zeros(padding))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        steps = EPOCHS * len(self.loader)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.01, steps)
        self.losses = []
        self.hyperparameters = {"EPOCHS": EPOCHS, "SEED": 0, "augment": str(RandomAffine(10))}
        self.state = {"model": self.model, "optimizer": self.optimizer, "losses": self.losses}
        self.state["scheduler"] = self.scheduler

    def content(self):
        """Return all tensors of the state as one, the scheduler's state and the losses."""
        tensors = list(self.model.state_dict().values())
        for state in self.optimizer.state_dict()["state"].values():
            tensors += state.values()
        tensor = torch.cat([tensor.flatten().double() for tensor in tensors])
        return tensor.tolist(), self.scheduler.state_dict(), list(self.losses)

    def load(self):
        return load_checkpoint(self.path, self.hyperparameters, **self.state)

    def save(self, epoch):
        save_checkpoint(self.path, epoch, self.hyperparameters, **self.state)

    def go(self):
        if not self.path.exists():
            self.save(0)
        parts = self.model, "cpu", self.loader, self.optimizer, F.cross_entropy
        for epoch in range(self.load() + 1, EPOCHS + 1):
            utils.set_seed(0, epoch)
            self.losses += utils.train(*parts, scheduler=self.scheduler, verbose=False)
            self.save(epoch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went through."""
    run = Run(tmp_path_factory.mktemp("finished") / "checkpoint.pt")
    run.go()
    return run


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("here, there", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_moves_to_another_device(tmp_path, samples, here, there):
    loader, runs = [samples[:]], []
    for device in (here, there):
        model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        if device == here:
            utils.train(model, here, loader, optimizer, F.cross_entropy)
            save_checkpoint(tmp_path / "it.pt", 1, {}, model=model, optimizer=optimizer)
        else:
            load_checkpoint(tmp_path / "it.pt", {}, model=model, optimizer=optimizer)
        utils.train(model, device, loader, optimizer, F.cross_entropy)
        runs.append(model[1].weight.detach().cpu())
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-4)


PADDING = 5_000_000  # numbers: saving 20 MB takes most of a run's time


def train_until_killed(path):
    run = Run(path, PADDING)
    run.path.with_suffix(".ready").touch()
    run.go()


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    """Kill runs again and again at random moments, most of them while saving."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["utils", "sklearn.datasets"])
    expected = Run(tmp_path / "expected.pt", PADDING)
    start = time.perf_counter()
    expected.go()
    duration = time.perf_counter() - start
    generator, kills, while_saving, runs = random.Random(0), 0, 0, 0
    wanted = int(os.environ.get("KILLS", 3))
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
        run = Run(path, PADDING)
        assert run.load() == EPOCHS and run.content() == expected.content()
    print(f"{kills} kills in {runs} runs, {while_saving} of them while a file was being written")
    assert wanted < 50 or while_saving > 0


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    run = Run(tmp_path / "checkpoint.pt")
    run.save(0)
    run.losses.append(np.float32(0.5))
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        run.save(1)
    assert run.load() == 0


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    run = Run(tmp_path / "checkpoint.pt")
    run.save(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a checkpoint is larger
    try:
        with pytest.raises(OSError):
            run.save(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert run.load() == 0 and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_another_run_is_refused_by_name_and_nothing_is_restored(finished):
    run = Run(finished.path)
    run.hyperparameters = {"EPOCHS": 9, "augment": str(RandomAffine(10)), "DEPTH": 3}
    before = run.content()
    with pytest.raises(ValueError) as error:
        run.load()
    changes = "(then, now): {'EPOCHS': (4, 9), 'SEED': (0, None), 'DEPTH': (None, 3)}"
    assert f"'{finished.path}'" in str(error.value) and changes in str(error.value)
    assert run.content() == before


def test_damaged_checkpoints_are_refused_or_the_same(tmp_path, finished):
    """Bytes flipped, cut out or put in: each time it is our error, or nothing was lost."""
    content, run, weights = finished.path.read_bytes(), Run(tmp_path / "it.pt"), io.BytesIO()
    torch.save(finished.model.state_dict(), weights)
    generator, refused, count = random.Random(0), 0, int(os.environ.get("FUZZ", 100))
    others = [b"", b"epoch 3", weights.getvalue()]
    for damaged in others + [damage(content, generator) for _ in range(count - 3)]:
        run.path.write_bytes(damaged)
        try:
            assert run.load() == EPOCHS and run.content() == finished.content()
        except ValueError as error:
            assert f"'{run.path}' is damaged or not a checkpoint" in str(error)
            refused += 1
    print(f"{refused} of {count} damaged checkpoints refused, the others are complete")
    assert refused > 0.9 * count


class Evil:
    def __reduce__(self):  # when unpickled, a folder is made
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_hostile_file_is_refused_and_its_code_is_not_run(tmp_path, monkeypatch, is_zip):
    monkeypatch.chdir(tmp_path)
    path, mark = tmp_path / "checkpoint.pt", tmp_path / "evil"
    content = {"epoch": 1, "hyperparameters": {}, "losses": Evil()}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match="checkpoint.pt' is damaged or not a checkpoint"):
        load_checkpoint(path, {}, losses=[])
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have
