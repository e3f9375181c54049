import handwriting
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from handwriting import SEVEN, sheet
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from torch.utils.data import DataLoader

import utils
from model import Net
from utils import predict, predict_image


def test_predict_is_in_the_loaders_order(linear, samples):
    linear.train()
    predictions, probabilities, targets = predict(linear, "cpu", DataLoader(samples, 64))
    expected = linear(samples.tensors[0]).exp()
    torch.testing.assert_close(probabilities, expected)
    assert torch.equal(predictions, expected.argmax(dim=1))
    assert torch.equal(targets, samples.tensors[1])
    assert not linear.training and not probabilities.requires_grad
    assert predict(linear, "cpu", [(samples.tensors[0][:2], torch.zeros(2, 1))])[2].shape == (2,)
    with pytest.raises(RuntimeError, match="shape"):
        predict(linear, "cpu", [(samples.tensors[0][:2], torch.zeros(2, 10))])
    _, sharp, _ = predict(linear[:2], "cpu", DataLoader(samples, 64), temperature=0.5)  # of logits
    torch.testing.assert_close(sharp, expected**2 / (expected**2).sum(dim=1, keepdim=True))


@pytest.fixture(scope="module")
def net():
    """Net with the committed weights."""
    model = Net()
    model.load_state_dict(torch.load(ROOT / ".assets" / "model.pt", weights_only=True))
    handwriting.net = model
    return model


@pytest.mark.parametrize("kind", [handwriting.SCAN, *handwriting.KINDS])
def test_handwriting_of_each_kind_is_recognised(net, kind):
    assert sum(handwriting.is_correct(kind, index) for index in range(10)) >= 9


