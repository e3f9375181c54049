import warnings

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import datasets

import utils

DATA = utils.load_data("digits")[1]
LOADER = utils.BatchLoader(Subset(DATA, range(30)), 8)
TARGETS, WRONG = LOADER.targets, [20, 10, 0]  # the most confident mistake first
PREDICTIONS, PROBABILITIES = TARGETS.clone(), torch.full((30, 10), 0.01)
PREDICTIONS[WRONG] = (TARGETS[WRONG] + 1) % 10
PROBABILITIES[range(30), PREDICTIONS] = 0.6
PROBABILITIES[WRONG, PREDICTIONS[WRONG]] = torch.tensor([0.9, 0.8, 0.7])
PREPARED = DATA.data[0].numpy()
INPUT = {  # of each function
    "train_metrics": ([0.5, 0.25], [90, 95.5], [0.4, 0.125], [91, 96.25]),
    "sample_data": (LOADER,),
    "misclassified": (LOADER, PREDICTIONS, PROBABILITIES, TARGETS),
    "confusion_matrix": (PREDICTIONS, TARGETS, DATA.classes),
    "prediction": (Image.fromarray(255 - PREPARED), PROBABILITIES[0], PREPARED, DATA.classes),
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


def is_blank(path):
    return np.ptp(np.asarray(Image.open(path).convert("L"))) == 0


@pytest.mark.parametrize("name", INPUT)
def test_a_figure_is_left_open_to_be_saved(name, tmp_path):
    plt.figure()  # of the user's own
    getattr(utils, f"plot_{name}")(*INPUT[name], title="it")
    assert plt.get_fignums() == [1, 2] and plt.gcf().number == 2
    assert plt.gcf().get_suptitle() == "it"
    plt.savefig(tmp_path / "it.png")
    assert not is_blank(tmp_path / "it.png")


def test_a_notebook_shows_each_figure_once(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    call = "plot_train_metrics([1], [2], [3], [4])"
    pictures = {
        "import matplotlib.pyplot as plt\nfrom utils import plot_train_metrics": 0,
        call: 1,
        f"{call}\nnumber = 1": 1,
        f"{call}\n{call}": 2,
        f"for _ in range(2):\n    {call}": 2,
        f"{call}\nplt.show()": 1,
        f"{call}\nplt.savefig({str(tmp_path / 'it.png')!r})": 1,
    }
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, pictures)])
    NotebookClient(notebook, resources={"metadata": {"path": ROOT}}).execute()
    for cell, count in zip(notebook.cells, pictures.values(), strict=True):
        assert ["image/png" in output.get("data", {}) for output in cell.outputs] == [True] * count
    assert not is_blank(tmp_path / "it.png")


def test_train_metrics():
    loss_axes, error_axes = plot("train_metrics")
    for axes, name, expected in (
        (loss_axes, "loss", {"train 0.2500": [0.5, 0.25], "test 0.1250": [0.4, 0.125]}),
        (error_axes, "error (%)", {"train 4.50 %": [10, 4.5], "test 3.75 %": [9, 3.75]}),
    ):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", name)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(expected)
        curves = [line.get_xydata().T.tolist() for line in axes.lines]
        assert curves == [[[1, 2], values] for values in expected.values()]
        assert axes.get_yscale() == "log"


def test_train_metrics_with_a_floor_and_without_errors():
    with warnings.catch_warnings(action="error"):  # such as matplotlib's about log(0)
        utils.plot_train_metrics([0.6], [100], [0.55], [100], loss_floor=0.5)
        plt.gcf().canvas.draw()
    floor = plt.gcf().axes[0].lines[-1]
    assert floor.get_label() == "floor 0.5000" and set(floor.get_ydata()) == {0.5}


@pytest.mark.parametrize(
    "losses, expected",
    [((2.0, 0.04), {"1", "0.5", "0.05"}), ((1.24, 1.01), {"1.05", "1.1", "1.2"})],
)
def test_the_loss_axis_has_readable_ticks(losses, expected):
    accuracies = [100 - loss for loss in losses]
    plot("train_metrics", losses, accuracies, losses, accuracies)
    for axes in plt.gcf().axes:
        check_ticks(axes, expected)


