import os
import subprocess
import sys

import handwriting
import nbformat
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import utils
from model import Net
from utils import predict, predict_image


def test_predict_is_in_the_loaders_order(linear, samples):
    linear.train()
    predictions, probabilities, targets = predict(linear, "cpu", DataLoader(samples, 64))
    expected = linear(torch.stack([image for image, _ in samples])).exp()
    torch.testing.assert_close(probabilities, expected)
    assert torch.equal(predictions, expected.argmax(dim=1))
    assert targets.tolist() == [label for _, label in samples]
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(250))
    assert not linear.training and not probabilities.requires_grad


def test_predict_takes_logits_and_refuses_an_empty_loader(samples):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 3))
    _, probabilities, _ = predict(
        model, "cpu", [(image[None], torch.tensor([0])) for image, _ in samples]
    )
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(250))
    with pytest.raises(ValueError, match="empty"):
        predict(model, "cpu", [])
    nn.init.constant_(model[1].bias, float("nan"))
    with pytest.raises(FloatingPointError):
        predict(model, "cpu", [(samples[0][0][None], torch.tensor([0]))])


# --- predict_image


@pytest.fixture(scope="module")
def net(mnist_root):
    """Net after one epoch on a third of MNIST."""
    utils.set_seed(0)
    train_data, _ = utils.load_data("MNIST", mnist_root)
    augment = utils.RandomAffine(degrees=7, translate=(0.07, 0.07), scale=(0.9, 1.1), shear=5)
    third = torch.utils.data.Subset(train_data, range(20_000))
    loader = utils.BatchLoader(third, 128, shuffle=True, augment=augment)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=len(loader))
    utils.train(model, "cpu", loader, optimizer, F.nll_loss, scheduler=scheduler, progress=False)
    return model


@pytest.mark.parametrize("kind", ["scan", *handwriting.KINDS])
def test_handwriting_of_each_kind_is_read(net, kind):
    right = 0
    for index in range(10):
        rng = np.random.default_rng((7, index))
        draw = handwriting.scan if kind == "scan" else handwriting.photo
        image = draw(index, rng) if kind == "scan" else draw(index, rng, kind)
        right += handwriting.read(net, image) == index
    assert right >= 8  # of ten, after so short a training


def test_digits_of_mnist_come_back_from_paper(net, mnist_root):
    train_data, _ = utils.load_data("MNIST", mnist_root)
    right = 0
    for index in range(50):
        digit, field = int(train_data.targets[index]), train_data.data[index].numpy()
        image = handwriting.photo(digit, np.random.default_rng(index), field=field)
        right += handwriting.read(net, image) == digit
    assert right >= 47


def test_digits_without_paper_come_back(net, mnist_root):
    """MNIST's own arrays, and enlarged, with a margin of a twentieth."""
    train_data, _ = utils.load_data("MNIST", mnist_root)
    raw = cut = 0
    for index in range(30):
        digit, field = int(train_data.targets[index]), train_data.data[index].numpy()
        raw += handwriting.read(net, field) == digit
        rows, columns = np.nonzero(field > 40)
        box = columns.min() - 1, rows.min() - 1, columns.max() + 2, rows.max() + 2
        large = ImageOps.scale(ImageOps.invert(Image.fromarray(field)).crop(box), 10)
        cut += handwriting.read(net, large) is not None
    assert raw >= 28 and cut == 30


def lines(points, width, side):
    """A drawing of strokes on a square sheet, points given in 0 to 1."""
    strokes = [np.array(stroke, float) * side for stroke in points]
    ink = handwriting.draw((side, side), strokes, width, None)
    return (255 * (1 - 0.9 * ink)).astype(np.uint8)


def test_hairlines_in_a_large_image(net):
    right = 0
    for digit in range(10):
        rng = np.random.default_rng((digit, 5))
        points = [(stroke / 3 + 0.5).tolist() for stroke in handwriting.strokes(digit, rng)]
        right += handwriting.read(net, lines(points, 2, 1000)) == digit
    assert right >= 8


SEVEN = [[(0.3, 0.25), (0.7, 0.25)], [(0.7, 0.25), (0.45, 0.8)]]
FRAME = [[(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9), (0.1, 0.1)]]


def test_a_frame_is_not_the_digit(net):
    assert predict_image(net, lines(SEVEN + FRAME, 8, 280))[0] == 7


