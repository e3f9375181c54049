import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image
from torch.utils.data import DataLoader, Subset

import utils

DATA = utils.load_data("digits")[1]
CURVES = ([0.5, 0.25], [90.0, 95.5], [0.4, 0.125], [91.0, 96.25])
LOADER = utils.BatchLoader(Subset(DATA, range(30)), 8)
# Of these 30 digits every tenth is taken for another one, with more and more confidence.
TARGETS = LOADER.targets
PREDICTIONS = torch.where(torch.arange(30) % 10 == 0, (TARGETS + 1) % 10, TARGETS)
PROBABILITIES = torch.full((30, 10), 0.01)
PROBABILITIES[range(30), PREDICTIONS] = 0.6
PROBABILITIES[range(0, 30, 10), PREDICTIONS[::10]] = torch.tensor([0.7, 0.8, 0.9])
PHOTO = Image.fromarray(255 - DATA.data[0].numpy())
PREPARED = DATA.data[0].numpy()
EACH = {
    "train_metrics": CURVES,
    "sample_data": (LOADER,),
    "misclassified": (LOADER, PREDICTIONS, PROBABILITIES, TARGETS),
    "confusion_matrix": (PREDICTIONS, TARGETS, DATA.classes),
    "prediction": (PHOTO, PROBABILITIES[0], PREPARED, DATA.classes),
}


@pytest.fixture(autouse=True)
def figures():
    plt.switch_backend("agg")
    plt.close("all")
    yield
    plt.close("all")


def is_blank(path):
    return np.ptp(np.asarray(Image.open(path).convert("L"))) == 0


def image_titles():
    return [axes.get_title() for axes in plt.gcf().axes if axes.images]


@pytest.mark.parametrize("name", EACH)
def test_the_figure_is_pyplots_current_one(name, tmp_path):
    plt.figure()
    assert getattr(utils, f"plot_{name}")(*EACH[name], title="it") is None
    assert plt.get_fignums() == [1, 2] and plt.gcf().number == 2
    assert plt.gcf().get_suptitle() == "it"
    plt.savefig(tmp_path / "it.png")
    assert not is_blank(tmp_path / "it.png")


def test_a_notebook_shows_each_figure_once(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # else not the notebook's
    call = "plot_train_metrics([1], [2], [3], [4])"
    expected = {
        call: 1,
        f"{call}\nnumber = 1": 1,
        f"{call}\n{call}": 2,
        f"for _ in range(3):\n    {call}": 3,
        f"{call}\nplt.show()": 1,
        f"{call}\nplt.savefig(r'{tmp_path / 'it.png'}')": 1,
    }
    setup = "import matplotlib.pyplot as plt\nfrom utils import plot_train_metrics"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in (setup, *expected)]
    )
    NotebookClient(notebook, resources={"metadata": {"path": ROOT}}).execute()
    for cell, count in zip(notebook.cells[1:], expected.values(), strict=True):
        assert ["image/png" in output.get("data", {}) for output in cell.outputs] == [True] * count
    assert not is_blank(tmp_path / "it.png")


def test_plot_train_metrics():
    utils.plot_train_metrics(*CURVES)
    loss, accuracy = plt.gcf().axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy (%)")
    for axes, curves, labels in (
        (loss, CURVES[::2], ["train 0.2500", "test 0.1250"]),
        (accuracy, CURVES[1::2], ["train 95.50 %", "test 96.25 %"]),
    ):
        assert axes.get_xlabel() == "epoch"
        assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
        for line, curve in zip(axes.lines, curves, strict=True):
            assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == curve


@pytest.mark.parametrize(
    "losses, ticks", [((2.0, 0.04), {"1", "0.5", "0.05"}), ((1.01, 1.24), {"1.05", "1.1", "1.2"})]
)
def test_the_loss_axis_has_readable_ticks(losses, ticks):
    utils.plot_train_metrics(losses, (90, 91), losses, (90, 91))
    axes = plt.gcf().axes[0]
    low, high = axes.get_ylim()
    labels = {
        label.get_text()
        for label in axes.get_yticklabels(which="both")
        if low <= label.get_position()[1] <= high
    }
    assert axes.get_yscale() == "log" and ticks <= labels


