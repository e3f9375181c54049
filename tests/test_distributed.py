"""Two processes on the CPU against one. Under torchrun, this file is the two processes' script."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import scaling  # noqa: E402
from test_data import write_dataset  # noqa: E402

import utils  # noqa: E402
from model import Net  # noqa: E402
from utils import BatchLoader, RandomAffine, init_distributed, load_checkpoint  # noqa: E402

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CASES = {  # training images, batch size, criterion
    "even": (100, 50, F.nll_loss),
    "uneven": (97, 64, F.nll_loss),
    "a sum": (97, 64, nn.NLLLoss(reduction="sum")),
    "an empty share": (65, 64, F.nll_loss),
    "an empty share of a sum": (65, 64, nn.NLLLoss(reduction="sum")),
}


class FrozenStatistics(Net):
    """Net with its batch norm in evaluation mode, so that outputs do not depend on the batch."""

    def train(self, mode=True):
        return super().train(False)


def shared_loader(count, batch_size, rank, world_size, shuffle=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    data = SimpleNamespace(data=images, targets=torch.arange(count) % 10)
    return BatchLoader(data, batch_size, shuffle=shuffle, rank=rank, world_size=world_size)


def run(model, lr, case, rank=0, world_size=1):
    """Train and test; return the metrics, the last gradients, the weights and the statistics."""
    count, batch_size, criterion = CASES[case]
    loader = shared_loader(count, batch_size, rank, world_size)
    test_loader = shared_loader(count, 40, rank, world_size, shuffle=False)
    parallel = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    metrics = [
        utils.train(parallel, "cpu", loader, optimizer, criterion, progress=False),
        utils.test(parallel, "cpu", test_loader, criterion, progress=False),
    ]
    return {
        "metrics": [tuple(each) for each in metrics],
        "gradients": torch.cat([weight.grad.flatten() for weight in model.parameters()]),
        "weights": torch.cat([weight.detach().flatten() for weight in model.parameters()]),
        "statistics": torch.cat([buffer.double().flatten() for buffer in model.buffers()]),
    }


def seeded(kind, seed=0):
    torch.manual_seed(seed)
    return kind()


def worker(folder):
    _, rank, world_size = init_distributed()
    print("rank", rank)  # of which only 0 is to be seen
    share = rank, world_size
    results = {case: run(seeded(FrozenStatistics, rank), 0.0, case, *share) for case in CASES}
    results["statistics"] = run(seeded(Net, rank), 0.0, "uneven", *share)
    results["training"] = run(seeded(Net, rank), 0.05, "uneven", *share)
    os.environ["DATA_DIR"] = f"{folder}/{rank}"  # MNIST lies in one of the two
    utils.DIGESTS.clear()  # and is made up
    results["dataset"] = utils.load_data("auto")[0].name
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(sys.argv[1])
    sys.exit()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of rank 0 and of rank 1."""
    folder = tmp_path_factory.mktemp("ranks")
    write_dataset(folder / "1", "MNIST")
    offline = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}
    command = [*TORCHRUN, __file__, str(folder)]
    run = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "2 processes, each on the CPU\nrank 0\n"
    assert "Grad strides" not in run.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_metrics_are_those_of_one_process(ranks, case):
    expected = run(seeded(FrozenStatistics), 0.0, case)
    for rank in ranks:
        off = rank[case]["gradients"] - expected["gradients"]
        assert off.norm() < 1e-5 * expected["gradients"].norm()
        for (loss, accuracy), (whole_loss, whole_accuracy) in zip(
            rank[case]["metrics"], expected["metrics"], strict=True
        ):
            assert loss == pytest.approx(whole_loss, rel=1e-6) and accuracy == whole_accuracy
    assert ranks[0][case]["metrics"] == ranks[1][case]["metrics"]


def test_all_get_the_dataset_that_rank_0_got(ranks):
    assert [rank["dataset"] for rank in ranks] == ["digits", "digits"]


def test_rank_0s_statistics_count(ranks):
    count, batch_size, _ = CASES["uneven"]
    model, part = seeded(Net), list(shared_loader(count, batch_size, 0, 2))
    utils.train(model, "cpu", part, torch.optim.SGD(model.parameters(), lr=0.0), F.nll_loss)
    expected = torch.cat([buffer.double().flatten() for buffer in model.buffers()])
    for rank in ranks:
        torch.testing.assert_close(rank["statistics"]["statistics"], expected)


def test_processes_end_with_the_same_weights(ranks):
    first, second = (rank["training"] for rank in ranks)
    for key in ("weights", "statistics"):
        assert torch.equal(first[key], second[key])
    whole = run(seeded(Net), 0.05, "uneven")
    off = first["weights"] - whole["weights"]  # batch norm sees half of each batch
    assert 0 < off.norm() < 0.05 * whole["weights"].norm()


# --- in one process


