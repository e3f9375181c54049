import base64
import contextlib
import io
import os
import runpy
import subprocess
import sys

import nbformat
import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from IPython.core.formatters import DisplayFormatter
from PIL import Image, ImageDraw

import utils

CLASSES = utils.load_data("digits")[0].classes
SEVEN = [(60, 60), (210, 60)], [(210, 60), (140, 230)]  # strokes on 280×280 pixels
TWO_ONES = [(80, 60), (80, 220)], [(200, 60), (200, 220)]


class SureOfSeven(nn.Module):
    """A model that gives the 7 a probability of 98 %, whatever the image."""

    def forward(self, images):
        probabilities = torch.full((len(images), 10), 0.02 / 9)
        probabilities[:, 7] = 0.98
        return probabilities.log()


def draw(*strokes):
    """Return a drawing as a browser sends it: a PNG with an alpha channel, as a data URL."""
    image = Image.new("RGBA", (280, 280), "white")
    for stroke in strokes:
        ImageDraw.Draw(image).line(stroke, "black", width=14)
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def test_the_pad_answers_each_drawing():
    pad = utils.drawing_pad(SureOfSeven(), CLASSES)
    assert pad.answer == "Draw a digit."
    pad.drawing = draw(*SEVEN)
    assert pad.answer == "7 - seven (98%)"
    pad.drawing = draw(*TWO_ONES)
    assert "several digits" in pad.answer
    pad.drawing = draw()
    assert "no ink" in pad.answer
    pad.drawing = ""  # cleared
    assert pad.answer == "Draw a digit."


def test_a_viewer_without_widgets_shows_a_sentence():
    pad = utils.drawing_pad(SureOfSeven(), CLASSES)
    data, _ = DisplayFormatter().format(pad)  # what a notebook stores of it
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == "Drawing pad: run this cell in Jupyter to draw a digit."


def test_only_the_pad_needs_the_widget_library(monkeypatch):
    for name in ("anywidget", "traitlets"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    names = runpy.run_path(str(ROOT / "utils.py"))
    with pytest.raises(ModuleNotFoundError, match="anywidget"):
        names["drawing_pad"](SureOfSeven(), CLASSES)


CELL = """\
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
utils.drawing_pad(model, train_data.classes)"""


@pytest.mark.skipif("BROWSER" not in os.environ, reason="BROWSER does not name a Chromium")
def test_a_seven_drawn_in_jupyterlab_is_recognised(mnist_root, tmp_path, monkeypatch):
    """Draws with the mouse; needs playwright."""
    from playwright.sync_api import Error, sync_playwright

    monkeypatch.setenv("DATA_DIR", str(mnist_root))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
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
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            canvas = page.locator("canvas[width='280']")
            canvas.wait_for(timeout=120_000)
            box = canvas.bounding_box()
            for stroke in SEVEN:
                start, end = [(box["x"] + x, box["y"] + y) for x, y in stroke]
                page.mouse.move(*start)
                page.mouse.down()
                page.mouse.move(*end, steps=20)
                page.mouse.up()
            page.locator("output", has_text="7 - seven (").wait_for()
            page.get_by_role("button", name="Clear").click()
            page.locator("output", has_text="Draw a digit.").wait_for()
            browser.close()
    finally:
        lab.terminate()
        lab.wait()