def test_plot_sample_data_shows_what_enters_the_model():
    utils.plot_sample_data(LOADER)
    images, labels = next(iter(LOADER))
    assert image_titles() == [DATA.classes[label] for label in labels]
    shown = plt.gcf().axes[5].images[0]
    np.testing.assert_array_equal(shown.get_array(), images[5, 0])
    assert shown.get_clim() == (images.min(), images.max())  # the same grey for all


def test_plot_sample_data_takes_any_loader(samples):
    state = torch.get_rng_state()
    utils.plot_sample_data(DataLoader(samples, 5))
    assert image_titles() == list("01234")
    utils.plot_sample_data(DataLoader(samples, 64, shuffle=True))
    assert len(image_titles()) == 24
    assert torch.equal(torch.get_rng_state(), state)


def test_plot_misclassified_shows_the_most_confident_mistakes_first():
    utils.plot_misclassified(LOADER, PREDICTIONS, PROBABILITIES, TARGETS)
    assert image_titles() == [
        f"{DATA.classes[TARGETS[i]]}\n→ {DATA.classes[PREDICTIONS[i]]}, {percent} %"
        for i, percent in ((20, 90), (10, 80), (0, 70))
    ]
    images = torch.cat([images for images, _ in LOADER])
    np.testing.assert_array_equal(plt.gcf().axes[0].images[0].get_array(), images[20, 0])
    utils.plot_misclassified(LOADER, TARGETS, PROBABILITIES, TARGETS)
    assert image_titles() == [] and plt.gcf().texts[0].get_text() == "none"
    utils.plot_misclassified(LOADER, (TARGETS + 1) % 10, PROBABILITIES, TARGETS)
    assert len(image_titles()) == 24


def test_plot_confusion_matrix_colours_only_the_errors():
    utils.plot_confusion_matrix(PREDICTIONS, TARGETS, DATA.classes)
    (axes,) = plt.gcf().axes
    counts = np.array([int(text.get_text() or 0) for text in axes.texts]).reshape(10, 10)
    expected = np.zeros((10, 10))
    for target, prediction in zip(TARGETS, PREDICTIONS, strict=True):
        expected[target, prediction] += 1
    np.testing.assert_array_equal(counts, expected)
    np.fill_diagonal(expected, 0)
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [label.get_text() for label in axes.get_xticklabels()] == DATA.classes


@pytest.mark.parametrize("classes", [None, DATA.classes])
def test_plot_prediction_shows_image_and_probabilities(classes):
    utils.plot_prediction(PHOTO, PROBABILITIES[0], PREPARED, classes)
    left, middle, right = plt.gcf().axes
    np.testing.assert_allclose(left.images[0].get_array(), 1 - PREPARED / 255, atol=0.01)
    np.testing.assert_array_equal(middle.images[0].get_array(), PREPARED)
    heights = [bar.get_height() for bar in right.patches]
    np.testing.assert_allclose(heights, 100 * PROBABILITIES[0])
    names = [label.get_text() for label in right.get_xticklabels()]
    assert names == (classes or list("0123456789"))


SHUFFLED = utils.BatchLoader(Subset(DATA, range(30)), 8, shuffle=True)
COLOUR = [(torch.zeros(30, 3, 28, 28), TARGETS)]


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("train_metrics", ([], [], [], []), "entry per epoch"),
        ("train_metrics", ([1.0], [1.0], [1.0], [1.0, 2.0]), "entry per epoch"),
        ("sample_data", (COLOUR,), r"\(N, 1, H, W\)"),
        ("misclassified", (SHUFFLED, *EACH["misclassified"][1:]), "does not shuffle"),
        ("misclassified", (COLOUR, *EACH["misclassified"][1:]), r"\(N, 1, H, W\)"),
        ("confusion_matrix", (PREDICTIONS, TARGETS, DATA.classes[:5]), "from 0 to 4"),
        ("confusion_matrix", (PREDICTIONS[:5], TARGETS, DATA.classes), "inconsistent"),
        ("prediction", (*EACH["prediction"][:3], DATA.classes[:5]), "10 names of classes, got 5"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_drawn(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        getattr(utils, f"plot_{name}")(*wrong)
    assert plt.get_fignums() == []
