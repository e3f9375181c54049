import copy
import itertools

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

CRITERIA = [F.nll_loss, F.cross_entropy, nn.CrossEntropyLoss(), nn.NLLLoss(reduction="sum")]


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


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
    utils.train(linear, device, loader, optimizer, F.nll_loss)
    trained = utils.train(linear, device, loader, optimizer, F.nll_loss, train_losses, train_acc)
    utils.test(linear, device, loader, F.nll_loss)
    tested = utils.test(linear, device, loader, F.nll_loss, test_losses, test_acc)
    assert trained._fields == tested._fields == ("loss", "accuracy")
    assert (train_losses, train_acc) == ([trained.loss], [trained.accuracy])
    assert (test_losses, test_acc) == ([tested.loss], [tested.accuracy])
    assert all(type(value) is float for value in (*trained, *tested))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["uneven", "sampler", "subset", "drop_last", "generator"])
@pytest.mark.parametrize("function", ["train", "test"])
def test_metrics_are_means_over_the_samples_seen(linear, samples, function, criterion, kind):
    chosen = [samples[i] for i in range(70)]
    loader = {
        "uneven": DataLoader(Subset(samples, range(70)), 32),
        "sampler": DataLoader(samples, 32, sampler=SubsetRandomSampler(range(70))),
        "subset": DataLoader(Subset(samples, range(70)), 70),
        "drop_last": DataLoader(Subset(samples, range(99)), 35, drop_last=True),
        "generator": (batch for batch in DataLoader(Subset(samples, range(70)), 32)),
    }[kind]
    if function == "train":  # at learning rate 0 the model stays as it is
        loss, accuracy = utils.train(linear, "cpu", loader, sgd(linear, lr=0.0), criterion)
    else:
        loss, accuracy = utils.test(linear, "cpu", loader, criterion)
    expected_loss, expected_accuracy = naive(linear, chosen)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert accuracy == pytest.approx(expected_accuracy)


def test_metrics_of_more_batches_than_are_read_at_once(linear, samples):
    batches = 2 * utils.READ_EVERY
    for size, count in ((1, batches), (2, batches), (2, batches + 3)):
        chosen = Subset(samples, range(size * count))
        loss, accuracy = utils.test(linear, "cpu", DataLoader(chosen, size), F.nll_loss)
        expected_loss, expected_accuracy = naive(linear, chosen)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert accuracy == pytest.approx(expected_accuracy)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=120))
@settings(max_examples=30, deadline=None)
def test_metrics_do_not_depend_on_the_split_into_batches(sizes):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(sum(sizes), 5, generator=generator).log_softmax(dim=1)
    labels = torch.randint(5, (sum(sizes),), generator=generator)
    batches = zip(outputs.split(sizes), labels.split(sizes), strict=True)
    loss, accuracy = utils.test(nn.Identity(), "cpu", batches, F.nll_loss, progress=False)
    assert loss == pytest.approx(F.nll_loss(outputs, labels).item(), rel=1e-5)
    assert accuracy == 100 * utils.get_correct_pred_count(outputs, labels) / sum(sizes)