def check_ticks(axes, expected):
    low, high = axes.get_ylim()
    labels = axes.get_yticklabels(which="both")
    shown = {label.get_text() for label in labels if low <= label.get_position()[1] <= high}
    assert expected <= shown


def test_sample_data_is_what_enters_the_model(samples):
    axes, (images, labels) = plot("sample_data"), next(iter(LOADER))
    assert image_titles(axes) == [str(label) for label in labels.tolist()]  # not "7 - seven"
    np.testing.assert_array_equal(axes[5].images[0].get_array(), images[5, 0])
    state = torch.get_rng_state()
    axes = plot("sample_data", DataLoader(samples, 5))
    assert image_titles(axes) == list("01234")
    assert len({axes[index].images[0].get_clim() for index in range(5)}) == 1  # one grey scale
    assert len(image_titles(plot("sample_data", DataLoader(samples, 64, shuffle=True)))) == 24
    assert torch.equal(torch.get_rng_state(), state)


def test_the_most_confident_mistakes_come_first():
    axes = plot("misclassified")
    assert image_titles(axes) == [
        f"{TARGETS[i]} → {PREDICTIONS[i]}, {percent} %"
        for i, percent in zip(WRONG, (90, 80, 70), strict=True)
    ]
    images = torch.cat([images for images, _ in LOADER])
    np.testing.assert_array_equal(axes[0].images[0].get_array(), images[20, 0])
    axes = plot("misclassified", LOADER, (TARGETS + 1) % 10, PROBABILITIES, TARGETS)
    assert len(image_titles(axes)) == 24
    axes = plot("misclassified", LOADER, TARGETS, PROBABILITIES, TARGETS)
    assert image_titles(axes) == [] and plt.gcf().texts[0].get_text() == "none"


def test_confusion_matrix_colours_only_the_errors():
    (axes,) = plot("confusion_matrix")
    expected = np.zeros((10, 10))
    np.add.at(expected, (TARGETS, PREDICTIONS), 1)
    counts = [int(text.get_text() or 0) for text in axes.texts]
    np.testing.assert_array_equal(counts, expected.ravel())
    np.fill_diagonal(expected, 0)
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [label.get_text() for label in axes.get_xticklabels()] == list("0123456789")


LONG = datasets.FashionMNIST.classes


@pytest.mark.parametrize("classes", [DATA.classes, LONG, None])
def test_prediction_shows_image_and_probabilities(classes):
    left, middle, right = plot("prediction", *INPUT["prediction"][:3], classes)
    np.testing.assert_allclose(left.images[0].get_array(), 1 - PREPARED / 255, atol=0.01)
    np.testing.assert_array_equal(middle.images[0].get_array(), PREPARED)
    heights = [bar.get_height() for bar in right.patches]
    np.testing.assert_allclose(heights, 100 * PROBABILITIES[0])
    assert [text.get_text() for text in right.texts if text.get_text()] == ["70 %"]  # not "1 %"
    labels = right.get_xticklabels()
    assert [label.get_text() for label in labels] == (
        LONG if classes is LONG else list("0123456789")
    )
    assert labels[0].get_rotation() == (45 if classes is LONG else 0)
    assert left.spines["top"].get_visible() and left.axison  # a frame around a white image


SHUFFLED = utils.BatchLoader(Subset(DATA, range(30)), 8, shuffle=True)
COLOUR = [(torch.zeros(30, 3, 28, 28), TARGETS)]


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("train_metrics", ([], [], [], []), "entry per epoch"),
        ("train_metrics", ([1], [1], [1], [1, 2]), "entry per epoch"),
        ("sample_data", (COLOUR,), r"\(N, 1, H, W\)"),
        ("misclassified", (SHUFFLED, *INPUT["misclassified"][1:]), "does not shuffle"),
        ("confusion_matrix", (PREDICTIONS, TARGETS, DATA.classes[:5]), "from 0 to 4"),
    ],
)
def test_wrong_input_is_refused_before_a_figure_is_opened(name, values, message):
    with pytest.raises(ValueError, match=message):
        plot(name, *values)
    assert plt.get_fignums() == []