def test_one_process_initialises_nothing(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert init_distributed() == (utils.get_device(), 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc-per-node=1
    assert init_distributed() == (utils.get_device(), 0, 1)
    assert not dist.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="got 1 here for process 1.*nproc-per-node"):
        init_distributed()


@pytest.mark.parametrize("count, batch_size, world_size", [(60, 20, 4), (61, 20, 3), (10, 4, 4)])
def test_shares_make_up_each_batch(count, batch_size, world_size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    data = SimpleNamespace(data=images, targets=torch.arange(count))

    def loader(**share):
        return BatchLoader(
            data, batch_size, shuffle=True, augment=RandomAffine(20), seed=3, **share
        )

    loaders = [loader(rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = []
    for (images, labels), *shares in zip(loader(), *loaders, strict=True):
        sizes = [len(part) for _, part in shares]
        assert max(sizes) - min(sizes) <= 1
        for rank, (share_images, share_labels) in enumerate(shares):
            assert torch.equal(share_labels, labels[rank::world_size])
            torch.testing.assert_close(share_images, images[rank::world_size])
            seen += share_labels.tolist()
    assert sorted(seen) == list(range(count))  # none twice, none lost
    assert {len(each) for each in loaders} == {len(loader())}
    assert {each.epoch for each in loaders} == {1}


@pytest.mark.parametrize("rank, world_size", [(2, 2), (-1, 2), (0, 0), (0, 65)])
def test_ranks_out_of_range(rank, world_size):
    data = SimpleNamespace(data=torch.zeros(9, 28, 28).byte(), targets=torch.arange(9))
    with pytest.raises(ValueError, match=f"rank {rank} of {world_size} and batches of 64"):
        BatchLoader(data, 64, rank=rank, world_size=world_size)


def test_a_share_without_the_other_processes_is_refused():
    loader, model = shared_loader(9, 4, 1, 2), Net()
    with pytest.raises(ValueError, match="share of process 1 of 2"):
        utils.predict(model, "cpu", loader)
    with pytest.raises(ValueError, match="one of 2 processes.*got 1.*DistributedDataParallel"):
        utils.train(model, "cpu", loader, torch.optim.SGD(model.parameters()), F.nll_loss)


# --- the exported notebook


EPOCH = re.compile(r"^Epoch (\d+)/(\d+)  train loss .* test loss .* accuracy ([\d.]+) %", re.M)


def export(**parameters):
    """Export the notebook with other parameters as S5.py, as the README says."""
    values = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
    Path("runs").mkdir()
    for command in (
        ["papermill", "--prepare-only", "S5.ipynb", "runs/S5.ipynb", *values],
        ["nbconvert", "--to", "script", "runs/S5.ipynb", "--output-dir", "."],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)


@contextmanager
def job():
    """Run S5.py under torchrun; end its processes whatever happens."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open("stderr.txt", "w") as stderr:
        process = subprocess.Popen(
            [*TORCHRUN, "S5.py"], env=env, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)  # on which torchrun ends them
            process.communicate(timeout=60)


def finish():
    """Run the job to its end; return what it printed."""
    with job() as process:
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 0, Path("stderr.txt").read_text()
    return printed


def test_a_killed_process_ends_the_job_which_goes_on_when_run_again(folder):
    export(DATASET="digits", EPOCHS=16, RESUME=True)
    done = 0
    for rank in ("1", "0"):
        with job() as process:
            for line in process.stdout:
                if line.startswith(f"Epoch {done + 2}/16"):
                    break
            workers = psutil.Process(process.pid).children()
            (worker,) = [each for each in workers if each.environ().get("RANK") == rank]
            worker.kill()
            assert process.wait(timeout=60) != 0
        before = load_checkpoint("runs/checkpoint.pt")
        assert done + 2 <= before["epoch"] < 16  # what is printed is saved
        done = before["epoch"]

    printed = finish()
    assert printed.startswith("2 processes, each on the CPU\n")
    assert printed.count(f"Going on after epoch {done} of 16\n") == 1
    assert [int(epoch) for epoch, *_ in EPOCH.findall(printed)] == list(range(done + 1, 17))
    after = load_checkpoint("runs/checkpoint.pt")
    for curve in utils.CURVES:
        assert len(after[curve]) == 16 and after[curve][:done] == before[curve]
    (final,) = re.findall(r"^Final test accuracy: ([\d.]+) %", printed, re.MULTILINE)
    assert float(final) > 90


def test_trains_on_a_slice_of_mnist(folder, mnist_root, monkeypatch):
    import test_notebook  # here, since the two processes need not import it

    monkeypatch.setenv("DATA_DIR", str(mnist_root))
    test_notebook.export(DATASET="MNIST", EPOCHS=1, BATCH_SIZE=64)
    script, load = Path("S5.py").read_text(), "train_data, test_data = load_data(DATASET)\n"
    assert script.count(load) == 1
    cut = "for data, count in ((train_data, 6001), (test_data, 1001)):\n"
    cut += "    data.data, data.targets = data.data[:count], data.targets[:count]\n"
    Path("S5.py").write_text(script.replace(load, load + cut))
    printed = finish()
    assert "MNIST: 6,001 training and 1,001 test images" in printed
    ((epoch, _, accuracy),) = EPOCH.findall(printed)
    assert epoch == "1" and float(accuracy) > 90
    right = sum(
        round(float(share) * int(count) / 100)
        for share, count in re.findall(r": ([\d.]+) % of (\d+)\n", printed)
    )
    assert f"{100 * right / 1001:.2f}" == accuracy  # of both processes = of rank 0 alone


def test_scaling_measures_and_prints_a_table(mnist_root, monkeypatch, capsys):
    monkeypatch.setenv("DATA_DIR", str(mnist_root))
    scaling.worker(count=640, batch_size=64)
    line = capsys.readouterr().out
    assert min(json.loads(line).values()) > 0

    def answer(command, env, **_):
        speed = 100 * int(env["OMP_NUM_THREADS"]) + 50 * ("--nproc-per-node=2" in command)
        speeds = json.dumps({"exchanging": speed, "alone": speed + 7})
        return SimpleNamespace(stdout=f"2 processes\n{speeds}\n")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    scaling.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [
        "| 1 | 1 | 100 | 1.00 | 107 |",
        "| 2 | 1 | 150 | 1.50 | 157 |",
        "| 1 | 4 | 400 | 4.00 | 407 |",
    ]