def test_train_is_the_textbook_loop(linear, samples):
    loader, reference = DataLoader(samples, 100), copy.deepcopy(linear)
    optimizer = sgd(reference)
    losses, correct = [], 0
    for data, target in loader:
        optimizer.zero_grad()
        output = reference(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        losses += [loss.item()] * len(target)
        correct += utils.get_correct_pred_count(output, target)
    metrics = utils.train(linear, "cpu", loader, sgd(linear), F.nll_loss)
    assert metrics.loss == pytest.approx(sum(losses) / 250)
    assert metrics.accuracy == pytest.approx(100 * correct / 250)
    for ours, theirs in zip(linear.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_few_steps_overfit_one_batch(samples):
    utils.set_seed(0)
    model, batch = Net(), next(iter(DataLoader(samples, 32)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    utils.train(model, "cpu", [batch] * 30, optimizer, F.nll_loss)
    assert utils.train(model, "cpu", [batch], optimizer, F.nll_loss).accuracy == 100


def run_digits(seed):
    train_data, _ = utils.load_data("digits")
    utils.set_seed(seed)
    model = Net()
    loader = utils.BatchLoader(
        train_data, 128, shuffle=True, augment=utils.RandomAffine(10), seed=seed
    )
    utils.train(model, "cpu", loader, torch.optim.AdamW(model.parameters()), F.nll_loss)
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def test_a_run_repeats_bit_for_bit():
    first = run_digits(seed=1)
    assert torch.equal(first, run_digits(seed=1))
    assert not torch.equal(first, run_digits(seed=2))


def test_scheduler_steps_once_per_batch(linear, samples):
    optimizer = sgd(linear, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    loader = DataLoader(samples, 100)
    utils.train(linear, "cpu", loader, optimizer, F.nll_loss, scheduler=scheduler)
    assert scheduler.get_last_lr() == [0.125]


@pytest.mark.parametrize("training", [True, False])
def test_test_leaves_the_model_as_it_was(samples, training):
    model = Net().train(training)
    before = copy.deepcopy(model.state_dict())
    utils.test(model, "cpu", DataLoader(samples, 100), F.nll_loss)
    assert model.training is training and model.norm1.training is training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError):
        utils.test(model, "cpu", [], F.nll_loss)
    assert model.training is training


def test_test_restores_a_part_that_was_frozen(samples):
    model = Net().train()
    model.norm2.eval()
    utils.test(model, "cpu", DataLoader(samples, 100), F.nll_loss)
    assert model.training and model.norm1.training and not model.norm2.training


def test_modes(samples):
    model, modes = Net().eval(), []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    loader = DataLoader(samples, 250)
    utils.train(model, "cpu", loader, sgd(model), F.nll_loss)
    utils.test(model, "cpu", loader, F.nll_loss)
    assert modes == [(True, True), (False, False)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [1, 3, 50, 51, 57])
def test_a_loss_that_is_not_finite_names_step_and_learning_rate(linear, samples, step, value):
    def breaks_at_step():
        steps = itertools.count(1)
        added = (value if number >= step else 0.0 for number in steps)
        return lambda output, target: F.nll_loss(output, target) + next(added)

    batches = list(DataLoader(samples, 4))  # 63
    optimizer = sgd(linear, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    lists = [], []
    with pytest.raises(FloatingPointError) as error:
        utils.train(
            linear, "cpu", batches, optimizer, breaks_at_step(), *lists, scheduler=scheduler
        )
    assert f"became {value} in step {step} at learning rate {1 / step:g} " in str(error.value)
    with pytest.raises(FloatingPointError, match=f"became {value} in step {step}$"):
        utils.test(linear, "cpu", batches, breaks_at_step(), *lists)
    assert lists == ([], [])


def test_a_learning_rate_in_a_tensor_is_named_as_it_was(linear, samples):
    images, labels = next(iter(DataLoader(samples, 4)))
    batches = [(images, labels)] * 2 + [(images * float("nan"), labels)] * 8
    optimizer = sgd(linear, lr=torch.tensor(1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with pytest.raises(FloatingPointError, match="step 3 at learning rate 0.25 "):
        utils.train(linear, "cpu", batches, optimizer, F.nll_loss, scheduler=scheduler)


def test_empty_loader(linear):
    for call in (
        lambda: utils.train(linear, "cpu", [], sgd(linear), F.nll_loss),
        lambda: utils.test(linear, "cpu", [], F.nll_loss),
    ):
        with pytest.raises(ValueError, match="loader is empty"):
            call()


def test_criterion_that_returns_a_vector(linear, samples):
    loader, criterion = DataLoader(samples, 100), nn.CrossEntropyLoss(reduction="none")
    for call in (
        lambda: utils.train(linear, "cpu", loader, sgd(linear), criterion),
        lambda: utils.test(linear, "cpu", loader, criterion),
    ):
        with pytest.raises(ValueError, match=r"one number.*\(100,\).*reduction"):
            call()


IMAGES, LABELS = torch.zeros(4, 1, 28, 28), torch.arange(4)


@pytest.mark.parametrize("function", ["train", "test"])
@pytest.mark.parametrize(
    "images, labels, message",
    [
        (IMAGES.byte(), LABELS, "float images.*uint8"),
        (IMAGES, LABELS.float(), r"integer label for each of 4 images.*float32.*\(4,\)"),
        (IMAGES, torch.eye(4, 10).long(), r"integer label.*int64 of shape \(4, 10\).*argmax"),
        (IMAGES, LABELS[:3], r"each of 4 images.*\(3,\)"),
        (IMAGES, LABELS + 7, "labels from 0 to 9, since the model tells 10 .*, got 7 to 10"),
        (IMAGES, LABELS - 1, "labels from 0 to 9.*got -1 to 2"),
    ],
)
def test_batches_of_another_kind(linear, function, images, labels, message):
    before = copy.deepcopy(linear.state_dict())
    good = IMAGES, LABELS
    with pytest.raises(ValueError, match=message):
        if function == "train":
            utils.train(linear, "cpu", [(images, labels), good], sgd(linear), F.nll_loss)
        else:
            utils.test(linear, "cpu", [good, (images, labels)], F.nll_loss)
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())


def test_images_without_their_channel_are_named():
    for call in (lambda model, images: model(images), lambda model, images: model(images[0])):
        with pytest.raises(ValueError, match=r"\(N, 1, 28, 28\), got"):
            call(Net(), IMAGES.squeeze(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_any_integers_are_labels(linear, dtype):
    expected = utils.test(linear, "cpu", [(IMAGES, LABELS)], F.nll_loss)
    assert utils.test(linear, "cpu", [(IMAGES, LABELS.to(dtype))], F.nll_loss) == expected


def test_model_on_another_device(linear, samples):
    loader = DataLoader(samples, 100)
    for call in (
        lambda: utils.train(linear.to("meta"), "cpu", loader, sgd(linear), F.nll_loss),
        lambda: utils.test(linear.to("meta"), "cpu", loader, F.nll_loss),
    ):
        with pytest.raises(ValueError, match=r"model is on meta.*go to cpu.*model.to\(device\)"):
            call()


def test_output_of_another_shape(samples):
    loader = DataLoader(samples, 100)
    for model in (nn.Identity(), nn.Flatten(0)):
        with pytest.raises(ValueError, match=r"output has shape \(100, classes\), got"):
            utils.test(model, "cpu", loader, F.nll_loss)


class CountReads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, each time a wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_synchronisation_per_step(linear, samples, monkeypatch):
    tolist, lists = torch.Tensor.tolist, itertools.count()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (next(lists), tolist(tensor))[1])
    loader = [batch for _ in range(2) for batch in DataLoader(samples, 2)]  # 250 batches
    with CountReads() as reads:
        utils.train(linear, "cpu", loader, sgd(linear), F.nll_loss)
        utils.test(linear, "cpu", loader, F.nll_loss)
    looks = 2 * len(loader) / utils.READ_EVERY
    assert looks == 10 and reads.count == looks and next(lists) == looks


def test_progress_bar(linear, samples, capsys):
    loader = DataLoader(samples, 100)
    for name in ("train", "test"):
        if name == "train":
            metrics = utils.train(linear, "cpu", loader, sgd(linear), F.nll_loss)
        else:
            metrics = utils.test(linear, "cpu", loader, F.nll_loss)
        shown = capsys.readouterr().err
        values = f"loss {metrics.loss:.4f}, accuracy {metrics.accuracy:.2f} %"
        for part in (f"{name}: 100%", "3/3", values, "images/s"):
            assert part in shown
    utils.train(linear, "cpu", loader, sgd(linear), F.nll_loss, progress=False)
    utils.test(linear, "cpu", loader, F.nll_loss, progress=False)
    assert capsys.readouterr() == ("", "")


def test_test_is_not_collected_by_pytest():
    assert utils.test.__test__ is False


@pytest.mark.parametrize(
    "cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_get_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert utils.get_device() == torch.device(expected)
