import base64
import contextlib
import io
import os
import subprocess
import sys

import handwriting
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image, ImageDraw

SEVEN = [(60, 60), (210, 60)], [(210, 60), (140, 230)]  # strokes on 320×320 pixels
SENTENCE = "Drawing pad: run all cells in Jupyter or Colab to draw a digit here."
CELLS = [
    f"""\
import torch, utils
from model import Net
model = Net()
model.load_state_dict(torch.load({str(ROOT / ".assets" / "model.pt")!r}, weights_only=True))
model.train()
pad = utils.drawing_pad(model, list("0123456789"))
pad""",
    "pad.children[0].drawing = '{}'; assert model.training",
    "pad.children[1].outputs",
]


def png(*strokes):
    """Return a drawing as a browser sends it: a PNG with an alpha channel, as a data URL."""
    image = Image.new("RGBA", (320, 320), "white")
    for stroke in strokes:
        ImageDraw.Draw(image).line(stroke, "black", 7)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def answer(*strokes):
    """Send a drawing to the pad and return what it then shows: text or the kinds of a picture."""
    sources = [CELLS[0], CELLS[1].replace("{}", png(*strokes)), CELLS[2]]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, sources)])
    client = NotebookClient(notebook, resources={"metadata": {"path": ROOT}})
    with client.setup_kernel():
        client.kc.allow_stdin = True  # as in a notebook that is open
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    assert "application/vnd.jupyter.widget-view+json" in notebook.cells[0].outputs[0].data
    return notebook.cells[2].outputs[0].data["text/plain"]


def test_the_pad_answers_a_drawing_with_a_picture():
    assert "image/png" in answer(*SEVEN)


def test_the_pad_says_why_it_does_not_answer():
    assert "found no ink in the image" in answer()


def test_where_nobody_can_draw_there_is_a_sentence_and_no_widget():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELLS[0])])
    NotebookClient(notebook, resources={"metadata": {"path": ROOT}}).execute()
    assert [output.text for output in notebook.cells[0].outputs] == [SENTENCE + "\n"]
    assert "widgets" not in notebook.metadata


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A browser's page with the pad in JupyterLab."""
    from playwright.sync_api import Error, sync_playwright

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELLS[0])])
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
            page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
            page.locator("canvas").wait_for(timeout=120_000)
            yield page
            browser.close()
    finally:
        lab.terminate()
        lab.wait()


def ink(page):
    """Count the dark pixels of the pad."""
    return page.locator("canvas").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
        ".filter((value, i) => i % 4 == 0 && value < 128).length"
    )


def drag(page, start, end):
    """Draw with the mouse; the points are given from the canvas's corner."""
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + start[0], box["y"] + start[1])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0], box["y"] + end[1], steps=20)
    page.mouse.up()


@pytest.mark.skipif("BROWSER" not in os.environ, reason="BROWSER does not name a Chromium")
def test_the_pad_in_jupyterlab(page, tmp_path):
    """Needs playwright, and a Chromium or Chrome that BROWSER names."""
    answers = page.locator(".jp-OutputArea img")
    drag(page, (400, 50), (50, 50))  # a stroke that begins outside
    assert ink(page) == 0
    for stroke in SEVEN:
        drag(page, *stroke)
    assert ink(page) > 1000
    answers.first.wait_for(timeout=30_000)
    page.get_by_role("button", name="Clear").click()
    assert ink(page) == 0
    first = answers.first.get_attribute("src")
    image = handwriting.photo(5, np.random.default_rng(0), "grey paper").resize((1600, 900))
    image.save(tmp_path / "photo.jpg")
    page.locator("input[type=file]").set_input_files(tmp_path / "photo.jpg")
    page.wait_for_function(
        "first => document.querySelector('.jp-OutputArea img').src != first", arg=first
    )
    size = page.locator("canvas").evaluate("c => [c.width, c.height]")
    assert size == [320, 180] and answers.count() == 1
