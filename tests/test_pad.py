import base64
import io

import pytest
from conftest import ROOT
from handwriting import SEVEN, sheet
from jupyter_client.manager import run_kernel

SET_UP = """\
import utils
from model import Net
model = Net().train()
pad = utils.drawing_pad(model, list("0123456789"))
pad"""


def draw(strokes):
    """Return code that sets the pad's drawing as a browser does: to a PNG, as a data URL."""
    buffer = io.BytesIO()
    sheet(strokes, 7, 320).convert("RGBA").save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    return f"pad.children[0].drawing = 'data:image/png;base64,{png}'"


@pytest.mark.slow
def test_the_pad_answers_with_a_picture_or_says_why_it_does_not():
    messages = []
    options = {"allow_stdin": True, "timeout": 120, "output_hook": messages.append}  # as if open
    with run_kernel(cwd=ROOT) as client:  # nbclient sometimes waits forever for a widget's output
        for code in (SET_UP, draw(SEVEN), draw([]), "assert model.training"):
            assert client.execute_interactive(code, **options)["content"]["status"] == "ok"
    shown, captured_by = [], ""
    for content in (message["content"] for message in messages):
        captured_by = content.get("data", {}).get("state", {}).get("msg_id", captured_by)
        if content.get("name") != "stderr" and {"text", "metadata"} & content.keys():
            shown.append((content, captured_by != ""))
    (view, view_captured), (picture, picture_captured), (text, text_captured) = shown
    assert "application/vnd.jupyter.widget-view+json" in view["data"]
    assert "image/png" in picture["data"] and "found no digit in the image" in text["text"]
    assert not view_captured and picture_captured and text_captured  # they appear below the pad
