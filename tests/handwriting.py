"""Synthetic handwriting on synthetic paper, and how much of it `predict_image` recognises.

    python tests/handwriting.py    # with the weights in .assets/model.pt

Digits are drawn stroke by stroke, in several European ways of writing and with pens of all widths.
They are scanned, or photographed with one disturbance each, or with several ("all"). MNIST's test
digits are printed onto the same paper. The output is a Markdown table of percent correct. Kind and
index determine the image; the README's 600 new ones have the indices 9,000 to 9,599.
"""

import argparse
import io
import sys
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from scipy.interpolate import splev, splprep

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Net  # noqa: E402
from utils import load_data, predict_image  # noqa: E402

SCAN, ALL, PRINTED = "scan", "all", "MNIST's test digits, printed"
KINDS = (  # of photos: what disturbs each of them
    "plain, grey paper, light on dark, uneven light, shadow, off centre, small, noise, specks, "
    "ruled line, squared paper, neighbour, perspective, thick pen, thin pen, blur, jpeg"
).split(", ")
PENS = {"thick pen": (0.08, 0.13), "thin pen": (0.012, 0.02)}  # of a digit's height
SEVEN = [[(0.3, 0.25), (0.7, 0.25)], [(0.7, 0.25), (0.45, 0.8)]]  # for `sheet`

# Ways of writing each digit: strokes, separated by "/", of points "x,y", y down, in 100 by 150
WAYS = """
0  50,0 15,20 0,75 15,130 50,150 85,130 100,75 85,20 50,0
0  60,5 20,25 5,80 30,145 75,135 95,80 80,20 45,5
1  50,0 50,75 50,150
1  10,50 35,28 60,0 / 60,0 60,70 60,150
1  0,75 30,40 62,0 / 62,0 60,70 58,150
1  20,40 55,0 / 55,0 55,150 / 20,150 90,150
2  5,35 25,5 60,0 90,20 85,60 45,105 0,148 / 0,148 50,146 100,150
2  10,30 35,2 75,5 90,40 60,90 20,135 5,140 15,120 40,135 70,150 100,140
3  10,20 40,0 80,10 85,45 40,70 / 40,70 85,85 95,120 60,150 20,145 0,125
3  5,5 50,3 90,5 / 90,5 65,35 42,62 / 42,62 85,80 95,120 55,150 5,135
4  55,0 30,50 0,100 / 0,100 50,100 100,98 / 72,50 70,100 68,150
4  70,0 35,50 0,100 / 0,100 50,100 100,100 / 70,0 70,75 70,150
4  10,0 8,40 5,75 / 5,75 50,78 95,72 / 80,0 78,70 75,150
5  20,0 15,35 10,65 / 10,65 50,50 90,70 95,110 60,148 5,140 / 20,0 55,2 95,0
5  90,2 50,3 20,2 / 20,2 12,62 / 12,62 55,55 90,80 85,125 50,150 5,138
6  80,0 35,35 8,90 10,130 50,150 90,130 85,90 45,80 12,105
6  60,0 20,50 5,110 30,148 75,140 85,105 55,80 15,100
7  0,5 50,3 100,0 / 100,0 65,70 35,150
7  0,8 50,4 95,0 / 95,0 60,70 35,150 / 25,75 60,73 95,70
7  2,25 5,3 / 5,3 50,6 100,0 / 100,0 60,80 40,150 / 30,78 90,72
8  85,20 50,0 15,20 25,55 60,78 92,110 80,142 45,150 10,135 10,100 50,70 85,45 85,20
8  50,70 15,40 30,5 70,5 85,40 50,70 10,105 20,145 75,147 90,105 50,70
9  88,30 50,2 10,30 20,70 60,75 88,30 / 88,30 85,90 75,150
9  85,25 45,0 8,35 30,75 75,60 88,25 / 88,25 90,90 60,140 15,145
"""


def strokes(digit, rng):
    """One writer's digit: an array of points (N, 2) for each stroke, in a box of about 1 by 1.5."""
    ways = [line[3:] for line in WAYS.splitlines() if line.startswith(str(digit))]
    way = ways[rng.integers(len(ways))]
    slant, wide, turn = rng.normal(0, 0.15), rng.uniform(0.75, 1.2), rng.normal(0, np.radians(5))
    c, s = np.cos(turn), np.sin(turn)
    ends = dict.fromkeys(way.replace("/", "").split())  # each once: strokes that meet still do
    moved = {end: np.array(end.split(","), float) / 100 + rng.normal(0, 0.035, 2) for end in ends}
    out = []
    for stroke in way.split(" / "):
        points = np.array([moved[point] for point in stroke.split()])
        if len(points) > 2:
            spline, _ = splprep(points.T, s=0, k=min(3, len(points) - 1))
            points = np.stack(splev(np.linspace(0, 1, 60), spline), axis=1)
        points = (points - [0.5, 0.75]) * [wide, 1]
        points[:, 0] -= slant * points[:, 1]
        out.append(points @ np.array([[c, -s], [s, c]]))
    return out


