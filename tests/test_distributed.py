"""Two processes on the CPU against one. Under torchrun, this file is the two processes' script."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import EPOCH, ROOT, export

sys.path.insert(0, str(ROOT))

import utils
from model import Net
from utils import BatchLoader, RandomAffine, end_distributed, init_distributed

pytestmark = pytest.mark.slow


class FrozenStatistics(Net):
    """Net with its batch norm in evaluation mode, so that outputs do not depend on the batch."""

    def train(self, mode=True):
        return super().train(False)


def digits(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(data=images, targets=torch.arange(count) % 10)


def run(kind, seed=0, device="cpu"):
    """Train and test; return the metrics, the last gradients and the weights."""
    torch.manual_seed(seed)
    model = kind().to(device, memory_format=torch.channels_last)
    loader = BatchLoader(digits(96), 64, device=device, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trained = utils.train(model, device, loader, optimizer, F.nll_loss, verbose=False)
    test_loader = BatchLoader(digits(97), 40, device=device)
    tested = utils.test(model, device, test_loader, nn.NLLLoss(reduction="sum"), verbose=False)
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    gradients = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return {"metrics": trained + tested, "gradients": gradients, "weights": weights}


def labels(count, batch_size, seed=0):
    """The labels of a pass over a loader that shuffles, and over one that does not."""
    torch.manual_seed(seed)
    data, augment = digits(count), RandomAffine(20)
    data.targets = torch.arange(count)
    loaders = BatchLoader(data, batch_size, shuffle=True, augment=augment), BatchLoader(data, 20)
    passes = [[labels for _, labels in loader] for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in passes]
    return passes


def worker(folder):
    device, rank = init_distributed(), int(os.environ["RANK"])
    assert device == torch.device("cpu") and dist.get_rank() == rank
    results = {"frozen": run(FrozenStatistics, rank), "training": run(Net, rank)}
    results["labels"] = labels(61, 20, rank)
    with pytest.raises(ValueError, match="cannot split batches of 3 by 2 processes"):
        BatchLoader(digits(9), 3, shuffle=True)
    results["dataset"] = utils.load_data("auto", f"{folder}/data")[0].name
    path, losses = f"{folder}/checkpoint.pt", [float(rank)]
    utils.save_checkpoint(path, rank, {}, losses=losses)
    results["loaded"] = utils.load_checkpoint(path, {}, losses=losses), losses
    try:
        loader = BatchLoader(digits(9), 4, shuffle=True)
        end_distributed()
        print("alone", len(list(loader)))
    finally:  # rank 1 ends there
        names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
        torch.save({**results, "threads": "".join(names)}, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    worker(sys.argv[1])
    sys.exit()


def torchrun(*arguments):
    """Start two processes, without a GPU, and return what they print and what they warn of."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = {"capture_output": True, "text": True, "timeout": 180}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*command, *arguments], env=environment, **options)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of rank 0 and of rank 1."""
    folder = tmp_path_factory.mktemp("ranks")
    printed, warned = torchrun(__file__, str(folder))
    assert printed == "alone 3\n" and "Grad strides" not in warned
    assert warned.count("'digits' INSTEAD OF MNIST") == 2
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_metrics_gradients_and_weights_are_those_of_one_process(ranks):
    expected = run(FrozenStatistics)
    for result in (rank["frozen"] for rank in ranks):
        assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
        for name in ("gradients", "weights"):
            assert (result[name] - expected[name]).norm() < 1e-5 * expected[name].norm()


def test_shards_make_up_each_batch_and_what_is_not_shuffled_goes_to_all(ranks):
    shuffled, plain = labels(61, 20)
    for number, rank in enumerate(ranks):
        shard, whole = rank["labels"]
        assert torch.equal(torch.cat(shard), torch.cat(shuffled)[number:60:2])
        assert [len(part) for part in shard] == [10, 10, 10]
        assert torch.equal(torch.cat(whole), torch.cat(plain))


def test_processes_end_with_the_same_weights_metrics_and_checkpoint(ranks):
    first, second = (rank["training"] for rank in ranks)
    assert first["metrics"][:2] == second["metrics"][:2]  # those of the training
    assert torch.equal(first["weights"], second["weights"])
    whole = run(Net)
    off = first["weights"] - whole["weights"]  # batch norm sees half of each batch
    assert 0 < off.norm() < 0.05 * whole["weights"].norm()
    for rank in ranks:  # which have loaded what the first has saved
        assert rank["loaded"] == (0, [0.0]) and rank["dataset"] == "digits"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not in /proc")
def test_no_thread_of_the_group_is_left_to_abort_a_process_at_its_exit(ranks):
    for rank in ranks:  # see PyTorch issue 190489
        assert "python" in rank["threads"] and "gloo" not in rank["threads"]


def test_one_process_initialises_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc-per-node=1
    assert init_distributed() == utils.get_device()
    assert not dist.is_initialized()
    end_distributed()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_nccl_in_a_group_of_one_trains_as_without_it(tmp_path):
    dist.init_process_group("nccl", f"file://{tmp_path}/group", rank=0, world_size=1)
    expected = run(FrozenStatistics, device="cuda")["weights"]
    end_distributed()
    torch.testing.assert_close(run(FrozenStatistics, device="cuda")["weights"], expected)


def test_the_exported_notebook_trains_in_two_processes(folder):
    export(DATASET="digits", EPOCHS=6)
    printed, _ = torchrun("--local-ranks-filter=0", "S5.py")
    lines = EPOCH.findall(printed)
    assert [int(epoch) for epoch, *_ in lines] == list(range(1, 7))
    shares = re.findall(r": +([\d.]+) % of (\d+)\n", printed)
    correct = sum(round(float(share) * int(count) / 100) for share, count in shares)
    assert f"{100 * correct / 360:.2f}" == lines[-1][-1] and float(lines[-1][-1]) > 90
    assert Path("runs", "model.pt").stat().st_size > 100_000
