import copy
import re
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import IPython
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler

import utils
from model import Net
from utils import test, train  # pytest must not take the first for a test

SUM = partial(F.nll_loss, reduction="sum")
SUM.reduction = "sum"
CRITERIA = [F.nll_loss, nn.CrossEntropyLoss(), nn.NLLLoss(reduction="sum"), SUM]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def run(function, model, loader, criterion, *lists, **options):
    """Call `train`, at learning rate 0 so that the model stays as it is, or `test`."""
    if function == "train":
        return train(model, "cpu", loader, sgd(model, lr=0.0), criterion, *lists, **options)
    return test(model, "cpu", loader, criterion, *lists, **options)


both = pytest.mark.parametrize("function", ["train", "test"])


# --- what comes out


def naive(model, samples):
    """Loss and accuracy of a list of samples, one at a time."""
    losses, correct = [], 0
    for image, label in samples:
        output = model(image[None])[0]
        losses.append(-output[label].item())
        correct += output.argmax().item() == label
    return sum(losses) / len(losses), 100 * correct / len(losses)


def test_get_correct_pred_count():
    pred = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    count = utils.get_correct_pred_count(pred, torch.tensor([1, 1, 1]))
    assert count == 2 and type(count) is int


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_call_forms(linear, samples, device):
    loader, optimizer = DataLoader(samples, 100), sgd(linear)
    train_losses, train_acc, test_losses, test_acc = [], [], [], []
    train(linear, device, loader, optimizer, F.nll_loss)
    trained = train(linear, device, loader, optimizer, F.nll_loss, train_losses, train_acc)
    test(linear, device, loader, F.nll_loss)
    tested = test(linear, device, loader, F.nll_loss, test_losses, test_acc)
    assert trained._fields == tested._fields == ("loss", "accuracy")
    assert (train_losses, train_acc) == ([trained.loss], [trained.accuracy])
    assert (test_losses, test_acc) == ([tested.loss], [tested.accuracy])
    assert all(type(value) is float for value in (*trained, *tested))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["sampler", "drop_last", "generator"])
@both
def test_metrics_are_means_over_the_samples_seen(linear, samples, function, criterion, kind):
    loader = {
        "sampler": DataLoader(samples, 32, sampler=SubsetRandomSampler(range(70))),
        "drop_last": DataLoader(Subset(samples, range(99)), 35, drop_last=True),
        "generator": (batch for batch in DataLoader(Subset(samples, range(70)), 32)),
    }[kind]
    loss, accuracy = run(function, linear, loader, criterion)
    expected_loss, expected_accuracy = naive(linear, [samples[i] for i in range(70)])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert accuracy == pytest.approx(expected_accuracy)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=120))
@settings(max_examples=30, deadline=None)
def test_metrics_do_not_depend_on_the_split_into_batches(sizes):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(sum(sizes), 5, generator=generator).log_softmax(dim=1)
    labels = torch.randint(5, (sum(sizes),), generator=generator)
    batches = zip(outputs.split(sizes), labels.split(sizes), strict=True)
    loss, accuracy = test(nn.Identity(), "cpu", batches, F.nll_loss, progress=False)
    assert loss == pytest.approx(F.nll_loss(outputs.double(), labels).item(), rel=1e-6)
    assert accuracy == 100 * utils.get_correct_pred_count(outputs, labels) / sum(sizes)


def test_metrics_stay_exact_over_many_batches():
    metrics = utils.RunningMetrics(F.nll_loss)
    output, target = torch.tensor([[0.9, 0.1]]), torch.tensor([0])
    for _ in range(20_000):
        metrics.update(torch.tensor(0.1), output, target)
    assert metrics.compute() == pytest.approx((torch.tensor(0.1).item(), 100), rel=1e-6)


# --- the loop


