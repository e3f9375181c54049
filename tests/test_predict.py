import os
import subprocess
import sys

import handwriting
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image, ImageDraw, ImageOps
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


def test_a_temperature_changes_the_probabilities_alone(linear, samples):
    loader = DataLoader(samples, 64)
    predictions, probabilities, _ = predict(linear, "cpu", loader)
    sharp_predictions, sharp, _ = predict(linear, "cpu", loader, temperature=0.5)
    assert torch.equal(predictions, sharp_predictions)
    expected = probabilities**2
    torch.testing.assert_close(sharp, expected / expected.sum(dim=1, keepdim=True))


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


# --- predict_image: what it recognises


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


@pytest.mark.parametrize("kind", [handwriting.SCAN, *handwriting.KINDS])
def test_handwriting_of_each_kind_is_recognised(net, kind):
    correct = 0
    for digit in range(10):
        rng = np.random.default_rng((7, digit))
        if kind == handwriting.SCAN:
            image = handwriting.scan(digit, rng)
        else:
            image = handwriting.photo(digit, rng, kind)
        correct += handwriting.recognise(net, image) == digit
    assert correct >= 8  # of ten, after so short a training


def test_mnists_digits_are_recognised_printed_and_on_their_own(net, mnist_root):
    train_data, _ = utils.load_data("MNIST", mnist_root)
    printed = alone = 0
    for index in range(50):
        digit, field = int(train_data.targets[index]), train_data.data[index].numpy()
        paper = handwriting.photo(digit, np.random.default_rng(index), field=field)
        printed += handwriting.recognise(net, paper) == digit
        alone += handwriting.recognise(net, Image.fromarray(field)) == digit
    assert printed >= 47 and alone >= 46


def test_a_digit_may_fill_the_image(net, mnist_root):
    """Dark on light, enlarged, with a margin of a twentieth."""
    train_data, _ = utils.load_data("MNIST", mnist_root)
    for index in range(30):
        field = train_data.data[index].numpy()
        rows, columns = np.nonzero(field > 40)
        box = columns.min() - 1, rows.min() - 1, columns.max() + 2, rows.max() + 2
        large = ImageOps.scale(ImageOps.invert(Image.fromarray(field)).crop(box), 10)
        assert handwriting.recognise(net, large) is not None


def sheet(points, width, side):
    """A square sheet of paper with strokes of dark ink, whose points are given in 0 to 1."""
    strokes = [np.array(stroke, float) * side for stroke in points]
    return handwriting.to_image(1 - 0.9 * handwriting.draw((side, side), strokes, width))


SEVEN = [[(0.3, 0.25), (0.7, 0.25)], [(0.7, 0.25), (0.45, 0.8)]]
FRAME = [[(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9), (0.1, 0.1)]]


def test_hairlines_in_a_large_image_are_broadened_and_recognised(net):
    correct = 0
    for digit in range(10):
        rng = np.random.default_rng((digit, 5))
        points = [stroke / 3 + 0.5 for stroke in handwriting.strokes(digit, rng)]
        correct += handwriting.recognise(net, sheet(points, 2, 1000)) == digit
    assert correct >= 8
    prepared = predict_image(net, sheet(SEVEN, 2, 1000))[2]
    assert 2 <= (prepared[14] > 127).sum() <= 4  # pixels, across the stroke


def test_a_frame_is_not_the_digit(net):
    assert predict_image(net, sheet(SEVEN + FRAME, 8, 280))[0] == 7


def test_a_finger_at_the_border_is_not_the_digit(net):
    photo = sheet(SEVEN, 8, 400)
    ImageDraw.Draw(photo).ellipse([-70, 120, 50, 280], fill=60)
    assert predict_image(net, photo)[0] == 7


def test_a_stroke_apart_belongs_to_the_digit():
    body = [(0.35, 0.28), (0.35, 0.45), (0.6, 0.45), (0.65, 0.6), (0.55, 0.75), (0.3, 0.75)]
    bar = [(0.43, 0.25), (0.7, 0.25)]
    prepared = predict_image(Same(), sheet([body, bar], 8, 280))[2]
    assert prepared[:8, 17:].max() > 200