def draw(size, parts, width, over=4):
    """Return strokes (pixel coordinates) as ink from 0 to 1, an array of `size` (height, width)."""
    image = Image.new("L", (size[1] * over, size[0] * over))
    pen = ImageDraw.Draw(image)
    w = max(1, round(width * over))
    for points in parts:
        path = [tuple(point * over) for point in points]
        pen.line(path, fill=255, width=w, joint="curve")
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=255)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BOX), float) / 255


def sheet(strokes, width, side):
    """Draw strokes, whose points are given in 0 to 1, with dark ink on a square sheet of paper."""
    parts = [np.array(stroke, float) * side for stroke in strokes]
    return to_image(1 - 0.9 * draw((side, side), parts, width))


def to_image(values):
    """Return greys (H, W) from 0 to 1 as a PIL image."""
    return Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))


def reach(parts, side):
    """Return how far the strokes go to the left (side -1) or to the right (side 1)."""
    return side * max((side * part[:, 0]).max() for part in parts)


def scan(digit, rng):
    """Scan a digit: thin dark pen on white paper, about 100×100 pixels, at times a neighbour."""
    height, width = rng.integers(85, 120, 2)
    tall = rng.uniform(0.45, 0.8) * height
    centre = np.array([width, height]) / 2 + rng.normal(0, 4, 2)
    parts, pen = [part * tall / 1.5 + centre for part in strokes(digit, rng)], rng.uniform(1.5, 4)
    ink = draw((height, width), parts, pen)
    if rng.random() < 0.15:
        side = rng.choice([-1, 1])
        other = [part * tall / 1.5 for part in strokes(rng.integers(10), rng)]
        edge = (width - rng.uniform(3, 12)) if side > 0 else rng.uniform(3, 12)
        left = edge - reach(other, -side)
        other = [part + [left, centre[1] + rng.normal(0, 6)] for part in other]
        widest = max(np.abs(part[:, 0] - centre[0]).max() for part in parts)
        if (edge - centre[0]) * side > widest + 5:
            ink = np.maximum(ink, draw((height, width), other, pen))
    paper, dark = rng.uniform(0.93, 1), rng.uniform(0.05, 0.45)
    return to_image(paper - (paper - dark) * ink + rng.normal(0, rng.uniform(0, 0.02), ink.shape))


