"""Two processes on the CPU against one. Under torchrun, this file is the two processes' script."""

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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from test_data import write_dataset  # noqa: E402

import utils  # noqa: E402
from model import Net  # noqa: E402
from utils import (  # noqa: E402
    BatchLoader,
    RandomAffine,
    data_parallel,
    end_distributed,
    init_distributed,
    load_checkpoint,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SIZES = {"even": (100, 50), "uneven": (97, 64), "a last batch of two": (66, 64)}
KEPT = []  # models that live until the process ends, as those of a notebook do


class FrozenStatistics(Net):
    """Net with its batch norm in evaluation mode, so that outputs do not depend on the batch."""

    def train(self, mode=True):
        return super().train(False)


def digits(count):
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(data=images, targets=torch.arange(count) % 10)


def run(kind, lr, count, batch_size, seed=0):
    """Train and test; return the metrics, the last gradients, the weights and the statistics."""
    torch.manual_seed(seed)
    model = kind()
    loader = BatchLoader(digits(count), batch_size, shuffle=True)
    test_loader = BatchLoader(digits(97), 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    parallel_model = data_parallel(model)
    KEPT.append(parallel_model)
    trained = utils.train(parallel_model, "cpu", loader, optimizer, F.nll_loss, progress=False)
    tested = utils.test(model, "cpu", test_loader, nn.NLLLoss(reduction="sum"), progress=False)
    return {
        "metrics": [tuple(trained), tuple(tested)],
        "gradients": torch.cat([weight.grad.flatten() for weight in model.parameters()]),
        "weights": torch.cat([weight.detach().flatten() for weight in model.parameters()]),
        "statistics": torch.cat([buffer.double().flatten() for buffer in model.buffers()]),
    }


def labels(count, batch_size):
    """The labels of two passes over a training loader, and of one without gradients."""
    data = SimpleNamespace(data=digits(count).data, targets=torch.arange(count))
    loader = BatchLoader(data, batch_size, shuffle=True, augment=RandomAffine(20))
    passes = [[labels for _, labels in loader] for _ in range(2)]
    with torch.no_grad():
        return [*passes, [labels for _, labels in loader]]


def worker(folder):
    assert init_distributed() == torch.device("cpu")
    rank = dist.get_rank()
    print("rank", rank)  # of which only 0 is to be seen
    results = {name: run(FrozenStatistics, 0.0, *size, rank) for name, size in SIZES.items()}
    results["training"] = run(Net, 0.05, 97, 64, rank)
    results["labels"] = labels(61, 20)
    for name, call in {
        "odd batch size": lambda: list(BatchLoader(digits(9), 3)),
        "predict": lambda: utils.predict(Net(), "cpu", BatchLoader(digits(9), 2)),
    }.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            results[name] = str(error)
    os.environ["DATA_DIR"] = f"{folder}/{rank}"  # MNIST lies in one of the two
    utils.DIGESTS.clear()  # and is made up
    results["dataset"] = utils.load_data("auto")[0].name
    torch.save(results, Path(folder) / f"{rank}.pt")
    try:
        end_distributed()
        print("alone", len(list(BatchLoader(digits(9), 3))))
    finally:  # rank 1 ends there
        names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
        (Path(folder) / f"{rank}.threads").write_text("".join(names))


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
    assert run.stdout == "2 processes, each on the CPU\nrank 0\nalone 3\n"
    assert "Grad strides" not in run.stderr
    results = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    for rank, result in enumerate(results):
        result["threads"] = (folder / f"{rank}.threads").read_text()
    return results


@pytest.mark.parametrize("name", SIZES)
def test_gradients_and_metrics_are_those_of_one_process(ranks, name):
    count, batch_size = SIZES[name]
    used = count - count % 2  # shares are of equal size: of 97 images one is left out
    torch.manual_seed(0)
    model = FrozenStatistics().eval()
    [(images, targets)] = BatchLoader(digits(count), count, shuffle=True)
    outputs = model(images[:used])
    loss = F.nll_loss(outputs, targets[:used]).item()
    accuracy = 100 * utils.get_correct_pred_count(outputs, targets[:used]) / used
    start = (used - 1) // batch_size * batch_size  # of the last batch
    F.nll_loss(model(images[start:used]), targets[start:used]).backward()
    gradients = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    tested = utils.test(model, "cpu", BatchLoader(digits(97), 97), F.nll_loss, progress=False)
    for rank in ranks:
        assert (rank[name]["gradients"] - gradients).norm() < 1e-5 * gradients.norm()
        assert rank[name]["metrics"][0] == pytest.approx((loss, accuracy), rel=1e-6)
        assert rank[name]["metrics"][1] == pytest.approx(tested, rel=1e-6)


def test_shares_make_up_each_batch(ranks):
    for number, batches in enumerate(labels(61, 20)):
        used = 61 if number == 2 else 60  # without gradients, none is left out
        for rank, result in enumerate(ranks):
            share = result["labels"][number]
            assert torch.equal(torch.cat(share), torch.cat(batches)[rank:used:2])
            assert [len(part) for part in share[:3]] == [10, 10, 10]


def test_processes_end_with_the_same_weights_and_metrics(ranks):
    first, second = (rank["training"] for rank in ranks)
    assert first["metrics"] == second["metrics"]
    for key in ("weights", "statistics"):
        assert torch.equal(first[key], second[key])
    whole = run(Net, 0.05, 97, 64)
    off = first["weights"] - whole["weights"]  # batch norm sees half of each batch
    assert 0 < off.norm() < 0.05 * whole["weights"].norm()


def test_all_get_the_dataset_that_rank_0_got(ranks):
    assert [rank["dataset"] for rank in ranks] == ["digits", "digits"]


def test_what_several_processes_cannot_do_is_refused(ranks):
    for rank in ranks:
        assert "multiple of the number of processes, 2, got 3" in rank["odd batch size"]
        assert "after end_distributed()" in rank["predict"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not in /proc")
def test_no_thread_of_the_group_is_left_to_abort_a_process_at_its_exit(ranks):
    for rank in ranks:
        assert "python" in rank["threads"] and "gloo" not in rank["threads"]


# --- in one process


def test_one_process_initialises_nothing(monkeypatch, linear):
    for world_size in (None, "1"):  # without torchrun, or torchrun --nproc-per-node=1
        if world_size is None:
            monkeypatch.delenv("WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("WORLD_SIZE", world_size)
        assert init_distributed() == utils.get_device()
        assert data_parallel(linear) is linear
        end_distributed()
        assert not dist.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="got 1 for process 1.*nproc-per-node"):
        init_distributed()


# --- the exported notebook


EPOCH = re.compile(r"^Epoch +(\d+)/(\d+)  train loss .* test loss .* accuracy +([\d.]+) %", re.M)


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


def test_a_killed_process_ends_the_job_which_goes_on_when_run_again(folder):
    export(DATASET="digits", EPOCHS=16, RESUME=True)
    done = 0
    for rank in ("1", "0"):
        with job() as process:
            for line in process.stdout:
                if line.startswith(f"Epoch {done + 2:2}/16"):
                    break
            workers = psutil.Process(process.pid).children()
            (worker,) = [each for each in workers if each.environ().get("RANK") == rank]
            worker.kill()
            assert process.wait(timeout=60) != 0
        before = load_checkpoint("runs/checkpoint.pt")
        assert done + 2 <= before["epoch"] < 16  # what is printed is saved
        done = before["epoch"]

    with job() as process:
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 0, Path("stderr.txt").read_text()
    assert printed.startswith("2 processes, each on the CPU\n")
    assert printed.count(f"Restored epoch {done} from {Path('runs', 'checkpoint.pt')}\n") == 1
    lines = EPOCH.findall(printed)
    assert [int(epoch) for epoch, *_ in lines] == list(range(done + 1, 17))
    after = load_checkpoint("runs/checkpoint.pt")
    for curve in ("train_losses", "train_acc", "test_losses", "test_acc"):
        assert len(after[curve]) == 16 and after[curve][:done] == before[curve]
    shares = re.findall(r": ([\d.]+) % of (\d+)\n", printed)
    right = sum(round(float(share) * int(count) / 100) for share, count in shares)
    assert f"{100 * right / 360:.2f}" == lines[-1][-1]  # of both processes = of rank 0 alone
    assert float(lines[-1][-1]) > 90