@pytest.mark.parametrize("gap", [0.05, 0.2, 0.4])
def test_two_digits_are_refused_however_near(gap):
    ones = [[(0.4, 0.25), (0.4, 0.75)], [(0.4 + gap, 0.25), (0.4 + gap, 0.75)]]
    with pytest.raises(ValueError, match="several digits"):
        predict_image(Same(), sheet(ones, 6, 300))


# --- predict_image: what it takes and returns


class Same(nn.Module):
    """Whatever comes in, gives the same log-probabilities; keeps what came in."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(10.0))

    def forward(self, images):
        self.images = images
        return self.weight.expand(len(images), 10).log_softmax(dim=1)


@pytest.fixture(scope="module")
def five():
    """A dark five on light paper, 300 pixels high and 200 wide."""
    return handwriting.photo(5, np.random.default_rng(3)).resize((200, 300))


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
    torch.testing.assert_close(model.images, seen[None, None])
    assert not model.training and not probabilities.requires_grad


def test_the_models_dtype_is_used_and_nan_refused(five):
    double = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    assert predict_image(double, five)[1].dtype == torch.float64
    nn.init.constant_(double[1].bias, float("nan"))
    with pytest.raises(FloatingPointError):
        predict_image(double, five)


def variants(five, folder):
    for mode in ("RGB", "P", "CMYK", "I", "F"):
        yield five.convert(mode)
    yield Image.fromarray(np.asarray(five, np.float32) / 255)
    for ink in ("black", "white"):
        clear = Image.new("RGBA", five.size, (0, 0, 0, 0))
        clear.paste(ink, mask=five.point(lambda value: 2 * max(0, 195 - value)))
        yield clear
    yield ImageOps.invert(five)  # light on dark
    yield five.resize((2000, 3000))
    five.save(folder / "five.png")
    yield folder / "five.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    turned = five.rotate(90, expand=True)
    turned.save(folder / "turned.jpg", exif=exif)
    yield str(folder / "turned.jpg")
    deep = Image.fromarray(256 * np.asarray(turned, np.uint16))
    deep.save(folder / "deep.png", exif=exif)
    yield folder / "deep.png"


def test_all_kinds_of_images_give_the_same(five, tmp_path):
    expected = predict_image(Same(), five)[2].astype(float)
    for image in variants(five, tmp_path):
        prepared = predict_image(Same(), image)[2].astype(float)
        assert np.corrcoef(expected.ravel(), prepared.ravel())[0, 1] > 0.9, image


def test_images_without_a_digit_are_refused(five):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8)
    slope = np.tile(np.arange(200, dtype=np.uint8), (150, 1))
    blank = Image.new("L", (90, 80)), Image.new("L", (90, 80), "white"), Image.new("LA", (90, 80))
    for image in (*blank, Image.fromarray(noise), Image.fromarray(slope)):
        with pytest.raises(ValueError, match="found no ink"):
            predict_image(Same(), image)
    with pytest.raises(ValueError, match="several digits"):
        predict_image(Same(), Image.fromarray(np.hstack([five, five])))
    with pytest.raises(ValueError, match="got 7×90"):
        predict_image(Same(), Image.new("L", (7, 90)))


@pytest.mark.parametrize("image", [None, np.zeros((28, 28)), torch.zeros(28, 28)])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(TypeError, match=r"Image.fromarray\(array\)"):
        predict_image(Same(), image)


def test_files_that_are_no_image_are_refused_by_name(five, tmp_path):
    path = tmp_path / "it.png"
    with pytest.raises(FileNotFoundError, match="it.png"):
        predict_image(Same(), path)
    five.save(path)
    content = path.read_bytes()
    for damaged in (b"", b"text", content[:500]):
        path.write_bytes(damaged)
        with pytest.raises((ValueError, Image.UnidentifiedImageError), match="it.png'"):
            predict_image(Same(), path)
    Image.new("1", (30_000, 30_000)).save(path)
    with pytest.raises(Image.DecompressionBombError):
        predict_image(Same(), path)


# --- the table of handwriting.py


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
