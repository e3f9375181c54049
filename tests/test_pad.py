import base64
import io

import pytest
from conftest import ROOT
from jupyter_client.manager import run_kernel
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


@pytest.mark.slow
def test_the_pad_answers_with_a_picture_or_says_why_it_does_not():
    drawings = [f"pad.children[0].drawing = {png(*strokes)!r}" for strokes in (SEVEN, ())]
    messages = []
    options = {"allow_stdin": True, "timeout": 120, "output_hook": messages.append}  # as if open
    with run_kernel(cwd=ROOT) as client:  # nbclient sometimes waits forever for a widget's output
        for source in (PAD, *drawings, "assert model.training"):
            assert client.execute_interactive(source, **options)["content"]["status"] == "ok"
    contents = [message["content"] for message in messages]
    contents = [content for content in contents if content.get("name") != "stderr"]
    outputs = [i for i, content in enumerate(contents) if {"text", "metadata"} & content.keys()]
    view, picture, text = [contents[i] for i in outputs]
    assert "application/vnd.jupyter.widget-view+json" in view["data"]
    assert "image/png" in picture["data"] and "found no digit in the image" in text["text"]
    assert all(contents[i - 1]["data"]["state"]["msg_id"] for i in outputs[1:])  # below the pad
