import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import datasets

import utils

pytestmark = pytest.mark.filterwarnings("error")  # such as NumPy's about log(0)
DATA = utils.load_data("digits")[1]
LOADER = utils.BatchLoader(Subset(DATA, range(30)), 8)
TARGETS, WRONG = LOADER.targets, [20, 10, 0]  # the most confident mistake first
PREDICTIONS, PROBABILITIES = TARGETS.clone(), torch.full((30, 10), 0.01)
PREDICTIONS[WRONG] = (TARGETS[WRONG] + 1) % 10
PROBABILITIES[range(30), PREDICTIONS] = 0.6
PROBABILITIES[WRONG, PREDICTIONS[WRONG]] = torch.tensor([0.9, 0.8, 0.7])
MODEL_INPUT = DATA.data[0].numpy()
INPUT = {  # of each function
    "train_metrics": ([0.5, 0.25], [90, 95.5], [0.4, 0.125], [91, 96.25]),
    "images": (DATA.data, "abc"),
    "sample_data": (LOADER,),
    "misclassified": (DATA.data[:30], PREDICTIONS, PROBABILITIES, TARGETS, DATA.classes),
    "prediction": (Image.fromarray(255 - MODEL_INPUT), PROBABILITIES[0], MODEL_INPUT, DATA.classes),
}


@pytest.fixture(autouse=True)
def close_figures():
    plt.switch_backend("agg")
    plt.close("all")


def plot(name, *values):
    """Call one of the functions and return the axes of the figure that is then the current one."""
    getattr(utils, f"plot_{name}")(*(values or INPUT[name]))
    return plt.gcf().axes


def image_titles(figure_axes):
    return [axes.get_title() for axes in figure_axes if axes.images]


@pytest.mark.parametrize("name", INPUT)
def test_a_figure_is_left_open_to_be_saved(name):
    plt.figure()  # of the user's own
    plot(name)
    plt.gcf().canvas.draw()
    assert plt.get_fignums() == [1, 2]


def test_the_curves_are_labelled_with_their_last_values():
    loss_axes, accuracy_axes = plot("train_metrics")
    for axes, name, expected in (
        (loss_axes, "loss", {"train 0.2500": [0.5, 0.25], "test 0.1250": [0.4, 0.125]}),
        (accuracy_axes, "accuracy (%)", {"train 95.50 %": [90, 95.5], "test 96.25 %": [91, 96.25]}),
    ):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", name)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(expected)
        curves = [line.get_xydata().T.tolist() for line in axes.lines]
        assert curves == [[[1, 2], values] for values in expected.values()]


def test_curves_without_a_test_are_drawn_and_of_different_lengths_refused():
    for count, ticks in (1, [1]), (20, [1, 2, 5, 8, 11, 14, 17, 20]), (15, [*range(1, 16, 2)]):
        for axes in plot("train_metrics", [0.5] * count, [90] * count, [], []):
            assert [len(line.get_xdata()) for line in axes.lines] == [count]
            assert sorted(axes.get_xticks()) == ticks
    four = [1.0, 2.0], [80, 90], [1.0, 2.0], [80, 90]
    for wrong in ([[]] * 4, (*four[:3], [80]), (four[0], four[1][:1], [], []), (*four[:3], [])):
        with pytest.raises(ValueError, match="no epoch is complete yet, or lists differ"):
            plot("train_metrics", *wrong)


@pytest.mark.parametrize("accuracies", [[100.0] * 3, [99.98], [9.8, 11.4], [93.8, 98.5, 99.72]])
def test_the_accuracys_scale_widens_towards_100_percent(accuracies):
    axes = plot("train_metrics", accuracies, accuracies, accuracies, accuracies)[1]
    plt.gcf().canvas.draw()
    assert axes.get_ylim()[0] < min(accuracies) and axes.get_ylim()[1] > 100
    height = axes.transData.transform([(0, value) for value in (98, 99, 99.5, 99.8)])[:, 1]
    steps = np.diff(height)  # the error is halved twice, then less: the steps are of similar size
    assert 0 < steps.min() and steps.max() < 1.5 * steps.min() and 100 in axes.get_yticks()


def test_sample_data_is_what_enters_the_model(samples, monkeypatch):
    letters = {i: "abcdefghij"[i] for i in reversed(range(10))}
    monkeypatch.setattr(DATA, "classes", letters)
    colour = torch.rand(5, 3, 32, 30)
    for loader, names in ((LOADER, letters), ([(colour, torch.arange(5)[:, None])], range(5))):
        axes, (images, labels) = plot("sample_data", loader), next(iter(loader))
        assert image_titles(axes) == [str(names[label]) for label in labels.flatten().tolist()]
        expected = (images - images.min()) / (images.max() - images.min())  # one scale for all
        expected, shown = expected[4].movedim(0, 2).squeeze(), axes[4].images[0]
        np.testing.assert_allclose(shown.get_array(), expected, atol=1e-6)
        assert shown.get_clim() == (0, 1)
    assert image_titles(plot("sample_data", [(colour[:2], ("cat", "dog"))])) == ["cat", "dog"]
    random = utils.BatchLoader(DATA, 64, shuffle=True, augment=utils.RandomAffine(7))
    for loader in (random, DataLoader(samples, 64, shuffle=True)):
        state = torch.get_rng_state()
        assert len(image_titles(plot("sample_data", loader))) == 24
        assert torch.equal(torch.get_rng_state(), state)


def test_the_most_confident_mistakes_come_first():
    axes = plot("misclassified")
    expected = [f"{TARGETS[i]} → {PREDICTIONS[i]}, {p} %" for i, p in ((20, 90), (10, 80), (0, 70))]
    assert image_titles(axes) == expected
    shown = axes[0].images[0].get_array()
    assert np.corrcoef(shown.ravel(), DATA.data[20].ravel())[0, 1] > 0.999
    arrays = DATA.data[:30].numpy(), PREDICTIONS, PROBABILITIES.numpy(), TARGETS.numpy()
    assert image_titles(plot("misclassified", *arrays, dict(enumerate(DATA.classes)))) == expected
    images, _, *others = INPUT["misclassified"]
    assert len(image_titles(plot("misclassified", images, (TARGETS + 1) % 10, *others))) == 24
    assert image_titles(plot("misclassified", images, TARGETS, *others)) == []
    with pytest.raises(ValueError, match=r"expected images and what .*\[360, 30, 30, 30\]"):
        plot("misclassified", DATA.data, PREDICTIONS, *others)


@pytest.mark.parametrize("classes", [DATA.classes, dict(enumerate(datasets.FashionMNIST.classes))])
def test_prediction_shows_image_and_probabilities(classes):
    left, middle, right = plot("prediction", *INPUT["prediction"][:3], classes)
    shown = left.images[0].get_array()
    assert shown.shape == (200, 200) and shown.min() < 10 and 254 < shown[:20].min()
    assert shown.max() == 255  # white paper is white, although resampling overshoots
    np.testing.assert_array_equal(middle.images[0].get_array(), MODEL_INPUT)
    widths = [bar.get_width() for bar in right.patches]
    np.testing.assert_allclose(widths, 100 * PROBABILITIES[0])
    assert [text.get_text() for text in right.texts].count("70 %") == 1
    assert [text.get_text() for text in right.get_yticklabels()] == [classes[i] for i in range(10)]