def test_a_stroke_apart_belongs_to_the_digit():
    body = [(0.35, 0.28), (0.35, 0.45), (0.6, 0.45), (0.65, 0.6), (0.55, 0.75), (0.3, 0.75)]
    bar = [(0.43, 0.25), (0.7, 0.25)]
    prepared = predict_image(Same(), lines([body, bar], 8, 280))[2]
    assert prepared[:8, 17:].max() > 200


@pytest.mark.parametrize("gap", [0.05, 0.2, 0.4])
def test_two_digits_are_refused_however_near(gap):
    ones = [[(0.4, 0.25), (0.4, 0.75)], [(0.4 + gap, 0.25), (0.4 + gap, 0.75)]]
    with pytest.raises(ValueError, match="several digits"):
        predict_image(Same(), lines(ones, 6, 300))


@pytest.fixture(scope="module")
def five():
    """A dark five on light paper, 300 high and 200 wide, as an array."""
    rng = np.random.default_rng(3)
    image = handwriting.photo(5, rng, "plain").resize((200, 300))
    return np.array(image)


class Same(nn.Module):
    """Whatever comes in, gives the same log-probabilities; keeps what came in."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(10.0))

    def forward(self, images):
        self.images = images
        return self.weight.expand(len(images), 10).log_softmax(dim=1)


def test_prepared_has_mnists_form_and_is_what_the_model_sees(five):
    model = Same().train()
    digit, probabilities, prepared = predict_image(model, five)
    assert digit == 9
    torch.testing.assert_close(probabilities, torch.arange(10.0).softmax(dim=0))
    assert prepared.shape == (28, 28) and prepared.dtype == np.uint8 and prepared.max() == 255
    rows, columns = np.nonzero(prepared > 20)
    assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
    y, x = (np.average(index, weights=prepared) for index in np.indices((28, 28)))
    assert abs(y - 13.5) <= 0.6 and abs(x - 13.5) <= 0.6
    seen = (torch.from_numpy(prepared) / 255 - utils.MEAN) / utils.STD
    torch.testing.assert_close(model.images[0, 0], seen)
    assert not model.training
    double = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    assert predict_image(double, five)[1].dtype == torch.float64


def variants(five, folder):
    picture = Image.fromarray(five)
    yield from (picture.convert(mode) for mode in ("RGB", "P", "CMYK", "I", "F"))
    for ink in ("black", "white"):
        clear = Image.new("RGBA", picture.size, (0, 0, 0, 0))
        clear.paste(
            ink, mask=Image.fromarray(255 - five).point(lambda value: 2 * max(0, value - 60))
        )
        yield clear
    yield 255 - five  # light on dark
    yield five / 255
    yield np.minimum(five / np.median(five), 1.05)
    yield torch.tensor(five / 255).bfloat16()
    yield torch.tensor(five)[None]
    yield np.stack([five] * 3, axis=2)
    yield np.stack([five] * 3)
    picture.save(folder / "five.png")
    yield folder / "five.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    picture.rotate(90, expand=True).save(folder / "turned.jpg", exif=exif)
    yield str(folder / "turned.jpg")
    deep = Image.fromarray(256 * np.asarray(picture.rotate(90, expand=True), np.uint16))
    deep.save(folder / "deep.png", exif=exif)
    yield folder / "deep.png"
    yield picture.resize((2000, 3000))


def test_all_kinds_of_images_give_the_same(five, tmp_path):
    expected = predict_image(Same(), five)[2].astype(float)
    for image in variants(five, tmp_path):
        prepared = predict_image(Same(), image)[2].astype(float)
        assert np.corrcoef(expected.ravel(), prepared.ravel())[0, 1] > 0.9, image


def test_images_that_hold_no_digit_are_refused(five):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8)
    for blank in (
        np.zeros((90, 80)),
        np.full((90, 80), 255),
        noise,
        np.tile(np.arange(200), (150, 1)),
    ):
        with pytest.raises(ValueError, match="found no ink"):
            predict_image(Same(), blank)
    with pytest.raises(ValueError, match="several digits"):
        predict_image(Same(), np.concatenate([five, five], axis=1))


@pytest.mark.parametrize(
    "values, message",
    [
        (None, "NoneType"),
        (np.zeros(784), r"float64 \(784,\)"),
        (np.zeros((5, 28, 28)), r"\(5, 28, 28\)"),
        (np.full((28, 28), np.nan), r"float64 \(28, 28\)"),
        (np.full((28, 28), -0.4), "-0.4 to -0.4"),
        (np.full((28, 28), 70_000), "70000 to 70000"),
        (np.zeros((4, 4)), "of 8×8 to .* pixels, got 4×4"),
    ],
)
def test_arrays_that_are_no_image(values, message):
    with pytest.raises(ValueError, match=message):
        predict_image(Same(), values)


def test_files_that_are_no_image(five, tmp_path, monkeypatch):
    path = tmp_path / "it.png"
    with pytest.raises(FileNotFoundError, match="it.png"):
        predict_image(Same(), path)
    Image.fromarray(five).save(path)
    content = path.read_bytes()
    for damaged in (b"", b"text", content[:500]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="it.png' was not read"):
            predict_image(Same(), path)
    with pytest.raises(ValueError, match="was not read"):
        predict_image(Same(), Image.open(path))
    Image.new("1", (30_000, 30_000)).save(path)
    with pytest.raises(ValueError, match="at most [0-9,]+ pixels .*Bomb"):
        predict_image(Same(), path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert predict_image(Same(), five)[0] == 9


# --- drawing in JupyterLab: with playwright installed, and BROWSER naming a Chromium


@pytest.mark.skipif("BROWSER" not in os.environ, reason="BROWSER does not name a Chromium")
def test_a_digit_drawn_with_the_mouse_is_read(net, folder):
    from playwright.sync_api import sync_playwright

    notebook = nbformat.read("S5.ipynb", as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    torch.save(net.state_dict(), "model.pt")
    cells["data"].source = 'train_data, _ = load_data("digits")'
    cells["model"].source = 'model = Net()\nmodel.load_state_dict(torch.load("model.pt"))'
    notebook.cells = [cells[name] for name in ("setup", "imports", "data", "model", "draw")]
    for cell in notebook.cells:
        cell.outputs = []
    del notebook.metadata["widgets"]  # the pad of the run before
    nbformat.write(notebook, "S5.ipynb")
    options = ["--no-browser", "--allow-root", "--port=8765", "--IdentityProvider.token="]
    lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options])
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=os.environ["BROWSER"], args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            for _ in range(60):
                try:
                    page.goto("http://localhost:8765/lab/tree/S5.ipynb")
                    break
                except Exception:
                    page.wait_for_timeout(1000)
            page.get_by_text("| Idle").wait_for(timeout=120_000)  # else it asks for a kernel
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            canvas = page.locator("canvas[width='280']")
            canvas.wait_for(timeout=60_000)
            canvas.scroll_into_view_if_needed()
            page.wait_for_timeout(1000)
            box = canvas.bounding_box()
            for stroke in ([(60, 60), (210, 60)], [(210, 60), (140, 230)]):  # a seven
                points = [(box["x"] + x, box["y"] + y) for x, y in stroke]
                page.mouse.move(*points[0])
                page.mouse.down()
                page.mouse.move(*points[1], steps=20)
                page.mouse.up()
                page.wait_for_timeout(500)
            answer = page.locator("output", has_text="%")
            answer.wait_for(timeout=20_000)
            page.screenshot(path=os.environ.get("SCREENSHOT", "screenshot.png"))
            assert answer.inner_text().startswith("7")
            page.get_by_role("button", name="Clear").click()
            page.locator("output", has_text="Draw a digit").wait_for(timeout=20_000)
            browser.close()
    finally:
        lab.terminate()
        lab.wait()


def test_handwriting_table_runs(net, tmp_path, mnist_root):
    torch.save(net.state_dict(), tmp_path / "model.pt")
    options = ["--model", str(tmp_path / "model.pt"), "--count", "1", "--printed", "2"]
    command = [sys.executable, str(ROOT / "tests" / "handwriting.py"), *options]
    env = {**os.environ, "DATA_DIR": str(mnist_root)}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("| MNIST's test digits, printed | 2 | ")


def test_handwriting_table_needs_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["handwriting.py", "--model", str(tmp_path / "model.pt")])
    with pytest.raises(SystemExit):
        handwriting.main()
    assert "run the notebook" in capsys.readouterr().err
