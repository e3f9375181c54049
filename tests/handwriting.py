"""Synthetic handwriting on synthetic paper, and how well `predict_image` reads it.

    python tests/handwriting.py    # after the notebook, whose runs/model.pt it takes

Digits are drawn with strokes, in several European ways and with pens of all widths, and they
are scanned, or photographed with one disturbance each, or with several ("all"). MNIST's test
digits are printed onto the same paper. Prints a Markdown table: percent right, by disturbance.
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

# Ways of writing each digit: strokes, parted by "/", of points "x,y" in a box of 100 by 150, y down
WAYS = {
    0: [
        "50,0 15,20 0,75 15,130 50,150 85,130 100,75 85,20 50,0",
        "60,5 20,25 5,80 30,145 75,135 95,80 80,20 45,5",
    ],
    1: [
        "50,0 50,75 50,150",
        "10,50 35,28 60,0 / 60,0 60,70 60,150",
        "0,75 30,40 62,0 / 62,0 60,70 58,150",
        "20,40 55,0 / 55,0 55,150 / 20,150 90,150",
    ],
    2: [
        "5,35 25,5 60,0 90,20 85,60 45,105 0,148 / 0,148 50,146 100,150",
        "10,30 35,2 75,5 90,40 60,90 20,135 5,140 15,120 40,135 70,150 100,140",
    ],
    3: [
        "10,20 40,0 80,10 85,45 40,70 / 40,70 85,85 95,120 60,150 20,145 0,125",
        "5,5 50,3 90,5 / 90,5 65,35 42,62 / 42,62 85,80 95,120 55,150 5,135",
    ],
    4: [
        "55,0 30,50 0,100 / 0,100 50,100 100,98 / 72,50 70,100 68,150",
        "70,0 35,50 0,100 / 0,100 50,100 100,100 / 70,0 70,75 70,150",
        "10,0 8,40 5,75 / 5,75 50,78 95,72 / 80,0 78,70 75,150",
    ],
    5: [
        "20,0 15,35 10,65 / 10,65 50,50 90,70 95,110 60,148 5,140 / 20,0 55,2 95,0",
        "90,2 50,3 20,2 / 20,2 12,62 / 12,62 55,55 90,80 85,125 50,150 5,138",
    ],
    6: [
        "80,0 35,35 8,90 10,130 50,150 90,130 85,90 45,80 12,105",
        "60,0 20,50 5,110 30,148 75,140 85,105 55,80 15,100",
    ],
    7: [
        "0,5 50,3 100,0 / 100,0 65,70 35,150",
        "0,8 50,4 95,0 / 95,0 60,70 35,150 / 25,75 60,73 95,70",
        "2,25 5,3 / 5,3 50,6 100,0 / 100,0 60,80 40,150 / 30,78 90,72",
    ],
    8: [
        "85,20 50,0 15,20 25,55 60,78 92,110 80,142 45,150 10,135 10,100 50,70 85,45 85,20",
        "50,70 15,40 30,5 70,5 85,40 50,70 10,105 20,145 75,147 90,105 50,70",
    ],
    9: [
        "88,30 50,2 10,30 20,70 60,75 88,30 / 88,30 85,90 75,150",
        "85,25 45,0 8,35 30,75 75,60 88,25 / 88,25 90,90 60,140 15,145",
    ],
}


def strokes(digit, rng):
    """Points of each stroke of one writer's digit, in a box of about 1 by 1.5, jittered."""
    way = WAYS[digit][rng.integers(len(WAYS[digit]))]
    slant, wide, turn = rng.normal(0, 0.15), rng.uniform(0.75, 1.2), rng.normal(0, np.radians(5))
    out, memo = [], {}
    for stroke in way.split(" / "):
        points = []
        for point in stroke.split():
            if point not in memo:  # strokes that meet, meet
                memo[point] = np.array(point.split(","), float) / 100 + rng.normal(0, 0.035, 2)
            points.append(memo[point])
        points = np.array(points)
        if len(points) > 2:
            spline, _ = splprep(points.T, s=0, k=min(3, len(points) - 1))
            points = np.stack(splev(np.linspace(0, 1, 60), spline), axis=1)
        points = (points - [0.5, 0.75]) * [wide, 1]
        points[:, 0] -= slant * points[:, 1]
        c, s = np.cos(turn), np.sin(turn)
        out.append(points @ np.array([[c, -s], [s, c]]))
    return out


