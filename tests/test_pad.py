import base64
import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from types import SimpleNamespace

import handwriting
import nbformat
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from IPython.core.formatters import DisplayFormatter
from PIL import Image, ImageDraw

import utils

CLASSES = utils.load_data("digits")[0].classes
SEVEN = [(60, 60), (210, 60)], [(210, 60), (140, 230)]  # strokes on 320×320 pixels
TWO_ONES = [(80, 60), (80, 220)], [(200, 60), (200, 220)]
WIDGET = "application/vnd.jupyter.widget-view+json"


class Constant(nn.Module):
    """A model that gives the 7 this probability, whatever the image."""

    def __init__(self, probability):
        super().__init__()
        self.probabilities = torch.full((1, 10), (1 - probability) / 9)
        self.probabilities[:, 7] = probability

    def forward(self, images):
        return self.probabilities.log()


def draw(*strokes, width=7):
    """Return a drawing as a browser sends it: a PNG with an alpha channel, as a data URL."""
    image = Image.new("RGBA", (320, 320), "white")
    for stroke in strokes:
        ImageDraw.Draw(image).line(stroke, "black", width)
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def answer(pad, *strokes, **options):
    """Send a drawing and return the answer's text."""
    number = pad.drawing["number"] + 1
    pad.drawing = {"url": draw(*strokes, **options), "number": number}
    assert pad.answer["number"] == number  # so that the browser knows what was answered
    return pad.answer["text"]


def test_the_pad_answers_each_drawing():
    pad = utils.drawing_pad(Constant(0.995), CLASSES)
    assert answer(pad, *SEVEN) == "7 - seven (100 %)"
    assert pad.answer["percent"] == [0] * 7 + [100, 0, 0]
    png = base64.b64decode(pad.answer["prepared"].removeprefix("data:image/png;base64,"))
    prepared = np.asarray(Image.open(io.BytesIO(png)))
    assert prepared.shape == (28, 28) and prepared.max() == 255
    assert answer(pad, *TWO_ONES).startswith("Found no single digit")
    assert "prepared" not in pad.answer and "percent" not in pad.answer
    for dot in (draw([(90, 90), (96, 90)]), draw()):
        pad.drawing = {"url": dot, "number": 0}
        assert pad.answer["text"] == "This is only a dot: draw a digit."
    small = [(250, 20), (280, 20)], [(280, 20), (262, 60)]
    assert answer(pad, *small) == "7 - seven (100 %)"
    doubtful = utils.drawing_pad(Constant(0.98), CLASSES)
    expected = "Not sure: perhaps 7 - seven, perhaps no digit."
    assert answer(doubtful, *SEVEN) == expected


def test_an_error_is_shown_on_the_pad():
    pad = utils.drawing_pad(Constant(float("nan")), CLASSES)
    assert answer(pad, *SEVEN).startswith("FloatingPointError: the model's output is nan")


def test_the_pad_leaves_a_model_in_training_alone():
    model = nn.Sequential(Constant(0.995), nn.Dropout())
    pad = utils.drawing_pad(model.train(), CLASSES)
    assert answer(pad, *SEVEN) == "7 - seven (100 %)" and model.training and model[1].training


@pytest.mark.parametrize("viewer", ["JupyterLab", "Colab", "VS Code", "papermill"])
def test_what_a_notebook_keeps_of_the_pad_is_a_sentence(monkeypatch, viewer):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if viewer != "papermill":
        monkeypatch.setenv("JPY_SESSION_NAME", "S5.ipynb")
    if viewer == "Colab":
        monkeypatch.setitem(sys.modules, "google.colab", None)
    names = {"__vsc_ipynb_file__": "S5.ipynb"} if viewer == "VS Code" else {}
    monkeypatch.setattr(utils, "_shell", lambda: SimpleNamespace(user_ns=names))
    monkeypatch.setattr(utils, "_is_watched", lambda: viewer != "papermill")
    pad = utils.drawing_pad(Constant(0.995), CLASSES)
    data, _ = DisplayFormatter().format(pad)
    sentence = "Drawing pad: run all cells in Jupyter or Colab to draw a digit here."
    assert data.pop("text/plain") == sentence
    if viewer == "JupyterLab":  # the pad looks for this element; a saved widget would be an error
        assert data == {"text/html": f'<div id="{pad.place}">{sentence}</div>'}
    else:
        assert list(data) == [WIDGET] * (viewer != "papermill")


