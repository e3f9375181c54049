import base64
import io

import nbformat
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image, ImageDraw

SEVEN = [(60, 60), (210, 60)], [(210, 60), (140, 230)]  # strokes on 320×320 pixels
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


def test_the_pad_answers_with_a_picture_or_says_why_it_does_not():
    drawings = [f"pad.children[0].drawing = {png(*strokes)!r}" for strokes in (SEVEN, ())]
    show = "assert model.training; pad.children[1].outputs"
    sources = [PAD, drawings[0], show, drawings[1], show]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, sources)])
    client = NotebookClient(notebook, resources={"metadata": {"path": ROOT}})
    with client.setup_kernel():
        client.kc.allow_stdin = True  # as in a notebook that is open
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    shown = [[output.get("data") for output in cell.outputs] for cell in notebook.cells]
    assert "application/vnd.jupyter.widget-view+json" in shown[0][0]
    assert "image/png" in shown[2][0]["text/plain"]
    assert "found no digit in the image" in shown[4][0]["text/plain"]