@pytest.mark.slow
def test_mnists_digits_are_recognised_whole_and_cut_out_by_their_bounding_box(net, mnist_root):
    train_data, _ = utils.load_data("MNIST", mnist_root)
    correct = np.zeros(3)
    for image, label in zip(train_data.data[:50].numpy(), train_data.targets, strict=False):
        large = np.asarray(Image.fromarray(image).resize((280, 280), Image.Resampling.BICUBIC))
        rows, columns = (large > 127).nonzero()
        cut_out = 255 - large[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        small = Image.fromarray(255 - image).resize((84, 84), Image.Resampling.BICUBIC)
        small = ImageOps.expand(small, 558, 255)  # 10 pixels high when the sheet is reduced
        correct += [handwriting.recognise(net, each) == label for each in (image, cut_out, small)]
    assert (correct >= [49, 49, 46]).all()


def test_nothing_around_the_digit_nor_its_size_is_in_the_way(net):
    photo = sheet(SEVEN, 8, 400)
    ImageDraw.Draw(photo).ellipse([-70, 120, 50, 280], fill=60)  # a finger
    ImageDraw.Draw(photo).line([385, 120, 385, 290], fill=30, width=8)
    frame = [(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9), (0.1, 0.1)]
    broken = [(0.3, 0.25), (0.66, 0.25)], [(0.7, 0.27), (0.45, 0.8)]
    fat, far = sheet(SEVEN, 80, 280), ImageOps.expand(sheet(SEVEN, 4, 100), 450, 240)
    cut = fat.crop(ImageOps.invert(fat).getbbox()), sheet(SEVEN, 8, 280).crop((100, 0, 280, 280))
    for image in (photo, sheet([*SEVEN, frame], 8, 280), sheet(broken, 8, 280), far, *cut):
        assert predict_image(net, image)[0] == 7
    with_shades_and_lines = 12, 43, 140, 150, 229, 236
    assert sum(handwriting.is_correct("all", index) for index in with_shades_and_lines) >= 5


def test_speckled_strokes_are_read_and_speckled_squares_are_refused(net):
    rng = np.random.default_rng(0)
    grid = [[(-1, y), (2, y)] for y in (0.2, 0.4, 0.6, 0.8)]
    grid += [[(x, -1), (x, 2)] for x in (0.2, 0.4, 0.6, 0.8)]
    for strokes, width, digit in (SEVEN, 16, 7), (SEVEN, 28, 7), (grid, 16, None), (grid, 24, None):
        pixels = 255 - np.asarray(sheet(strokes, width, 300))
        for grains in np.full(pixels.shape, False), rng.random(pixels.shape) < 0.04:
            grains = ndimage.binary_dilation(grains, np.ones((2, 2)))  # about 15 % of the pixels
            chalk = np.where(grains, pixels.min(), pixels)
            for image in (chalk, 255 - chalk):
                assert handwriting.recognise(net, image) == digit


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


def test_the_input_has_mnists_form_and_is_what_the_model_sees(five):
    model = Same().double()
    digit, probabilities, model_input = predict_image(model, five)
    assert digit == 9 and type(digit) is int and probabilities.dtype == torch.float64
    torch.testing.assert_close(probabilities, torch.arange(10.0).double().softmax(dim=0))
    assert (model_input.shape, model_input.dtype, model_input.max()) == ((28, 28), np.uint8, 255)
    rows, columns = np.nonzero(model_input > 60)
    assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22
    y, x = (np.average(index, weights=model_input) for index in np.indices((28, 28)))
    assert abs(y - 13.5) <= 0.3 and abs(x - 13.5) <= 0.3
    seen = (torch.from_numpy(model_input).double() / 255 - utils.MEAN) / utils.STD
    torch.testing.assert_close(model.images, seen[None, None])
    assert not probabilities.requires_grad
    _, half, _ = predict_image(Same().bfloat16(), five)
    torch.testing.assert_close(half, probabilities.float(), rtol=0.05, atol=0)
    assert abs(half.sum() - 1) < 1e-5  # rounded to bfloat16, it could be off by 1e-3


def variants(five, folder):
    yield from (five.convert(mode) for mode in ("RGB", "P", "CMYK", "I", "F"))
    for ink in ("black", "white"):
        clear = Image.new("RGBA", five.size, (0, 0, 0, 0))
        clear.paste(ink, mask=five.point(lambda value: 2 * max(0, 195 - value)))
        yield clear
    yield from (ImageOps.invert(five), five.resize((2000, 3000)))
    array = np.array(five)
    yield from (array, array / 255, array > 150, (array > 150).astype(int), np.dstack([array] * 3))
    yield from (torch.from_numpy(array), torch.from_numpy(array[None, None] / 255 - 0.5))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    turned = five.rotate(90, expand=True)
    turned.save(folder / "turned.jpg", exif=exif)
    yield str(folder / "turned.jpg")
    deep = Image.fromarray(256 * np.asarray(turned, np.uint16))
    deep.save(folder / "deep.png", exif=exif)
    yield from (folder / "deep.png", (folder / "deep.png").read_bytes())


def test_all_kinds_of_images_give_the_same(five, tmp_path):
    expected = predict_image(Same(), five)[2].astype(float)
    for image in variants(five, tmp_path):
        model_input = predict_image(Same(), image)[2].astype(float)
        assert np.corrcoef(expected.ravel(), model_input.ravel())[0, 1] > 0.9, image


def test_what_shows_no_digit_is_refused(five, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100), dtype=np.uint8)
    slope = np.tile(np.arange(200, dtype=np.uint8), (150, 1))
    blank = Image.new("L", (90, 80)), Image.new("L", (90, 80), "white"), Image.new("LA", (90, 80))
    tiny = np.eye(2), noise[:1], noise[:, :1], noise[:1, :1]
    hand = ndimage.gaussian_filter(sheet([[(1.3, 1.3), (0.5, 0.4)]], 100, 300), 3)
    lines = [[(-1, y), (2, y + 0.05)] for y in (0.2, 0.4, 0.6, 0.8)]
    squares = lines + [[(x, -1), (x, 2)] for x in (0.2, 0.4, 0.6, 0.8)]
    hair, dot, margin = [[(0.5, 0.5), (0.5, 0.52)]], [[(0.5, 0.5)] * 2], [[(0.6, -1), (0.6, 2)]]
    marks = (lines, 2), (squares, 2), (hair, 2), (dot, 30), (margin, 4)
    sheets = [sheet(*strokes_and_width, 300) for strokes_and_width in marks]
    for image in (*blank, *tiny, noise, slope, hand, *sheets):
        with pytest.raises(ValueError, match="found no digit"):
            predict_image(Same(), image)
    ones = sheet([[(x, 0.3), (x, 0.7)] for x in (0.46, 0.54)], 8, 200)  # 8 pixels apart
    for image in (np.hstack([five, five]), np.vstack([five, five]), ones):
        with pytest.raises(ValueError, match="several digits"):
            predict_image(Same(), image)
    shapes = (16, 1, 28, 28), (2, 1, 28, 28), (5, 28, 28), (1, 28, 28, 5), (784,)
    for image in (*map(torch.rand, shapes), "data:image/png;base64," + 9999 * "A"):
        with pytest.raises(ValueError, match="expected one image, got shape|cannot read") as error:
            predict_image(Same(), image)
        assert len(str(error.value)) < 350 and "\n" not in str(error.value)
    five.save(tmp_path / "it.jpg")
    for content in (b"text", (tmp_path / "it.jpg").read_bytes()[:2000]):
        (tmp_path / "it.jpg").write_bytes(content)
        with pytest.raises(ValueError, match="cannot read the image '.*it.jpg': "):
            predict_image(Same(), tmp_path / "it.jpg")