def test_only_the_pad_needs_the_widget_library(monkeypatch):
    for name in ("anywidget", "traitlets"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    names = runpy.run_path(str(ROOT / "utils.py"))
    with pytest.raises(ModuleNotFoundError, match="anywidget"):
        names["drawing_pad"](Constant(0.995), CLASSES)


CELLS = (
    """\
import os
from pathlib import Path

import torch
import utils
from model import Net

utils.set_seed(0)
train_data, _ = utils.load_data("MNIST")
part = torch.utils.data.Subset(train_data, range(10_000))
loader = utils.BatchLoader(part, 100, shuffle=True)
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
utils.train(model, "cpu", loader, optimizer, torch.nn.functional.nll_loss, progress=False)
Path("pid").write_text(str(os.getpid()))""",
    "utils.drawing_pad(model, train_data.classes)",
)


NO_ANSWER = "No answer: the kernel is busy, or it was restarted."


@pytest.fixture
def page(mnist_root, tmp_path, monkeypatch):
    """A browser's page with a notebook of two cells in JupyterLab, all of them run."""
    from playwright.sync_api import Error, sync_playwright

    monkeypatch.setenv("DATA_DIR", str(mnist_root))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "pad.ipynb")
    options = ["--no-browser", "--allow-root", "--port=8765", "--IdentityProvider.token="]
    lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=tmp_path)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=os.environ["BROWSER"], args=["--no-sandbox"]
            )
            page = browser.new_page()
            for _ in range(60):
                with contextlib.suppress(Error):  # while the server is still starting
                    page.goto("http://localhost:8765/lab/tree/pad.ipynb")
                    break
                page.wait_for_timeout(1000)
            page.get_by_text("| Idle").wait_for(timeout=120_000)  # so is the kernel
            choose(page, "Run", "Run All Cells")
            page.locator("canvas").wait_for(timeout=120_000)
            page.get_by_text("| Idle").wait_for(timeout=60_000)
            yield page
            browser.close()
    finally:
        lab.terminate()
        lab.wait()


def choose(page, menu, item):
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()


def draw_with_the_mouse(page, *strokes):
    page.locator("canvas").scroll_into_view_if_needed()
    box = page.locator("canvas").bounding_box()
    for stroke in strokes:
        start, end = [(box["x"] + x, box["y"] + y) for x, y in stroke]
        page.mouse.move(*start)
        page.mouse.down()
        page.mouse.move(*end, steps=20)
        page.mouse.up()


def ink(page):
    """Count the dark pixels of the pad."""
    return page.locator("canvas").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, 320, 320).data"
        ".filter((value, i) => i % 4 == 0 && value < 128).length"
    )


@pytest.mark.skipif("BROWSER" not in os.environ, reason="BROWSER does not name a Chromium")
def test_the_pad_in_jupyterlab(page, tmp_path):
    """Needs playwright, and a Chromium or Chrome that BROWSER names."""

    def expect(text, timeout=10_000):
        page.locator("output", has_text=text).wait_for(timeout=timeout)

    def clear():
        page.get_by_role("button", name="Clear").click()
        expect("Draw a digit")
        assert ink(page) == 0

    expect("Draw a digit")
    draw_with_the_mouse(page, *SEVEN)
    expect("7 - seven (")
    assert page.locator("img[src^='data:image/png']").bounding_box()["width"] > 100
    bar = page.locator("tr", has_text="7 - seven").locator("meter")
    assert bar.evaluate("meter => meter.value") > 50
    clear()
    photo = handwriting.photo(7, np.random.default_rng(0), "grey paper")
    photo.resize((4 * photo.width, 4 * photo.height)).save(tmp_path / "photo.jpg")
    page.locator("input[type=file]").set_input_files(tmp_path / "photo.jpg")
    expect("7 - seven (")
    assert ink(page) > 100
    (tmp_path / "text.png").write_text("no image")
    page.locator("input[type=file]").set_input_files(tmp_path / "text.png")
    expect("This file is no image")
    clear()
    draw_with_the_mouse(page, [(100, 100), (100, 100)])
    assert 10 < ink(page) < 100
    expect("only a dot")
    clear()
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + 400, box["y"] + 50)  # a stroke that begins outside
    page.mouse.down()
    page.mouse.move(box["x"] + 50, box["y"] + 50, steps=10)
    page.mouse.up()
    assert ink(page) == 0

    draw_with_the_mouse(page, *SEVEN)  # is still there when the page is loaded again
    expect("7 - seven (")
    before = ink(page)
    page.keyboard.press("Control+s")
    page.wait_for_timeout(2000)
    page.reload()
    page.locator("canvas").wait_for(timeout=60_000)
    expect("7 - seven (")
    assert ink(page) == before > 1000

    kernel = int((tmp_path / "pid").read_text())
    os.kill(kernel, signal.SIGSTOP)  # a busy kernel; JupyterLab sees no difference
    try:
        clear()
        draw_with_the_mouse(page, *SEVEN)
        expect("…")
        expect(NO_ANSWER)
    finally:
        os.kill(kernel, signal.SIGCONT)
    expect("7 - seven (")

    choose(page, "Kernel", "Restart Kernel…")  # a kernel that is gone
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    page.wait_for_timeout(3000)
    clear()
    draw_with_the_mouse(page, *SEVEN)
    expect(NO_ANSWER)
    clear()
    page.keyboard.press("Control+s")
    page.wait_for_timeout(2000)
    page.reload()
    page.get_by_text("Drawing pad: run all cells").wait_for(timeout=60_000)
    assert page.locator("canvas").count() == 0
    assert "widgets" not in nbformat.read(tmp_path / "pad.ipynb", as_version=4).metadata
