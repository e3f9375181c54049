import re

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Subset

import utils

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