def draw(size, parts, width, rng, over=4):
    """Render strokes (pixel coordinates) as ink 0 to 1 on a field (height, width)."""
    image = Image.new("L", (size[1] * over, size[0] * over))
    pen = ImageDraw.Draw(image)
    for points in parts:
        path = [tuple(p * over) for p in points]
        w = max(1, round(width * over))
        pen.line(path, fill=255, width=w, joint="curve")
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=255)
    image = image.resize((size[1], size[0]), Image.Resampling.BOX)
    return np.asarray(image, float) / 255


def scan(digit, rng, neighbour=0.15):
    """Scan a digit: thin dark pen on white paper, about 100×100 pixels, at times a neighbour."""
    height, width = rng.integers(85, 120, 2)
    tall = rng.uniform(0.45, 0.8) * height
    centre = np.array([width, height]) / 2 + rng.normal(0, 4, 2)
    parts = [p * tall / 1.5 + centre for p in strokes(digit, rng)]
    pen = rng.uniform(1.5, 4)
    ink = draw((height, width), parts, pen, rng)
    if rng.random() < neighbour:
        side = rng.choice([-1, 1])
        reach = max(np.abs(p[:, 0] - centre[0]).max() for p in parts)
        other = [p * tall / 1.5 for p in strokes(rng.integers(10), rng)]
        near = min(p[:, 0].min() for p in other) if side > 0 else max(p[:, 0].max() for p in other)
        edge = (width - rng.uniform(3, 12)) if side > 0 else rng.uniform(3, 12)
        other = [p + [edge - near, centre[1] + rng.normal(0, 6)] for p in other]
        if (edge - centre[0]) * side > reach + 5:
            ink = np.maximum(ink, draw((height, width), other, pen, rng))
    paper = rng.uniform(0.93, 1)
    dark = rng.uniform(0.05, 0.45)
    image = paper - (paper - dark) * ink + rng.normal(0, rng.uniform(0, 0.02), ink.shape)
    return (255 * image.clip(0, 1)).astype(np.uint8)


KINDS = (
    *("plain", "grey paper", "light on dark", "uneven light", "shadow", "off centre", "small"),
    *("noise", "specks", "ruled line", "squared paper", "neighbour", "perspective"),
    *("thick pen", "thin pen", "blur", "jpeg"),
)


