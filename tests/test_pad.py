import base64
import io
import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image, ImageDraw

import utils

SEVEN = [(60, 60), (210, 60)], [(210, 60), (140, 230)]  # strokes on 320×320 pixels
SENTENCE = "Drawing pad: run all cells in Jupyter or Colab to draw a digit here."
PAD = """\
import utils
from model import Net
model = Net().train()
pad = utils.drawing_pad(model, list("0123456789"))
pad"""


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
    draw = f"pad.children[0].drawing = {png(*strokes)!r}; assert model.training"
    sources = [PAD, draw, "pad.children[1].outputs"]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, sources)])
    client = NotebookClient(notebook, resources={"metadata": {"path": ROOT}})
    with client.setup_kernel():
        client.kc.allow_stdin = True  # as in a notebook that is open
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    assert "application/vnd.jupyter.widget-view+json" in notebook.cells[0].outputs[0].data
    return notebook.cells[2].outputs[0].data["text/plain"]


def test_the_pad_answers_with_a_picture_or_says_why_it_does_not():
    assert "image/png" in answer(*SEVEN)
    assert "found no ink in the image" in answer()


def test_where_nobody_can_draw_there_is_a_sentence_and_no_widget():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PAD)])
    NotebookClient(notebook, resources={"metadata": {"path": ROOT}}).execute()
    assert [output.text for output in notebook.cells[0].outputs] == [SENTENCE + "\n"]
    assert "widgets" not in notebook.metadata


@pytest.mark.skipif("BROWSER" not in os.environ, reason="BROWSER does not name a Chromium")
def test_what_is_drawn_in_a_browser_is_sent(tmp_path):
    """Needs playwright, and a Chromium or Chrome that BROWSER names."""
    from playwright.sync_api import sync_playwright

    def drag(start, end):
        page.mouse.move(*start)
        page.mouse.down()
        page.mouse.move(*end, steps=20)
        page.mouse.up()

    def sent():
        """Return the size and the number of dark pixels of what was sent last, and forget it."""
        url = page.evaluate("() => { const url = sent; sent = null; return url; }")
        image = url and Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("L")
        return image and (image.size, sum(image.histogram()[:128]))

    with sync_playwright() as playwright:
        options = {"executable_path": os.environ["BROWSER"], "args": ["--no-sandbox"]}
        page = playwright.chromium.launch(**options).new_page()
        page.set_content("<style>body { margin: 0; padding: 100px }</style><div></div>")
        page.add_script_tag(
            content=utils.PAD_SCRIPT
            + """window.sent = null;
            const model = { set: (name, url) => { window.sent = url; }, save_changes: () => {} };
            render({ model, el: document.querySelector("div") });""",
            type="module",
        )
        page.locator("canvas").wait_for()
        drag((50, 50), (250, 250))  # a stroke that begins outside
        assert sent() is None
        drag((200, 150), (200, 350))
        size, ink = sent()
        assert size == (320, 320) and 1000 < ink < 2000
        page.get_by_role("button", name="Clear").click()
        drag((200, 150), (200, 160))
        assert sent()[1] < 200
        Image.new("L", (1600, 900), "black").save(tmp_path / "photo.png")
        page.locator("input[type=file]").set_input_files(tmp_path / "photo.png")
        page.wait_for_function("sent")
        assert sent() == ((320, 180), 320 * 180)