def photo(digit, rng, kind="plain", field=None):
    """A phone photo of a digit on paper, drawn, or printed where `field` (28, 28) is given."""
    kinds = {kind}
    if kind == ALL:
        kinds = {name for name in KINDS if rng.random() < 0.3} - {"light on dark", "neighbour"}
    height, width = size = rng.integers(300, 700, 2)
    share = rng.uniform(0.12, 0.25) if "small" in kinds else rng.uniform(0.35, 0.75)
    tall, parts = share * height, strokes(digit, rng)
    span = reach(parts, 1) - reach(parts, -1)
    unit = min(tall / 1.5, 0.8 * width / max(span, 0.3))
    centre = np.array([width, height]) / 2
    if "off centre" in kinds:
        centre += [width, height] * rng.uniform(-0.2, 0.2, 2) * (1 - share)
    pens = [PENS[name] for name in PENS if name in kinds] or [(0.025, 0.07)]  # usually
    pen = unit * 1.5 * rng.uniform(*pens[0])
    if field is None:
        ink = draw(size, [part * unit + centre for part in parts], pen, over=2)
    else:
        side = int(tall * 1.4)
        picture = Image.fromarray(field).resize((side, side), Image.Resampling.BICUBIC)
        page = Image.new("L", (int(width), int(height)))
        page.paste(picture, tuple(int(middle - side / 2) for middle in centre))
        ink = np.asarray(page, float) / 255
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ink = ink * (1 - 0.25 * ndimage.gaussian_filter(rng.random(size), 3))
    strength, paper = rng.uniform(0.5, 0.9), np.full(size, rng.uniform(0.8, 0.97))
    if "grey paper" in kinds:
        paper = paper * rng.uniform(0.45, 0.7)
    paper += ndimage.gaussian_filter(rng.normal(0, 1, size), 1.5) * 0.015
    if "specks" in kinds:
        for _ in range(rng.integers(3, 12)):
            top, left = rng.uniform(0, height), rng.uniform(0, width)
            inside = np.hypot(y * height - top, x * width - left) < rng.uniform(1, 0.012 * height)
            ink = np.maximum(ink, 0.8 * inside)
    if "ruled line" in kinds:
        at, tilt = centre[1] + unit * rng.uniform(0.85, 1.1), rng.uniform(-0.03, 0.03)
        line = np.abs(y * height - at - tilt * (x * width - centre[0])) < max(1, 0.004 * height)
        ink = np.maximum(ink, rng.uniform(0.4, 0.8) * line)
    if "squared paper" in kinds:
        step = unit * rng.uniform(0.35, 0.8)
        lines = ((y * height) % step < 2) | ((x * width) % step < 2)
        paper = paper - rng.uniform(0.08, 0.18) * lines
    if "neighbour" in kinds:
        side = rng.choice([-1, 1])
        other = [part * unit for part in strokes(rng.integers(10), rng)]
        edge = width - 0.06 * width if side > 0 else 0.06 * width
        shift = np.array([edge - reach(other, -side), centre[1]])
        ink = np.maximum(ink, draw(size, [part + shift for part in other], pen, over=2))
    image = paper * (1 - strength * ink)
    if "uneven light" in kinds:
        across, down = rng.uniform(-0.5, 0.5, 2)
        image = image * (0.75 + across * (x - 0.5) + down * (y - 0.5))
    if "shadow" in kinds:
        angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25)
        edge = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5) - offset
        edge /= rng.uniform(0.02, 0.1)
        image = image * (1 - rng.uniform(0.2, 0.45) / (1 + np.exp(-edge.clip(-50, 50))))
    if "light on dark" in kinds:
        image = 1 - image
    return taken(to_image(image), kinds, rng)


def taken(picture, kinds, rng):
    """Return the picture as a camera takes it: at an angle, blurred, with noise, compressed."""
    width, height = picture.size
    if "perspective" in kinds:
        shift = np.abs(rng.uniform(-0.1, 0.1, 8) * ([width, height] * 4))  # of corners, inwards
        corners = [0, 0, 0, height, width, height, width, 0] + shift * [1, 1, 1, -1, -1, -1, -1, 1]
        quad = Image.Transform.QUAD, tuple(corners)
        picture = picture.transform(picture.size, *quad, Image.Resampling.BICUBIC)
    if "blur" in kinds:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.003, 0.008) * height))
    if "noise" in kinds:
        array = np.asarray(picture, float) + rng.normal(0, rng.uniform(8, 22), (height, width))
        picture = Image.fromarray(array.clip(0, 255).astype(np.uint8))
    if "jpeg" in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(15, 40)))
        picture = Image.open(buffer).convert("L")
    return picture


def recognise(net, image):
    """Return the digit that `predict_image` finds, or None where it refuses the image."""
    try:
        return predict_image(net, image)[0]
    except ValueError:
        return None


def is_correct(kind, index):
    """Make image `index` of a kind, and tell whether its digit is recognised."""
    rng = np.random.default_rng((index, *kind.encode()))
    digit, field = index % 10, None
    if kind == PRINTED:
        digit, field = int(test_data.targets[index]), test_data.data[index].numpy()
    image = scan(digit, rng) if kind == SCAN else photo(digit, rng, kind, field)
    return recognise(net, image) == digit


def load():
    """Load the weights and the test digits, once in each process."""
    global net, test_data
    torch.set_num_threads(1)
    test_data = load_data("MNIST")[1]
    net = Net().eval()
    net.load_state_dict(torch.load(ROOT / ".assets" / "model.pt", "cpu"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="digits of each kind")
    parser.add_argument("--printed", type=int, default=10_000, help="of MNIST's test digits")
    args = parser.parse_args()
    counts = dict.fromkeys((SCAN, *KINDS, ALL), args.count) | {PRINTED: args.printed}
    print("| kind | digits | recognised correctly (%) |\n|---|---|---|")
    with Pool(initializer=load) as pool:
        for kind, count in counts.items():
            correct = sum(pool.starmap(is_correct, [(kind, i) for i in range(count)], chunksize=10))
            print(f"| {kind} | {count:,} | {100 * correct / count:.1f} |", flush=True)


if __name__ == "__main__":
    main()
