import base64
import io
import os
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from IPython.core.formatters import DisplayFormatter
from PIL import Image, ImageDraw

import utils
from model import Net

CLASSES = utils.load_data("digits")[0].classes
SEVEN = [[(60, 60), (210, 60)], [(210, 60), (140, 230)]]
TWO_ONES = [[(80, 60), (80, 220)], [(200, 60), (200, 220)]]


class SureOfSeven(nn.Module):
    """A model that gives the 7 a probability of 98 % for any image."""

    def forward(self, images):
        probabilities = torch.full((len(images), 10), 0.02 / 9)
        probabilities[:, 7] = 0.98
        return probabilities.log()


@pytest.fixture
def pad():
    return utils.drawing_pad(SureOfSeven(), CLASSES)


def draw(strokes):
    """Return a drawing as a browser sends it: a PNG (280, 280) with transparency, as a data URL."""
    image = Image.new("RGBA", (280, 280), "white")
    for stroke in strokes:
        ImageDraw.Draw(image).line(stroke, "black", width=14)
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def test_the_pad_answers_each_drawing(pad):
    assert pad.answer == "Draw a digit."
    pad.drawing = draw(SEVEN)
    assert pad.answer == "7 - seven (98%)"
    pad.drawing = draw(TWO_ONES)
    assert "several digits" in pad.answer
    pad.drawing = draw([])
    assert "no ink" in pad.answer
    pad.drawing = ""  # cleared
    assert pad.answer == "Draw a digit."


def test_viewers_without_widgets_show_a_sentence(pad):
    data, _ = DisplayFormatter().format(pad)
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == "Drawing pad: run this cell in Jupyter to draw a digit."


def test_utils_is_imported_without_the_widget_library():
    code = "import sys; sys.modules['anywidget'] = sys.modules['traitlets'] = None; import utils"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif("BROWSER" not in os.environ, reason="BROWSER does not name a Chromium")
def test_a_digit_drawn_in_jupyterlab_is_recognised(mnist_root, tmp_path):
    """With the mouse, by a Net trained on 10,000 images; needs playwright."""
    from playwright.sync_api import sync_playwright

    utils.set_seed(0)
    train_data = torch.utils.data.Subset(utils.load_data("MNIST", mnist_root)[0], range(10_000))
    loader, model = utils.BatchLoader(train_data, 100, shuffle=True), Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    utils.train(model, "cpu", loader, optimizer, F.nll_loss, progress=False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    source = f"""\
import torch
from model import Net
from utils import drawing_pad
model = Net()
model.load_state_dict(torch.load("model.pt"))
drawing_pad(model, {CLASSES})"""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(notebook, tmp_path / "pad.ipynb")

    address = "http://localhost:8765/lab/tree/pad.ipynb"
    options = ["--no-browser", "--allow-root", "--port=8765", "--IdentityProvider.token="]
    lab = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        for _ in range(60):
            try:
                urlopen(address)
                break
            except URLError:
                time.sleep(1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=os.environ["BROWSER"], args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.goto(address)
            page.get_by_text("| Idle").wait_for(timeout=120_000)  # the kernel has started
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            canvas = page.locator("canvas[width='280']")
            canvas.wait_for(timeout=120_000)
            canvas.scroll_into_view_if_needed()
            page.wait_for_timeout(1000)
            box = canvas.bounding_box()
            for stroke in SEVEN:
                start, end = [(box["x"] + x, box["y"] + y) for x, y in stroke]
                page.mouse.move(*start)
                page.mouse.down()
                page.mouse.move(*end, steps=20)
                page.mouse.up()
                page.wait_for_timeout(500)
            page.locator("output", has_text="7 - seven (").wait_for(timeout=20_000)
            page.screenshot(path=os.environ.get("SCREENSHOT", tmp_path / "screenshot.png"))
            page.get_by_role("button", name="Clear").click()
            page.locator("output", has_text="Draw a digit.").wait_for(timeout=20_000)
            browser.close()
    finally:
        lab.terminate()
        lab.wait()
