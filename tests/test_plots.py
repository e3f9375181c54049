import re

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Subset

import utils

DATA = utils.load_data("digits")[1]
CURVES = ([0.5, 0.25], [90.0, 95.5], [0.4, 0.125], [91.0, 96.25])


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    assert plt.get_fignums() == []


def test_plot_train_metrics():
    figure = utils.plot_train_metrics(*CURVES, title="MNIST")
    assert isinstance(figure, Figure) and figure.get_suptitle() == "MNIST"
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy (%)")
    for axes, curves, labels in (
        (loss, CURVES[::2], ["train 0.2500", "test 0.1250"]),
        (accuracy, CURVES[1::2], ["train 95.50 %", "test 96.25 %"]),
    ):
        assert axes.get_xlabel() == "epoch"
        assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
        for line, curve in zip(axes.lines, curves, strict=True):
            assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == curve


@pytest.mark.parametrize("lists", [([], [], [], []), ([1.0], [1.0], [1.0], [1.0, 2.0])])
def test_plot_train_metrics_refuses_unequal_or_empty_lists(lists):
    with pytest.raises(ValueError, match="four lists of one length"):
        utils.plot_train_metrics(*lists)


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.images]


def test_plot_sample_data_shows_what_enters_the_model():
    _, test_data = utils.load_data("digits")
    loader = utils.BatchLoader(test_data, 30)
    figure = utils.plot_sample_data(loader, title="digits")
    assert isinstance(figure, Figure) and figure.get_suptitle() == "digits"
    images, labels = next(iter(loader))
    assert titles(figure) == [test_data.classes[label] for label in labels[:24]]
    shown = figure.axes[5].images[0].get_array()
    assert torch.equal(torch.from_numpy(shown.data), images[5, 0])


def test_plot_sample_data_takes_any_loader(samples):
    state = torch.get_rng_state()
    assert titles(utils.plot_sample_data(DataLoader(samples, 5))) == list("01234")
    assert len(titles(utils.plot_sample_data(DataLoader(samples, 64, shuffle=True)))) == 24
    assert torch.equal(torch.get_rng_state(), state)
    train_data, _ = utils.load_data("digits")
    subset = utils.BatchLoader(Subset(train_data, [0]), 5)
    assert titles(utils.plot_sample_data(subset)) == [train_data.classes[train_data.targets[0]]]


@pytest.mark.parametrize(
    "loader, shape", [([], "(0,)"), ([(torch.zeros(2, 784), torch.zeros(2))], "(2, 784)")]
)
def test_plot_sample_data_refuses_what_is_no_image(loader, shape):
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\), got " + re.escape(shape)):
        utils.plot_sample_data(loader)


def guesses():
    """A loader of 30 digits, and predictions of which every tenth is wrong, ever more confident."""
    loader = utils.BatchLoader(Subset(DATA, range(30)), 8)
    targets = loader.targets
    predictions, confidences = targets.clone(), torch.full((30,), 0.6)
    predictions[::10] = (targets[::10] + 1) % 10
    confidences[::10] = torch.tensor([0.7, 0.8, 0.9])
    probabilities = torch.full((30, 10), 0.01)
    probabilities[range(30), predictions] = confidences
    return loader, predictions, probabilities, targets


def test_plot_misclassified_shows_the_most_confident_mistakes_first():
    loader, predictions, probabilities, targets = guesses()
    figure = utils.plot_misclassified(loader, predictions, probabilities, targets, title="wrong")
    assert figure.get_suptitle() == "wrong"
    expected = [
        f"{DATA.classes[targets[i]]}\n→ {DATA.classes[predictions[i]]}, {percent} %"
        for i, percent in ((20, 90), (10, 80), (0, 70))
    ]
    assert titles(figure) == expected
    shown = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    assert torch.equal(shown, torch.cat([images for images, _ in loader])[20, 0])
    figure = utils.plot_misclassified(loader, targets, probabilities, targets)
    assert titles(figure) == [] and figure.texts[0].get_text() == "none"
    figure = utils.plot_misclassified(loader, (targets + 1) % 10, probabilities, targets)
    assert len(titles(figure)) == 24


def test_plot_misclassified_refuses_another_order():
    _, predictions, probabilities, targets = guesses()
    loader = utils.BatchLoader(Subset(DATA, range(30)), 8, shuffle=True)
    with pytest.raises(ValueError, match="does not shuffle"):
        utils.plot_misclassified(loader, predictions, probabilities, targets)
    coloured = [(torch.zeros(30, 3, 28, 28), targets)]
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\)"):
        utils.plot_misclassified(coloured, predictions, probabilities, targets)


def test_plot_confusion_matrix_colours_the_errors_alone():
    _, predictions, _, targets = guesses()
    figure = utils.plot_confusion_matrix(predictions, targets, DATA.classes, title="it")
    (axes,) = figure.axes
    errors = axes.images[0].get_array()
    assert errors.diagonal().sum() == 0 and errors.sum() == 3
    texts = [text.get_text() for text in axes.texts]
    assert sum(int(text or 0) for text in texts) == 30 and texts.count("") > 80
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [label.get_text() for label in axes.get_xticklabels()] == DATA.classes
    assert figure.get_suptitle() == "it"
    for wrong in (targets[:5], targets[:0]):
        with pytest.raises(ValueError, match=f"got {len(wrong)} and"):
            utils.plot_confusion_matrix(wrong, targets if len(wrong) else wrong, DATA.classes)
    with pytest.raises(ValueError, match="from 0 to 4, since there are 5"):
        utils.plot_confusion_matrix(predictions, targets, DATA.classes[:5])


def test_plot_prediction_shows_image_and_probabilities():
    image = 255 - DATA.data[0].numpy()
    figure = utils.plot_prediction(
        image, torch.arange(10) / 45, DATA.data[0].numpy(), DATA.classes, title="it"
    )
    left, middle, right = figure.axes
    assert left.images[0].get_array().max() == 1 and middle.images[0].get_array().max() == 255
    heights = [bar.get_height() for bar in right.patches]
    assert heights == pytest.approx([100 * number / 45 for number in range(10)])
    assert [label.get_text() for label in right.get_xticklabels()] == DATA.classes
    assert figure.get_suptitle() == "it"
