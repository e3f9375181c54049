import io
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
from conftest import CONTEXT, damage, start
from torch.utils._pytree import tree_leaves

import utils
from utils import BatchLoader, RandomAffine, load_checkpoint, save_checkpoint

EPOCHS = 4
PADDING = 5_000_000  # numbers: saving 20 MB takes most of a killed run's time


class Run:
    """A training in small: 200 digits, a network with dropout and batch norm."""

    def __init__(self, path, padding=0):
        utils.set_seed(0)
        data = torch.utils.data.Subset(utils.load_data("digits")[0], range(200))
        self.path, augment = path, RandomAffine(10)
        self.loader = BatchLoader(data, 50, shuffle=True, augment=augment)
        layers = [nn.Conv2d(1, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
        self.model = nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(512, 10))
        self.model.register_buffer("padding", torch.zeros(padding))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        steps = EPOCHS * len(self.loader)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.01, steps)
        self.losses = []
        self.hyperparameters = {"EPOCHS": EPOCHS, "SEED": 0, "augment": str(augment)}
        names = "model", "optimizer", "scheduler", "losses"
        self.state = {name: getattr(self, name) for name in names}

    def content(self):
        """Return all numbers of the state."""
        parts = self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()
        leaves = tree_leaves((parts, self.losses))
        return [x.tolist() if isinstance(x, torch.Tensor) else x for x in leaves]

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


def train_until_killed(path, ready):
    run = Run(path, PADDING)
    ready.send(True)
    run.go()


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    """Kill runs again and again at random moments, most of them while saving."""
    expected, begin = Run(tmp_path / "expected.pt", PADDING), time.perf_counter()
    expected.go()
    duration = time.perf_counter() - begin
    generator, kills, leftovers, runs = random.Random(0), 0, set(), 0
    wanted = int(os.environ.get("KILLS", 3))
    while kills < wanted:
        runs += 1
        path, exitcode = tmp_path / f"{runs}.pt", None
        while exitcode != 0:
            here, there = CONTEXT.Pipe()
            process = start(train_until_killed, path, there)
            assert here.poll(60)  # it is ready to be killed
            process.join(generator.uniform(0, duration) if kills < wanted else None)
            process.kill()
            process.join()
            exitcode = process.exitcode
            assert exitcode in (0, -signal.SIGKILL)
            kills += exitcode != 0
            leftovers.update(tmp_path.glob("*.new"))
        assert not any(tmp_path.glob("*.new"))  # what a killed process leaves, the next one deletes
        run = Run(path, PADDING)
        assert run.load() == EPOCHS and run.content() == expected.content()
    print(f"{kills} kills in {runs} runs, {len(leftovers)} of them while a file was being written")
    assert wanted < 50 or leftovers


def test_a_save_whose_file_another_process_deletes_is_repeated(tmp_path, monkeypatch):
    def delete(_):
        next(tmp_path.glob("*.new")).unlink()
        monkeypatch.undo()

    monkeypatch.setattr(os, "fsync", delete)
    save_checkpoint(tmp_path / "checkpoint.pt", 7, {})
    assert load_checkpoint(tmp_path / "checkpoint.pt", {}) == 7


def save_often(path, count):
    losses = [float(os.getpid())] * random.randrange(1, 20_000)  # files of different sizes
    for _ in range(count):
        save_checkpoint(path, 1, {}, losses=losses)


@pytest.mark.slow
def test_of_four_processes_that_save_to_one_path_none_fails_and_every_read_is_whole(tmp_path):
    path, losses, reads = tmp_path / "checkpoint.pt", [], 0
    save_checkpoint(path, 1, {}, losses=[])
    count = int(os.environ.get("SAVES", 80))
    processes = [start(save_often, path, count // 4) for _ in range(4)]
    while any(process.is_alive() for process in processes):
        load_checkpoint(path, {}, losses=losses)
        reads += len(set(losses)) == 1
    print(f"{count} saves and {reads} reads, none failed")
    assert reads > 0 and [process.exitcode for process in processes] == [0] * 4
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_numpys_numbers_become_pythons_and_what_could_not_be_loaded_is_not_saved(tmp_path):
    run = Run(tmp_path / "checkpoint.pt")
    run.hyperparameters["LEARNING_RATE"] = run.optimizer.param_groups[0]["lr"] = np.float64(0.5)
    run.losses.append(np.float32(0.25))
    run.save(1)
    assert run.load() == 1 and run.losses == [0.25] and type(run.losses[0]) is float
    assert type(run.optimizer.param_groups[0]["lr"]) is float
    saved = torch.load(run.path, weights_only=True)["model"]
    assert saved._metadata == run.model.state_dict()._metadata  # the versions of its modules
    run.losses.append(Evil())
    with pytest.raises(pickle.UnpicklingError, match="Evil|mkdir"):
        run.save(2)
    assert run.load() == 1


def test_a_link_stays_its_file_is_replaced_and_a_full_disk_leaves_the_old_one(tmp_path):
    (tmp_path / "drive").mkdir()
    run = Run(tmp_path / "checkpoint.pt")
    run.path.symlink_to("drive/it.pt")
    run.save(0)
    run.save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a checkpoint is larger
    try:
        with pytest.raises(OSError):
            run.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.path.is_symlink() and Run(tmp_path / "drive" / "it.pt").load() == 1
    assert os.listdir(tmp_path / "drive") == ["it.pt"]


def test_another_run_is_refused_by_name_and_nothing_is_restored(tmp_path):
    finished, run = Run(tmp_path / "it.pt"), Run(tmp_path / "it.pt")
    finished.go()
    run.hyperparameters = {"EPOCHS": 9, "augment": str(RandomAffine(10)), "DEPTH": 3}
    before = run.content()
    with pytest.raises(ValueError) as error:
        run.load()
    changes = "has {'EPOCHS': 4, 'SEED': 0}, not {'EPOCHS': 9, 'DEPTH': 3}: restore them, or set"
    assert f"'{finished.path}'" in str(error.value) and changes in str(error.value)
    assert run.content() == before


def test_damaged_checkpoints_are_refused_or_the_same(tmp_path):
    finished, run = Run(tmp_path / "it.pt"), Run(tmp_path / "it.pt")
    finished.go()
    content, weights = finished.path.read_bytes(), io.BytesIO()
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
    content = {"epoch": 1, "hyperparameters": {}, "losses": Evil()}
    torch.save(content, "checkpoint.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match="checkpoint.pt' is damaged or not a checkpoint"):
        load_checkpoint("checkpoint.pt", {}, losses=[])
    assert not os.path.exists("evil")
    torch.load("checkpoint.pt", weights_only=False)
    assert os.path.exists("evil")  # it would have been