def photo(digit, rng, kind="plain", field=None):
    """A phone photo of a digit on paper, drawn, or printed where `field` (28, 28) is given."""
    kinds = {kind}
    if kind == "all":
        chosen = [name for name in KINDS if rng.random() < 0.3]
        kinds = set(chosen) - {"light on dark", "neighbour"}
    height, width = rng.integers(300, 700, 2)
    share = rng.uniform(0.12, 0.25) if "small" in kinds else rng.uniform(0.35, 0.75)
    tall = share * height
    wide_limit = 0.8 * width
    parts = strokes(digit, rng)
    span = max(np.concatenate(parts)[:, 0]) - min(np.concatenate(parts)[:, 0])
    unit = min(tall / 1.5, wide_limit / max(span, 0.3))
    centre = np.array([width, height]) / 2
    if "off centre" in kinds:
        centre = centre + np.array([width, height]) * rng.uniform(-0.2, 0.2, 2) * (1 - share)
    widths = {"thick pen": (0.08, 0.13), "thin pen": (0.012, 0.02)}
    chosen = next((widths[name] for name in widths if name in kinds), (0.025, 0.07))
    pen = unit * 1.5 * rng.uniform(*chosen)
    if field is None:
        ink = draw((height, width), [p * unit + centre for p in parts], pen, rng, over=2)
    else:  # a picture of a digit (MNIST's), printed
        side = int(tall * 1.4)
        picture = Image.fromarray(field).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.zeros((height, width))
        top, left = int(centre[1] - side / 2), int(centre[0] - side / 2)
        y0, x0 = max(0, top), max(0, left)
        part = (
            np.asarray(picture, float)[y0 - top :, x0 - left :][: height - y0, : width - x0] / 255
        )
        ink[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ink = ink * (1 - 0.25 * ndimage.gaussian_filter(rng.random((height, width)), 3))
    strength = rng.uniform(0.5, 0.9)
    paper = np.full((height, width), rng.uniform(0.8, 0.97))
    if "grey paper" in kinds:
        paper = paper * rng.uniform(0.45, 0.7)
    paper += ndimage.gaussian_filter(rng.normal(0, 1, paper.shape), 1.5) * 0.015
    if "specks" in kinds:
        for _ in range(rng.integers(3, 12)):
            cy, cx, r = (
                rng.uniform(0, height),
                rng.uniform(0, width),
                rng.uniform(1, 0.012 * height),
            )
            ink = np.maximum(ink, 0.8 * ((np.hypot(y * height - cy, x * width - cx)) < r))
    if "ruled line" in kinds:
        at = centre[1] + unit * rng.uniform(0.85, 1.1)
        tilt = rng.uniform(-0.03, 0.03)
        line = np.abs(y * height - at - tilt * (x * width - centre[0])) < max(1, 0.004 * height)
        ink = np.maximum(ink, rng.uniform(0.4, 0.8) * line)
    if "squared paper" in kinds:
        step = unit * rng.uniform(0.35, 0.8)
        lines = ((y * height) % step < 2) | ((x * width) % step < 2)
        paper = paper - rng.uniform(0.08, 0.18) * lines
    if "neighbour" in kinds:
        side = rng.choice([-1, 1])
        other = [p * unit for p in strokes(rng.integers(10), rng)]
        near = min(p[:, 0].min() for p in other) if side > 0 else max(p[:, 0].max() for p in other)
        edge = width - 0.06 * width if side > 0 else 0.06 * width
        ink = np.maximum(
            ink,
            draw((height, width), [p + [edge - near, centre[1]] for p in other], pen, rng, over=2),
        )
    image = paper * (1 - strength * ink)
    if "uneven light" in kinds:
        a, b = rng.uniform(-0.5, 0.5, 2)
        image = image * (0.75 + a * (x - 0.5) + b * (y - 0.5))
    if "shadow" in kinds:
        angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25)
        edge = (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5) - offset) / rng.uniform(
            0.02, 0.1
        )
        image = image * (1 - rng.uniform(0.2, 0.45) / (1 + np.exp(-edge.clip(-50, 50))))
    if "light on dark" in kinds:
        image = 1 - image
    picture = Image.fromarray((255 * image.clip(0, 1)).astype(np.uint8))
    if "perspective" in kinds:
        d = rng.uniform(-0.1, 0.1, 8) * np.array([width, height] * 4)
        quad = np.array([0, 0, 0, height, width, height, width, 0]) + np.abs(d) * np.array(
            [1, 1, 1, -1, -1, -1, -1, 1]
        )
        picture = picture.transform(
            picture.size, Image.Transform.QUAD, tuple(quad), Image.Resampling.BICUBIC
        )
    if "blur" in kinds:
        picture = picture.filter(
            ImageFilter.GaussianBlur(float(rng.uniform(0.003, 0.008) * height))
        )
    if "noise" in kinds:
        array = np.asarray(picture, float) + rng.normal(0, rng.uniform(8, 22), (height, width))
        picture = Image.fromarray(array.clip(0, 255).astype(np.uint8))
    if "jpeg" in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(15, 40)))
        picture = Image.open(buffer).convert("L")
    return picture


# --- how well it is read


def read(net, image):
    """Return the digit that is read, None where it is refused."""
    try:
        return predict_image(net, image)[0]
    except ValueError:
        return None


def right(kind, index):
    """Draw or print one digit, and tell whether it is read rightly."""
    rng = np.random.default_rng((index, *kind.encode()))
    digit = index % 10
    if kind == PRINTED:
        digit = int(test_data.targets[index])
        image = photo(digit, rng, field=test_data.data[index].numpy())
    else:
        image = scan(digit, rng) if kind == SCAN else photo(digit, rng, kind)
    return read(net, image) == digit


SCAN, PRINTED = "scan", "MNIST's test digits, printed"


def load(path):
    """Load the network, in each process."""
    global net, test_data
    torch.set_num_threads(1)
    test_data = load_data("MNIST")[1]
    net = Net().eval()
    net.load_state_dict(torch.load(path, map_location="cpu"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "runs" / "model.pt", help="weights of Net")
    parser.add_argument("--count", type=int, default=300, help="digits of each kind")
    parser.add_argument("--printed", type=int, default=10_000, help="of MNIST's test digits")
    args = parser.parse_args()
    if not Path(args.model).is_file():
        parser.error(f"there is no {args.model}: run the notebook, or name the weights by --model")
    counts = dict.fromkeys((SCAN, *KINDS, "all"), args.count) | {PRINTED: args.printed}
    print("| material | digits | right (%) |\n|---|---|---|")
    with Pool(initializer=load, initargs=(args.model,)) as pool:
        for kind, count in counts.items():
            jobs = [(kind, index) for index in range(count)]
            good = sum(pool.starmap(right, jobs, chunksize=10))
            print(f"| {kind} | {count:,} | {100 * good / count:.1f} |", flush=True)


if __name__ == "__main__":
    main()