def test_train_is_the_textbook_loop(linear, samples):
    def shuffled():
        return DataLoader(samples, 100, shuffle=True, generator=torch.Generator().manual_seed(5))

    def halved(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    reference = copy.deepcopy(linear)
    optimizer = sgd(reference)
    scheduler = halved(optimizer)
    losses, correct = [], 0
    for data, target in shuffled():
        optimizer.zero_grad()
        output = reference(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses += [loss.item()] * len(target)
        correct += utils.get_correct_pred_count(output, target)
    optimizer = sgd(linear)
    metrics = train(linear, "cpu", shuffled(), optimizer, F.nll_loss, scheduler=halved(optimizer))
    assert metrics.loss == pytest.approx(sum(losses) / 250)
    assert metrics.accuracy == pytest.approx(100 * correct / 250)
    for ours, theirs in zip(linear.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class CountIterators(DataLoader):
    iterators = 0

    def __iter__(self):
        self.iterators += 1
        return super().__iter__()


@pytest.mark.parametrize("progress", [True, False])
@both
def test_a_pass_makes_one_iterator(linear, samples, function, progress):
    loader = CountIterators(samples, 100)
    run(function, linear, loader, F.nll_loss, progress=progress)
    assert loader.iterators == 1


def run_digits(seed):
    train_data, _ = utils.load_data("digits")
    utils.set_seed(seed)
    model = Net()
    loader = utils.BatchLoader(
        train_data, 128, shuffle=True, augment=utils.RandomAffine(10), seed=seed
    )
    train(model, "cpu", loader, torch.optim.AdamW(model.parameters()), F.nll_loss)
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def test_a_run_repeats_bit_for_bit():
    first = run_digits(seed=1)
    assert torch.equal(first, run_digits(seed=1))
    assert not torch.equal(first, run_digits(seed=2))


def test_modes(samples):
    model, modes = Net().eval(), []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    loader = DataLoader(samples, 250)
    train(model, "cpu", loader, sgd(model), F.nll_loss)
    before = copy.deepcopy(model.state_dict())
    test(model, "cpu", loader, F.nll_loss)
    assert modes == [(True, True), (False, False)] and torch.is_grad_enabled()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class CountReads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, each time a wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@both
def test_the_device_is_not_waited_for_in_each_step(linear, samples, function):
    loader = list(DataLoader(samples, 2)) * 2  # 250 batches
    with CountReads() as reads:
        run(function, linear, loader, F.nll_loss)
    assert 0 < reads.count <= len(loader) / 10


# --- a CUDA graph


class StandIn:
    """Records nothing; replays by running the function again, into the tensors returned first."""

    made = 0

    def __init__(self):
        StandIn.made += 1

    def replay(self):
        with torch.enable_grad():
            results = self.recorded.function(*self.recorded.inputs)
        for output, result in zip(self.recorded.outputs, results, strict=True):
            output.copy_(result)
        self.recorded.replays += 1


def test_a_recorded_step_is_replayed_for_batches_of_one_shape(linear, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    seen = []

    def double(data, target):
        seen.append(data.clone())
        return 2 * data, target + 1

    recorded = utils._Recorded(double)
    recorded.replays = 0
    StandIn.recorded, StandIn.made = recorded, 0
    for count in (8, 8, 8, 3, 8, 8):  # an odd batch starts over: it has replaced the gradients
        data, target = torch.randn(count), torch.arange(count)
        output, label = recorded(data, target)
        assert torch.equal(output, 2 * data) and torch.equal(label, target + 1)
        assert torch.equal(seen[-1], data)
    assert recorded.replays == 3  # not for the first of its shape, which prepares CUDA's libraries
    assert StandIn.made == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_cuda_graph_changes_no_weight(samples):
    weights, metrics = [], []
    for cuda_graph in (False, True):
        utils.set_seed(0)
        model = Net().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        loader = DataLoader(samples, 64)  # the last batch is smaller
        for _ in range(2):
            options = {"progress": False, "cuda_graph": cuda_graph}
            metrics.append(train(model, "cuda", loader, optimizer, F.nll_loss, **options))
        weights.append(torch.cat([value.flatten() for value in model.state_dict().values()]))
    assert torch.equal(*weights) and metrics[:2] == metrics[2:]


def test_on_the_cpu_a_cuda_graph_is_ignored(linear, samples):
    models = [linear, copy.deepcopy(linear)]
    for model, cuda_graph in zip(models, (False, True), strict=True):
        options = {"progress": False, "cuda_graph": cuda_graph}
        train(model, "cpu", DataLoader(samples, 64), sgd(model), F.nll_loss, **options)
    assert torch.equal(models[0][1].weight, models[1][1].weight)


# --- what is shown


@both
def test_a_progress_bar_that_stays_shows_the_result(linear, samples, function, capsys):
    losses, accuracies = [0.0, 0.0], []
    metrics = run(
        function, linear, DataLoader(samples, 2), F.nll_loss, losses, accuracies, progress=True
    )
    shown = capsys.readouterr().out
    last = shown.rstrip().split("\r")[-1]
    values = f"loss {metrics.loss:.4f}, accuracy {metrics.accuracy:.2f} %"
    for part in (f"Epoch 3 {function} 100%", "batch/s, ", values):
        assert part in last
    assert len(last) < 100  # a window of 1,000 pixels has room for about 70 before it wraps
    assert len(set(re.findall(r"loss [\d.]+", shown))) == 3  # after 50 batches, 100 and the last
    assert shown.endswith("\n")  # what is printed next leaves it alone
    batches = (batch for batch in DataLoader(samples, 100))  # has no length
    run(function, linear, batches, F.nll_loss, progress=True)
    shown = capsys.readouterr().out
    assert f"\r{function}: 3batch " in shown and values in shown


@both
def test_by_default_a_bar_is_shown_where_it_is_seen_and_then_removed(
    linear, samples, function, capsys, monkeypatch
):
    loader = DataLoader(samples, 2)
    run(function, linear, loader, F.nll_loss)  # pytest's output is no terminal
    run(function, linear, loader, F.nll_loss, progress=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run(function, linear, loader, F.nll_loss)
    shown = capsys.readouterr().out
    assert f"{function} 100%" in shown and shown.endswith(" \r") and "\n" not in shown


@pytest.mark.parametrize("someone", [True, False])  # or papermill, which cannot answer input()
def test_in_a_notebook_a_bar_is_shown_to_someone(linear, samples, capsys, monkeypatch, someone):
    shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=someone))
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    test(linear, "cpu", DataLoader(samples, 2), F.nll_loss)
    assert ("test 100%" in capsys.readouterr().out) == someone


def test_the_lines_of_all_epochs_stand_in_columns(capsys):
    for epoch, accuracy, seconds in ((1, 5.0, 9.99), (9, 99.5, 10.0), (10, 100.0, 1234.5)):
        metrics = utils.Metrics(0.5, accuracy)
        utils.print_epoch(epoch, 10, metrics, metrics, seconds)
    lines = capsys.readouterr().out.splitlines()
    for mark in ("/", "train", "accuracy", "%", "test", " s"):
        assert (
            len({line.index(mark) for line in lines})
            == len({line.rindex(mark) for line in lines})
            == 1
        )


# --- what is refused


IMAGES, LABELS = torch.zeros(4, 1, 28, 28), torch.arange(4)


@pytest.mark.parametrize("count", [20, 1000])
def test_a_loss_that_is_not_finite_stops_the_epoch(linear, count):
    batches = [(IMAGES, LABELS)] * count
    batches[10] = IMAGES * float("nan"), LABELS
    losses, accuracies, optimizer = [], [], sgd(linear, lr=0.25)
    rest = iter(batches)
    with pytest.raises(FloatingPointError, match="loss is not finite.*at learning rate 0.25:"):
        train(linear, "cpu", rest, optimizer, F.nll_loss, losses, accuracies)
    assert len(list(rest)) >= count - 50
    with pytest.raises(FloatingPointError, match="loss is not finite"):
        test(linear, "cpu", batches, F.nll_loss, losses, accuracies)
    assert losses == accuracies == []


@both
def test_an_empty_loader_is_refused(linear, function):
    with pytest.raises(ValueError, match="loader is empty"):
        run(function, linear, [], F.nll_loss)


def test_what_is_no_list_is_refused_before_the_first_step(linear, samples):
    optimizer = sgd(linear)
    before = copy.deepcopy(linear.state_dict())
    for wrong in (torch.optim.lr_scheduler.StepLR(optimizer, 1), 3):
        with pytest.raises(TypeError, match=f"got {type(wrong).__name__}.*scheduler="):
            train(linear, "cpu", DataLoader(samples, 50), optimizer, F.nll_loss, wrong)
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())


@pytest.mark.parametrize(
    "images, labels, criterion, message",
    [
        (IMAGES.byte(), LABELS, F.cross_entropy, "float images.*uint8"),
        (IMAGES, torch.eye(4, 10), F.cross_entropy, r"float32 of shape \(4, 10\).*argmax"),
        (IMAGES, LABELS[:, None].float(), nn.MSELoss(), r"float32 of shape \(4, 1\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
@both
def test_batches_that_would_give_wrong_numbers_are_refused(
    function, images, labels, criterion, message
):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    model.register_forward_pre_hook(lambda _, args: args[0].float())  # takes bytes, too
    with pytest.raises(ValueError, match=message):
        run(function, model, [(images, labels)], criterion)


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"output of shape \(N, classes\).*got \(3136,\)"):
        test(nn.Flatten(0), "cpu", [(IMAGES, torch.zeros(3136))], nn.MSELoss())


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu", "cpu"])
def test_get_device(monkeypatch, kind):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind != "cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    assert utils.get_device() == torch.device(kind)
