"""Two processes on the CPU against one. Under torchrun, this file is the two processes' script."""

import copy
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
from conftest import EPOCH, NO_GPU, ROOT, export

sys.path.insert(0, str(ROOT))

import utils
from model import Net
from utils import BatchLoader, RandomAffine, end_distributed, init_distributed

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


class FrozenStatistics(Net):
    """Net with its batch norm in evaluation mode, so that outputs do not depend on the batch."""

    def train(self, mode=True):
        return super().train(False)


def digits(count):
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(data=images, targets=torch.arange(count) % 10)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def run(kind, lr, seed=0):
    """Train and test; return the metrics, the last gradients and the weights."""
    torch.manual_seed(seed)
    model = kind().to(memory_format=torch.channels_last)
    loader = BatchLoader(digits(97), 64, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    trained = utils.train(model, "cpu", loader, optimizer, F.nll_loss, verbose=False)
    test_loader = BatchLoader(digits(97), 40)
    tested = utils.test(model, "cpu", test_loader, nn.NLLLoss(reduction="sum"), verbose=False)
    gradients, weights = flat(each.grad for each in model.parameters()), flat(model.parameters())
    return {"metrics": (trained, tested), "gradients": gradients, "weights": weights}


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
    results = {"frozen": run(FrozenStatistics, 0.0, rank), "training": run(Net, 0.05, rank)}
    results["labels"] = labels(61, 20, rank)
    try:
        BatchLoader(digits(9), 3, shuffle=True)
    except ValueError as error:
        results["odd batch size"] = str(error)
    results["dataset"] = utils.load_data("auto", f"{folder}/data")[0].name
    losses = [float(rank)]
    utils.save_checkpoint(f"{folder}/checkpoint.pt", rank, {}, losses=losses)
    results["epoch"] = utils.load_checkpoint(f"{folder}/checkpoint.pt", {}, losses=losses)
    results["losses"] = losses
    torch.save(results, f"{folder}/{rank}.pt")
    try:
        loader = BatchLoader(digits(9), 4, shuffle=True)
        end_distributed()
        print("alone", len(list(loader)))
    finally:  # rank 1 ends there
        names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
        Path(folder, f"{rank}.threads").write_text("".join(names))


if __name__ == "__main__":
    worker(sys.argv[1])
    sys.exit()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of rank 0 and of rank 1."""
    folder = tmp_path_factory.mktemp("ranks")
    offline = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}
    env = {**os.environ, **NO_GPU, **offline}
    command = [*TORCHRUN, __file__, str(folder)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "alone 3\n" and "Grad strides" not in run.stderr
    assert run.stderr.count("'digits' INSTEAD OF MNIST") == 2
    results = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    for rank, result in enumerate(results):
        result["threads"] = (folder / f"{rank}.threads").read_text()
    return results


def test_gradients_and_metrics_are_those_of_one_process(ranks):
    torch.manual_seed(0)
    model = FrozenStatistics().eval()
    [(images, targets)] = BatchLoader(digits(97), 97, shuffle=True)
    images, targets = images[:96], targets[:96]  # shards are of equal size: one is left out
    outputs = model(images)
    loss = F.nll_loss(outputs, targets).item()
    accuracy = 100 * utils.get_correct_pred_count(outputs, targets) / 96
    F.nll_loss(model(images[64:]), targets[64:]).backward()  # of the last batch
    gradients = flat(weight.grad for weight in model.parameters())
    tested = utils.test(model, "cpu", BatchLoader(digits(97), 97), F.nll_loss)
    for result in (rank["frozen"] for rank in ranks):
        assert (result["gradients"] - gradients).norm() < 1e-5 * gradients.norm()
        assert result["metrics"][0] == pytest.approx((loss, accuracy), rel=1e-6)
        assert result["metrics"][1] == pytest.approx(tested, rel=1e-6)


def test_shards_make_up_each_batch_and_what_is_not_shuffled_goes_to_all(ranks):
    shuffled, plain = labels(61, 20)
    for number, rank in enumerate(ranks):
        shard, whole = rank["labels"]
        assert torch.equal(torch.cat(shard), torch.cat(shuffled)[number:60:2])
        assert [len(part) for part in shard] == [10, 10, 10]
        assert torch.equal(torch.cat(whole), torch.cat(plain))


def test_processes_end_with_the_same_weights_and_metrics(ranks):
    first, second = (rank["training"] for rank in ranks)
    assert first["metrics"][0] == second["metrics"][0]
    assert torch.equal(first["weights"], second["weights"])
    whole = run(Net, 0.05)
    off = first["weights"] - whole["weights"]  # batch norm sees half of each batch
    assert 0 < off.norm() < 0.05 * whole["weights"].norm()


def test_one_process_saves_and_all_load_what_it_saved(ranks):
    for rank in ranks:
        assert (rank["epoch"], rank["losses"], rank["dataset"]) == (0, [0.0], "digits")
        assert rank["odd batch size"] == "cannot split batches of 3 by 2 processes"


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
    model = FrozenStatistics().cuda()
    models = model, copy.deepcopy(model)
    dist.init_process_group("nccl", f"file://{tmp_path}/group", rank=0, world_size=1)
    for model in models:
        torch.manual_seed(0)  # for the order
        loader = BatchLoader(digits(97), 64, device="cuda", shuffle=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        utils.train(model, "cuda", loader, optimizer, F.nll_loss)
        end_distributed()  # the second model is trained without a group
    torch.testing.assert_close(*(flat(model.parameters()) for model in models))


def test_the_exported_notebook_trains_in_two_processes(folder):
    export(DATASET="digits", EPOCHS=6)
    options = {"env": {**os.environ, **NO_GPU}, "capture_output": True, "text": True}
    run = subprocess.run([*TORCHRUN, "--local-ranks-filter=0", "S5.py"], **options, timeout=180)
    assert run.returncode == 0, run.stderr
    lines = EPOCH.findall(run.stdout)
    assert [int(epoch) for epoch, *_ in lines] == list(range(1, 7))
    shares = re.findall(r": ([\d.]+) % of (\d+)\n", run.stdout)
    correct = sum(round(float(share) * int(count) / 100) for share, count in shares)
    assert f"{100 * correct / 360:.2f}" == lines[-1][-1] and float(lines[-1][-1]) > 90
    assert Path("runs", "model.pt").stat().st_size > 100_000
