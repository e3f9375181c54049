import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler

import utils
from model import Net
from utils import test, train  # pytest must not take the first for a test

CRITERIA = [F.nll_loss, nn.CrossEntropyLoss(), nn.NLLLoss(reduction="sum")]
CRITERIA += [partial(F.nll_loss, reduction="sum"), partial(nn.NLLLoss(reduction="sum"))]
both = pytest.mark.parametrize("function", ["train", "test"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def run(function, model, loader, criterion, *lists):
    """Call `train`, at learning rate 0 so that the model stays as it is, or `test`."""
    if function == "train":
        return train(model, "cpu", loader, sgd(model, lr=0.0), criterion, *lists)
    return test(model, "cpu", loader, criterion, *lists)


def test_correct_predictions_are_counted_as_an_int():
    pred = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    count = utils.get_correct_pred_count(pred, torch.tensor([1, 1, 1]))
    assert count == 2 and type(count) is int
    assert utils.get_correct_pred_count(pred, torch.ones(3, 1)) == 2  # compared with every row: 6


def test_calls_with_five_and_seven_arguments(linear, samples, capsys):
    loader, optimizer, device = DataLoader(samples, 100), sgd(linear), torch.device("cpu")
    train_losses, train_acc, test_losses, test_acc = [], [], [], []
    train(linear, "cpu", loader, optimizer, F.nll_loss)
    trained = train(linear, device, loader, optimizer, F.nll_loss, train_losses, train_acc)
    test(linear, "cpu", loader, F.nll_loss)
    tested = test(linear, device, loader, F.nll_loss, test_losses, test_acc)
    assert (*train_losses, *train_acc, *test_losses, *test_acc) == (*trained, *tested)
    assert all(type(value) is float for value in (*trained, *tested))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"train: loss {trained[0]:.4f}, accuracy {trained[1]:.2f} %"
    assert lines[3] == f"test: loss {tested[0]:.4f}, accuracy {tested[1]:.2f} %"
    test(linear, device, loader, F.nll_loss, verbose=False)
    assert len(lines) == 4 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["sampler", "drop_last", "one pass"])
@both
def test_metrics_are_means_over_the_samples_seen(linear, samples, function, criterion, kind):
    loader = {
        "sampler": DataLoader(samples, 32, sampler=SubsetRandomSampler(range(70))),
        "drop_last": DataLoader(Subset(samples, range(99)), 35, drop_last=True),
        "one pass": iter(DataLoader(Subset(samples, range(70)), 32)),
    }[kind]
    images, labels = samples[:70]
    output = linear(images)
    accuracy = 100 * (output.argmax(dim=1) == labels).double().mean().item()
    expected = F.nll_loss(output, labels).item(), accuracy
    assert run(function, linear, loader, criterion) == pytest.approx(expected, rel=1e-6)


def test_metrics_stay_exact_over_many_batches():
    output, target = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0])
    loss, _ = test(nn.Identity(), "cpu", [(output, target)] * 20_000, F.nll_loss)
    assert loss == pytest.approx(-output[0, 0].item(), rel=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
def test_train_is_the_textbook_loop_and_may_be_inside_of_an_autocast(linear, samples, autocast):
    reference, loader = copy.deepcopy(linear), DataLoader(samples, 50)
    optimizer = sgd(reference)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for data, target in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = reference(data)
        optimizer.zero_grad()
        F.nll_loss(output.float(), target).backward()
        optimizer.step()
        scheduler.step()
    optimizer = sgd(linear)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        test(linear, "cpu", loader, F.nll_loss)
        utils.predict(linear, "cpu", loader)
        train(linear, "cpu", loader, optimizer, F.nll_loss, scheduler=scheduler)
        _, probabilities, _ = utils.predict(linear, "cpu", loader)
    rtol, atol = (1e-3, 1e-4) if autocast else (0, 0)
    torch.testing.assert_close(linear[1].weight, reference[1].weight, rtol=rtol, atol=atol)
    assert probabilities.dtype == torch.float32


class CountReads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, each time a wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@both
def test_no_step_waits_for_the_device(linear, samples, function):
    loader = list(DataLoader(samples, 2))  # 125 batches
    with CountReads() as reads:
        run(function, linear, loader, F.nll_loss)
    assert reads.count < 10


def test_train_and_test_set_the_mode_of_the_model(samples):
    model, modes = Net().eval(), []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    loader = DataLoader(samples, 250)
    train(model, "cpu", loader, sgd(model), F.nll_loss)
    before = copy.deepcopy(model.state_dict())
    test(model, "cpu", loader, F.nll_loss)
    assert modes == [(True, True), (False, False)] and not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_cuda_graph_changes_no_weight_and_is_ignored_on_the_cpu(samples, device):
    loader, results = DataLoader(samples, 64), []  # the last batch is smaller
    for cuda_graph in (False, True):
        utils.set_seed(0)
        model = Net().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for _ in range(2):
            metrics = train(model, device, loader, optimizer, F.nll_loss, cuda_graph=cuda_graph)
        results.append((metrics, [value.tolist() for value in model.state_dict().values()]))
    assert results[0] == results[1]


@pytest.mark.parametrize("someone", [True, False])
def test_a_bar_is_shown_if_someone_can_see_it(linear, samples, monkeypatch, capsys, someone):
    monkeypatch.setattr(utils, "is_interactive", lambda: someone)
    test(linear, "cpu", DataLoader(samples, 50), F.nll_loss)
    printed = capsys.readouterr().out
    assert ("test:   0%" in printed) == someone and "test: loss" in printed
    monkeypatch.undo()
    for log_or_nothing in (object(), None):  # is no terminal
        monkeypatch.setattr("sys.stdout", log_or_nothing)
        assert not utils.is_interactive()


def test_a_loss_that_is_not_finite_ends_the_run_and_so_does_an_empty_loader(linear):
    images, labels = torch.zeros(4, 1, 28, 28), torch.arange(4)
    batches = [(images, labels), (images, torch.full((4,), -100)), (images, labels)]
    losses, accuracies = [], []
    for function in ("train", "test"):
        with pytest.raises(FloatingPointError, match="nan: learning rate too high, or labels -100"):
            run(function, linear, batches, F.nll_loss, losses, accuracies)
        with pytest.raises(ValueError, match="loader is empty"):
            run(function, linear, [], F.nll_loss, losses, accuracies)
        with pytest.raises(RuntimeError):
            run(function, linear, batches[:1], nn.NLLLoss(reduction="none"), losses, accuracies)
    assert losses == accuracies == []


def test_a_scheduler_in_a_lists_place_fails_before_the_first_step(linear, samples):
    optimizer, before = sgd(linear), linear[1].weight.clone()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(AttributeError, match="StepLR.*append"):
        train(linear, "cpu", DataLoader(samples, 50), optimizer, F.nll_loss, scheduler)
    assert torch.equal(before, linear[1].weight)
