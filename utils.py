"""Train, test, data, plot and checkpoint helpers for small image classifiers."""

import base64
import contextlib
import copy
import hashlib
import io
import math
import os
import random
import sys
import warnings
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage
from skimage import filters, measure, morphology, segmentation
from torch.utils._pytree import tree_map
from torch.utils.data import Subset
from torchvision import datasets, transforms
from tqdm import tqdm

DIGESTS = {  # SHA-256 of a dataset's images and labels, training and test together
    "MNIST": "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b",
    "FashionMNIST": "ece172613115fb18b120bec8f6c02271af90b8b8f0a5af5c51cbd5ceed68e619",
}
CHUNK = 16  # batches prepared at once: fewer calls, and the chunk still fits in the cache
cleaned_folders = set()  # in which `save_checkpoint` has deleted what killed processes left
MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, scaled to 0…1; used for every dataset


def get_device():
    """Return the `torch.device` of the GPU (CUDA, MPS, XPU, …) or, without one, of the CPU."""
    accelerator = torch.accelerator
    return torch.device(accelerator.current_accelerator() if accelerator.is_available() else "cpu")


def set_seed(seed, epoch=None):
    """Seed all random numbers for a run, or for one `epoch` so that a resumed run repeats it."""
    if epoch is not None:  # mixed, not added: seed 0 in epoch 1 is not seed 1 in epoch 0
        seed = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits only
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def is_interactive():
    """Return whether someone sees the output live: in a terminal or in an open notebook."""
    ipython = sys.modules.get("IPython")  # imported already if a kernel is running
    kernel = ipython and getattr(ipython.get_ipython(), "kernel", None)
    is_terminal = getattr(sys.stdout, "isatty", bool)()
    return getattr(kernel, "_allow_stdin", True) if kernel else is_terminal  # papermill: no stdin


def train(
    model, device, train_loader, optimizer, criterion, train_losses=None, train_acc=None,
    *, scheduler=None, cuda_graph=False, verbose=True
):  # fmt: skip
    """Train `model` for one epoch and return its mean loss and its accuracy in percent.

    Both are means over the samples of all processes, taken before each optimizer step. If there are
    several processes, all must call this, and gradients are averaged as well.

    model: on `device`; its output has shape (N, classes).
    train_loader: any iterable of batches (data, target), with N integer labels in `target`.
    criterion: returns the mean over the batch or, if its `reduction` is "sum", the sum. With class
        weights, or labels that it ignores (-100), the mean loss depends on the batch size.
    train_losses, train_acc: lists to which the loss and the accuracy are appended.
    scheduler: stepped after each batch, as OneCycleLR expects. If yours counts epochs, as StepLR
        and ReduceLROnPlateau do, call its `step` yourself, after `train`.
    cuda_graph: on one CUDA GPU, record the forward and backward pass and replay it: `CudaGraph`.
    Raises FloatingPointError if the mean loss is not finite, ValueError if the loader is empty.
    """
    model.train()
    metrics = RunningMetrics(device, criterion, train_losses, train_acc)
    is_cuda = torch.device(device).type == "cuda"  # non-blocking copies are safe only there
    if dist.is_initialized() and not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = torch.nn.parallel.DistributedDataParallel(model)  # averages all gradients

    def forward_backward(data, target):  # a function, so that a CUDA graph can record it
        optimizer.zero_grad()
        output = model(data)
        loss = criterion(output, target)
        loss.backward()
        metrics.update(loss.detach(), output.detach(), target)

    use_graph = cuda_graph and is_cuda and not dist.is_initialized()
    run_batch = CudaGraph(forward_backward) if use_graph else forward_backward
    bar = tqdm(train_loader, "train", leave=False, file=sys.stdout, disable=not is_interactive())
    for data, target in bar:
        data = data.to(device, non_blocking=is_cuda)
        target = target.to(device, non_blocking=is_cuda)
        run_batch(data, target)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return metrics.finish("train", verbose, all_processes=True)


@torch.no_grad()
def test(model, device, test_loader, criterion, test_losses=None, test_acc=None, *, verbose=True):
    """Evaluate `model` and return its mean loss and its accuracy in percent.

    Arguments and errors as for `train`. Each process tests by itself: give it all batches.
    """
    model.eval()
    metrics = RunningMetrics(device, criterion, test_losses, test_acc)
    bar = tqdm(test_loader, "test", leave=False, file=sys.stdout, disable=not is_interactive())
    for data, target in bar:
        data, target = data.to(device), target.to(device)
        output = model(data)
        loss = criterion(output, target)
        metrics.update(loss, output, target)
    return metrics.finish("test", verbose)


@torch.no_grad()
def predict(model, device, loader, temperature=1.0):
    """Return `(predictions, probabilities, targets)` for all samples of a loader, in its order.

    They are on the CPU, of shapes (N,), (N, classes) and (N,). Dividing the logits by `temperature`
    changes only the probabilities (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
    """
    model.eval()
    probabilities, targets = [], []
    for data, target in loader:
        logits = model(data.to(device))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        probabilities.append(logits.softmax(dim=1).cpu())
        targets.append(target.cpu())
    probabilities = torch.cat(probabilities)
    predictions = probabilities.argmax(dim=1)
    return predictions, probabilities, torch.cat(targets).reshape(predictions.shape)


def get_correct_pred_count(pred, target):
    """Return how many of the N rows of `pred` (N, classes) have their maximum at `target` (N,)."""
    return (pred.argmax(dim=1) == target.reshape(len(pred))).sum().item()


class RunningMetrics:
    """Mean loss and accuracy of a pass. `update` never waits for the device."""

    def __init__(self, device, criterion, losses=None, accuracies=None):
        # Taken now: what is not a list, such as a scheduler in its place, fails before the epoch.
        self.append_loss = [].append if losses is None else losses.append
        self.append_accuracy = [].append if accuracies is None else accuracies.append
        keywords = getattr(criterion, "keywords", {})  # of a functools.partial
        inner = criterion.func if hasattr(criterion, "keywords") else criterion  # the loss in it
        self.is_sum = keywords.get("reduction", getattr(inner, "reduction", None)) == "sum"
        dtype = torch.float64 if torch.device(device).type in ("cpu", "cuda") else torch.float32
        self.sums = torch.zeros(3, dtype=dtype, device=device)  # loss, correct, samples
        torch.clear_autocast_cache()  # of weights from before, without gradients in PyTorch 2.6

    def update(self, loss, output, target):
        """Add a batch: output of shape (N, classes), target of shape (N,)."""
        self.sums[0].add_(loss, alpha=1 if self.is_sum else len(target))
        self.sums[1].add_((output.argmax(dim=1) == target.reshape(len(output))).sum())
        self.sums[2].add_(len(target))
        torch.clear_autocast_cache()  # or autocast would use these weights after the next step

    def finish(self, name, verbose, all_processes=False):
        """Return the loss and the accuracy in percent, append each to its list, and print both."""
        if all_processes and dist.is_initialized():
            dist.all_reduce(self.sums)
        loss, correct, count = self.sums.tolist()  # here the host waits for the device
        if count == 0:
            raise ValueError("the loader is empty")
        loss, accuracy = loss / count, 100 * correct / count
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}: learning rate too high, or labels -100?")
        self.append_loss(loss)
        self.append_accuracy(accuracy)
        if verbose:
            print(f"{name}: loss {loss:.4f}, accuracy {accuracy:.2f} %")
        return loss, accuracy


class CudaGraph:
    """A function of tensors, without a result, that is recorded and then replayed.

    The first batch of a new shape runs as usual; the second is recorded; it and later ones replay.
    The function must do the same for every batch and must not wait for the device.
    """

    def __init__(self, function):
        self.function, self.shape, self.graph = function, None, None

    def __call__(self, *batch):
        if batch[0].shape != self.shape:
            self.shape, self.graph = batch[0].shape, None
            return self.function(*batch)  # as usual, which also warms up CUDA's libraries
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in batch]  # every replay reads these
            self.graph = torch.cuda.CUDAGraph()  # below, "thread_local": other threads may use CUDA
            stream = torch.cuda.Stream(batch[0].device)  # on the batch's GPU, not the current one
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.function(*self.inputs)  # only records: nothing is computed yet
        for recorded, tensor in zip(self.inputs, batch, strict=True):
            recorded.copy_(tensor)
        self.graph.replay()


def load_data(name="auto", root=None):
    """Return `(train_data, test_data)` with `.data` (uint8, N×28×28), `.targets` and `.classes`.

    name: "MNIST", "FashionMNIST" or "KMNIST", downloaded to `root` if they are not there; "digits",
        scikit-learn's 1,797 small digits, which need no network; or "auto": MNIST, or digits with a
        warning if MNIST cannot be downloaded. What was loaded is in `.name`.
    root: folder of the data; by default the environment variable DATA_DIR, else "data".
    Raises ValueError for an unknown name or damaged files, RuntimeError if the download fails.
    """
    root = Path(root or os.environ.get("DATA_DIR") or "data").expanduser()
    if name == "auto":
        try:
            return load_data("MNIST", root)
        except RuntimeError as error:  # no network, no permission to write, …
            warnings.warn(f"USING THE SMALL SET 'digits' INSTEAD OF MNIST: {error}", stacklevel=2)
            return load_data("digits")
    if name not in ("MNIST", "FashionMNIST", "KMNIST", "digits"):
        raise ValueError(f"expected auto, MNIST, FashionMNIST, KMNIST or digits, got {name!r}")
    dataset = Digits if name == "digits" else getattr(datasets, name)
    folder = root / name / "raw"
    damaged = f"the files in '{folder}' are damaged: delete them to download them again"
    try:
        try:
            pair = [dataset(root, train=train) for train in (True, False)]
        except Exception:  # not there, or being written by another process
            with FileLock(root / f"{name}.lock"):  # waits for it
                pair = [dataset(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision raises errors of many types
        expected = [file.removesuffix(".gz") for file, _ in dataset.resources]
        found = sorted(path.name for path in folder.glob("*ubyte"))
        if all((folder / file).is_file() for file in expected):
            raise ValueError(damaged) from error
        advice = f"put {expected} into '{folder}' (found: {found}), or name another in DATA_DIR"
        kind = ValueError if len(found) >= 4 else RuntimeError  # there, under other names
        raise kind(f"cannot download {name}: {advice}. {error}") from error
    tensors = [tensor for data in pair for tensor in (data.data, data.targets)]
    digest = hashlib.sha256(b"".join(tensor.numpy() for tensor in tensors)).hexdigest()
    if (name in DIGESTS and digest != DIGESTS[name]) or max(d.targets.max() for d in pair) > 9:
        raise ValueError(damaged)  # KMNIST has no digest above, but its labels end at 9
    for data in pair:
        data.name = name
        data.classes = [label.split(" - ")[0] for label in data.classes]  # "7", not "7 - seven"
    return pair


class Digits(datasets.MNIST):
    """scikit-learn's 8×8 digits in MNIST's form: 1,437 to train and 360 to test; far easier."""

    def __init__(self, root, train=True, download=False):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        datasets.VisionDataset.__init__(self, root)  # MNIST's would look for files
        self.train = train
        digits = load_digits()
        split = train_test_split(range(1797), test_size=360, stratify=digits.target, random_state=0)
        indices = split[0 if train else 1]
        images = torch.from_numpy(digits.images[indices]).float().unsqueeze(1)  # (N, 1, 8, 8), 0…16
        images = F.interpolate(images * (255 / 16), size=(20, 20), mode="bicubic").clamp(0, 255)
        self.data = F.pad(images.round().to(torch.uint8), (4, 4, 4, 4)).squeeze(1)  # (N, 28, 28)
        self.targets = torch.from_numpy(digits.target[indices])


class BatchLoader:
    """A fast `DataLoader` for a dataset that fits on the device.

    Yields `(images, labels)` on `device`: float32 images (N, 1, H, W), normalised by MEAN and STD,
    and int64 labels (N,). The last batch may be smaller. Order and augmentation come from PyTorch's
    random numbers: see `set_seed`. Of several processes, each gets all batches or, if shuffled, its
    part of each batch: then all must iterate, and up to `world_size - 1` samples are left out.

    dataset: has `.data` (uint8, N×H×W), `.targets` (N integers) and no transform; or a
        `TensorDataset` of such images and labels; or a `Subset` of either.
    augment: a `RandomAffine`, for square images.
    """

    def __init__(self, dataset, batch_size, *, device="cpu", shuffle=False, augment=None):
        images, targets = _images_and_targets(dataset)
        self.images, self.targets = images.unsqueeze(1).to(device), targets.long().to(device)
        self.dataset, self.batch_size = dataset, batch_size
        self.shuffle, self.augment = shuffle, augment
        self._shard()  # checks the batch size

    def _shard(self):
        """Return rank, processes that share a batch (1 if unshuffled), and samples for each."""
        rank, world_size = 0, 1
        if self.shuffle and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        size, rest = divmod(self.batch_size, world_size)
        if not isinstance(size, int) or size < 1 or rest > 0:
            raise ValueError(f"cannot split batches of {self.batch_size} by {world_size} processes")
        return rank, world_size, size

    def __len__(self):
        _, world_size, size = self._shard()
        return math.ceil(len(self.images) // world_size / size)

    def __iter__(self):
        rank, world_size, size = self._shard()
        count, device = len(self.images), self.images.device
        order = (torch.randperm if self.shuffle else torch.arange)(count, device="cpu")
        if world_size > 1:
            dist.broadcast_object_list(orders := [order])  # NCCL sends no tensors of the CPU
            order = orders[0]
        mine = slice(rank, count // world_size * world_size, world_size)  # equally many for each
        order = order[mine].to(device)
        if self.augment:
            matrices = self.augment.sample(count)[mine].to(device)  # as one process would draw them
        for start in range(0, len(order), CHUNK * size):
            chunk = slice(start, start + CHUNK * size)
            images, labels = self.images[order[chunk]].float(), self.targets[order[chunk]]
            if self.augment:
                with torch.autocast(device.type, enabled=False):  # bfloat16 is too coarse
                    grid = F.affine_grid(matrices[chunk], images.shape, align_corners=False)
                images = F.grid_sample(images, grid, align_corners=False)
            images = images.sub_(255 * MEAN).div_(255 * STD)
            yield from zip(images.split(size), labels.split(size), strict=True)


def _images_and_targets(dataset):
    """Return images (N, H, W) and labels (N,), or the part of them that a `Subset` selects."""
    if isinstance(dataset, Subset):
        images, targets = _images_and_targets(dataset.dataset)
        index = torch.tensor(np.asarray(dataset.indices), device="cpu")
        is_mask = index.dtype in (torch.bool, torch.uint8) or index.is_floating_point()
        if len(index) > 0 and (is_mask or index.dim() != 1):
            raise ValueError(f"expected indices, such as mask.nonzero().flatten(), got {index[:3]}")
        return images[index.long()], targets[index.long()]
    if getattr(dataset, "transform", None) or getattr(dataset, "target_transform", None):
        raise ValueError("expected a dataset without a transform: a BatchLoader applies none")
    images, targets = getattr(dataset, "tensors", None) or (dataset.data, dataset.targets)
    images = torch.as_tensor(images, device="cpu")
    targets = torch.tensor(getattr(targets, "tolist", lambda: list(targets))(), device="cpu")
    is_uint8 = images.dtype == torch.uint8 and images.dim() == 3
    if not is_uint8 or targets.shape != images.shape[:1] or (targets != targets.long()).any():
        form = f"{images.dtype} {tuple(images.shape)} and {targets.dtype} {tuple(targets.shape)}"
        raise ValueError(f"expected uint8 images (N, H, W) and N integer labels, got {form}")
    return images, targets


class RandomAffine(transforms.RandomAffine):
    """torchvision's `RandomAffine`, with a `sample` that draws for each image. Shear is along x."""

    def __init__(self, degrees, translate=None, scale=None, shear=None):
        super().__init__(degrees, translate or (0.0, 0.0), scale or (1.0, 1.0), shear or 0.0)

    def sample(self, count):
        """Draw parameters for `count` images: matrices (count, 2, 3) for `F.affine_grid`."""
        x, y = self.translate
        limits = self.degrees, (-x, x), (-y, y), self.scale, self.shear
        angle, right, down, scale, shear = (
            torch.empty(count, dtype=torch.float32, device="cpu").uniform_(*pair) for pair in limits
        )
        angle, tan = angle.deg2rad(), shear.deg2rad().tan()
        cos, sin = angle.cos(), angle.sin()
        # F.affine_grid wants the way back: shift back, rotate by [[cos, sin], [-sin, cos]], shear
        # by [[1, tan], [0, 1]], divide by the scale. Its coordinates run from -1 to 1.
        rows = cos - sin * tan, sin + cos * tan, -sin, cos  # of shear @ rotation, row by row
        inverse = torch.stack(rows, dim=1).view(-1, 2, 2) / scale.view(-1, 1, 1)
        shift = torch.stack((right, down), dim=1).unsqueeze(1)  # (count, 1, 2)
        offset = -2 * (inverse * shift).sum(2, keepdim=True)  # not by @: autocast would round it
        return torch.cat((inverse, offset), dim=2)


# --- one photo or scan; limits from MNIST's training digits and tests/handwriting.py's drawings
def predict_image(model, image, temperature=1.0):
    """Recognise one handwritten digit in a photo or scan: `(digit, probabilities, model_input)`.

    probabilities: float tensor (classes,) on the CPU that sums to 1.
    model_input: what the model saw, a uint8 array (28, 28), light on dark, in MNIST's form: scaled
        to 20 pixels, its centre of mass in the middle (http://yann.lecun.com/exdb/mnist).
    model: gives logits or log-probabilities (1, classes). temperature: as for `predict`.
    image: a path, a file's bytes, a PIL image, or an array (H, W), (H, W, C) or (C, H, W), whose
        one to four channels are averaged: (3, H, W) is taken for one image in colour, not for three
        grey ones. Dark on light or light on dark, with some paper around the digit.
    Raises ValueError if the image cannot be read, or does not show one digit.
    """
    model_input = _mnist_form(_find_digit(_small_grey(image)))
    weight = next(model.parameters(), torch.empty(0))  # has the model's dtype and device
    data = (torch.from_numpy(model_input).to(weight) / 255 - MEAN) / STD
    batch = data[None, None], torch.zeros(1)  # (1, 1, 28, 28), and a label that is not used
    digits, probabilities, _ = predict(model, weight.device, [batch], temperature)
    return int(digits[0]), probabilities[0], model_input


def _small_grey(image):
    """Return an image in grey and upright, its longer side 200 pixels, as a PIL image."""
    if isinstance(image, np.ndarray | torch.Tensor):
        array = np.atleast_3d(np.asarray(image, np.float32).squeeze())
        axis = np.argmin(array.shape)  # the shortest is that of the channels
        if array.shape[axis] > 4 or image.ndim < 2 or (image.ndim > 3 and len(image) > 1):
            raise ValueError(f"expected one image, got shape {tuple(image.shape)}")
        image = Image.fromarray(array.mean(axis))
    try:
        file = io.BytesIO(image) if isinstance(image, bytes | bytearray | memoryview) else image
        photo = ImageOps.exif_transpose(file if isinstance(file, Image.Image) else Image.open(file))
    except Exception as error:  # Pillow raises errors of many types
        raise ValueError(f"cannot read the image {str(image)[-99:]!r}: {error!s:.199}") from error
    if photo.has_transparency_data:  # on grey, black ink and white ink can both be seen
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "grey"), photo.convert("RGBA"))
    photo = photo.convert("F")
    return Image.fromarray(np.clip(ImageOps.contain(photo, (200, 200)), *photo.getextrema()))


def _find_digit(grey):
    """Return the digit in a grey PIL image, an array (H, W): 1 in its ink, 0 in all else."""
    grey, thickest = _with_paper_around(grey)  # of the digit's side; hands and stains are thicker
    middle = np.outer(np.hanning(grey.height + 2), np.hanning(grey.width + 2))[1:-1, 1:-1]
    for ink_mask, ink in _ink_masks(grey, middle):
        labels = measure.label(ink_mask)
        inside = segmentation.clear_border(labels)  # labels, but 0 in parts that the border cuts
        weights = np.bincount(labels.flat, (middle * ink_mask).flat)  # by label: large and central
        parts = sorted(measure.regionprops(labels), key=lambda part: -weights[part.label])
        digit = next((part for part in parts if _may_be_digit(part, inside, thickest)), None)
        if digit is None:
            continue
        mask = (inside > 0) | (labels == digit.label)  # the digit, and parts clear of the border
        wide = morphology.isotropic_dilation(mask, 4)  # closes gaps of up to 8 pixels
        numbers = measure.label(wide) * mask  # parts that `wide` joins share a number
        group = numbers == numbers[tuple(digit.coords[0])]  # the digit and the strokes near it
        for part in parts:
            is_large = part.label in inside and weights[part.label] > 0.2 * weights[digit.label]
            if is_large and _is_another_digit(part, digit, is_near=group[tuple(part.coords[0])]):
                raise ValueError("found several digits in the image: expected only one")
        return ink * ndimage.binary_dilation(group, np.ones((3, 3)))  # with its soft edges
    raise ValueError("found no digit in the image: expected one, with some paper around it")


def _with_paper_around(grey):
    """Return the image, with paper around a digit that was cut out, and its greatest thickness."""
    pixels = np.asarray(grey)
    dark = pixels < filters.threshold_otsu(pixels)
    if not dark.any() or np.corrcoef(dark.flat, pixels.flat)[0, 1] > -0.85:
        return grey, 0.35  # not black and white: two greys give -1, a normal distribution -0.8
    for ink in dark, ~dark:
        reaches_sides = min(ink[:9].any(), ink[-9:].any(), ink[:, :9].any(), ink[:, -9:].any())
        edge = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        if reaches_sides and 0.15 < ink.mean() < 0.7 and edge.mean() < 0.8 * ink.mean():
            return ImageOps.expand(grey, 50, float(np.median(pixels[~ink]))), 0.5
    return grey, 0.35


def _ink_masks(grey, middle):
    """Yield masks of what may be ink, ever stricter, each with its ink as an array of 0 to 1."""
    # A median over most of a tiny copy is the paper without the ink, with its shades and shadows.
    tiny = grey.resize((40, 40), Image.Resampling.BOX)
    paper = tiny.filter(ImageFilter.MedianFilter(33)).resize(grey.size)
    pixels = np.asarray(grey)
    sharp = np.asarray(paper, float) - pixels
    sharp *= np.sign((middle * sharp**3).sum())  # flips light ink, < 0 (**3: strong ink decides)
    ink = ndimage.gaussian_filter(sharp, 0.7)
    faintest = 0.06 * np.abs(pixels).max()  # the least contrast of ink with its paper
    threshold = filters.threshold_otsu(ink)
    for contrast in (1, 1.5, 1.5):  # later masks must stand out more
        mask = filters.apply_hysteresis_threshold(ink, 0.7 * threshold, threshold)
        noise = ink[~mask].std()
        if mask.any() and ink[mask].mean() > contrast * max(faintest, 3 * noise):
            yield mask, (sharp / (1.5 * threshold)).clip(0, 1)  # even strokes, as in MNIST
        threshold = filters.threshold_otsu(ink[ink >= threshold])  # drops shades and lines


def _may_be_digit(part, inside, thickest):
    """Return whether a part of the ink is not a speck, line, grid, blob or shadow."""
    height, width = part.image.shape
    side = max(height, width)
    if side < 8 or width > 3 * height:
        return False
    ink, reach = np.pad(part.image, 6), 0.02 * side
    wide = morphology.isotropic_dilation(ink, reach)  # closes pinholes and breaks of rough strokes
    gaps = (np.bincount(measure.label(~mask, connectivity=1).flat)[1:] for mask in (ink, wide))
    holes = max((areas > 0.001 * side**2).sum() for areas in gaps) - 1  # larger than pinholes
    radius = ndimage.distance_transform_edt(wide).max() - 1 - reach  # 0 for a thin line
    is_blob = 2 * radius * part.solidity >= thickest * side  # thick and compact
    is_whole = part.label in inside  # else the border cuts it; cut and compact, it is a shadow
    return holes <= 3 and not is_blob and (is_whole or part.solidity < 0.7)


def _is_another_digit(part, digit, is_near):
    """Return whether a part is another digit. `is_near`: it is in the group around `digit`."""
    top, left, bottom, right = digit.bbox
    is_beside = part.bbox[3] <= left or part.bbox[1] >= right
    is_above_or_below = part.bbox[2] <= top or part.bbox[0] >= bottom
    relative_height = len(part.image) / len(digit.image)
    if is_near:  # it is a stroke, unless beside the digit and as tall
        return is_beside and 0.8 < relative_height < 1.25
    return (is_beside or is_above_or_below) and relative_height > 0.6


def _mnist_form(digit):
    """Scale a digit's ink to 20 pixels and centre its mass in a uint8 image (28, 28)."""
    rows, columns = np.nonzero(digit > 0.5 * digit.max())
    scale = (max(np.ptp(rows), np.ptp(columns)) + 1) / 20  # pixels per result pixel
    soft = ndimage.gaussian_filter(digit, 0.4 * scale)
    corner = np.array(ndimage.center_of_mass(soft)) - 13.5 * scale  # 13.5: the middle of 0 to 27
    image = ndimage.affine_transform(soft, scale * np.eye(2), corner, (28, 28), order=1)
    return (255 * image / image.max()).round().astype(np.uint8)


# --- plots: each draws a new pyplot figure and leaves it open, to be shown or saved
def plot_train_metrics(train_losses, train_acc, test_losses, test_acc):
    """Plot loss and accuracy (percent) by epoch, train against test, whose lists may be empty."""
    count, *others = map(len, (train_losses, train_acc, test_losses, test_acc))
    if count == 0 or others not in ([count] * 3, [count, 0, 0]):
        raise ValueError(f"no epoch is complete yet, or lists differ in length: {[count, *others]}")
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves = ("train", train_losses, train_acc), ("test", test_losses, test_acc)
    for name, losses, acc in curves if len(test_acc) > 0 else curves[:1]:
        epochs = range(1, count + 1)
        left.plot(epochs, losses, ".-", label=f"{name} {losses[-1]:.4f}")
        right.plot(epochs, acc, ".-", label=f"{name} {acc[-1]:.2f} %")
    limit = 100.1  # the scale's infinity: above 100 %, so that 100 % can be drawn
    bottom = limit - 1.1 * (limit - min([*train_acc, *test_acc]))  # 1.1 times the worst's distance
    right.set_ylim(bottom, 100.02)  # leaves room for a marker at 100 %
    to_axis, from_axis = (lambda acc: -np.log(limit - acc)), (lambda y: limit - np.exp(-y))
    right.set_yscale("function", functions=(to_axis, from_axis))  # wider towards 100 %
    ticks = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 100)
    right.set_yticks([tick for tick in ticks if tick >= bottom])
    right.yaxis.set_major_formatter("{x:g}")
    for axes, name in ((left, "loss"), (right, "accuracy (%)")):
        axes.set(xlabel="epoch", ylabel=name, xticks=[1, *range(count, 1, -math.ceil(count / 8))])
        axes.grid(alpha=0.3)
        axes.legend(title=f"after epoch {count}")


def plot_images(images, titles):
    """Plot up to 24 images, (N, H, W) or (N, channels, H, W), each under its title."""
    images = torch.as_tensor(images[:24]).detach().cpu().float()
    if len(images) > 0:
        images = (images - images.min()) / (images.max() - images.min()).clamp(min=1e-9)
    if images.dim() == 4:
        images = images.movedim(1, -1).squeeze(-1)
    rows = max(1, math.ceil(len(images) / 8))  # each 1.53 inches: 11 / 8 of image, the rest title
    _, grid = plt.subplots(rows, 8, figsize=(11, 1.53 * rows), layout="constrained")
    plt.setp(grid, frame_on=False, xticks=[], yticks=[])
    for axes, image, name in zip(grid.flat, images, titles, strict=False):
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=10 if len(str(name)) < 16 else 6)


def plot_sample_data(data_loader):
    """Plot up to 24 images of the first batch, as the model sees them, with their labels."""
    with torch.random.fork_rng(devices=[]):  # the loader must not use up the run's numbers
        images, labels = next(iter(data_loader))
    if isinstance(labels, torch.Tensor):
        labels = labels.reshape(len(images)).tolist()
    dataset = getattr(data_loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", ())
    names = dict(names if isinstance(names, dict) else enumerate(names))
    plot_images(images, [names.get(label, label) for label in labels])


def plot_misclassified(images, predictions, probabilities, targets, classes):
    """Plot up to 24 of the images (N, H, W) that `predict` got wrong, the most confident first."""
    lengths = [len(values) for values in (images, predictions, probabilities, targets)]
    if min(lengths) < max(lengths):
        raise ValueError(f"expected images and what `predict` returned for them, got {lengths}")
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    score = 100 * torch.as_tensor(probabilities).detach().double().amax(dim=1).numpy()
    wrong = sorted(np.flatnonzero(predictions != targets), key=lambda i: -score[i])[:24]
    names = [f"{classes[targets[i]]} → {classes[predictions[i]]}, {score[i]:.0f} %" for i in wrong]
    plot_images(images[wrong], names)


def plot_prediction(image, probabilities, model_input, classes):
    """Plot an image, what the model saw of it, and the probability of each class."""
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    left.imshow(np.asarray(_small_grey(image)), cmap="gray")  # upright, as it is read
    middle.imshow(model_input, cmap="gray", vmin=0, vmax=255)
    left.set(xlabel="the image, in grey", xticks=[], yticks=[])
    middle.set(xlabel="what the model sees", xticks=[], yticks=[])
    names = [classes[number] for number in range(len(probabilities))]  # of a list or a dictionary
    right.bar_label(right.barh(names, 100 * np.asarray(probabilities)), fmt="{:.0f} %", padding=4)
    right.set(xlabel="probability (%)", xlim=(0, 120), xticks=range(0, 101, 20))
    right.invert_yaxis()


# --- checkpoints, and several processes
def save_checkpoint(path, epoch, hyperparameters, **state):
    """Save a run after `epoch`. If the process is killed, `path` holds the old file or the new one.

    hyperparameters: a dictionary of numbers and strings by which the run is recognised.
    state: by name, what has a `state_dict()` (model, optimizer, scheduler), and lists.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    parts = {k: v if isinstance(v, list) else v.state_dict() for k, v in state.items()}
    parts |= {"epoch": epoch, "hyperparameters": hyperparameters}
    plain = tree_map(lambda x: x.item() if isinstance(x, np.generic) else x, parts)
    plain |= {k: v for k, v in parts.items() if hasattr(v, "_metadata")}  # tree_map drops it
    torch.save(plain, buffer := io.BytesIO())
    torch.load(io.BytesIO(buffer.getbuffer()), "cpu", weights_only=True)  # unreadable? fail now
    target = Path(path).resolve()  # what a link points to
    if target.parent not in cleaned_folders:  # once in a process, or others might never end
        cleaned_folders.add(target.parent)
        for leftover in target.parent.glob("[0-9a-f]" * 16 + ".new"):
            leftover.unlink(missing_ok=True)  # its process was killed, or is saving: see below
    temporary = target.with_name(os.urandom(8).hex() + ".new")  # of this process alone
    try:
        while True:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):  # another process took it for a leftover
                return os.replace(temporary, target)  # at once, or not at all
    finally:
        temporary.unlink(missing_ok=True)  # if writing failed


def load_checkpoint(path, hyperparameters, **state):
    """Restore `state` from a checkpoint, lists in place, and return the number of epochs done.

    Arguments as for `save_checkpoint`. No code in the file is run. Raises ValueError if the file is
    damaged, or belongs to a run with other hyperparameters.
    """
    if dist.is_initialized():
        dist.barrier()  # wait until the first process has written the file
    file = io.BytesIO(Path(path).read_bytes())
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        saved = checkpoint["hyperparameters"]
        if zipfile.ZipFile(file).testzip():  # compares CRC32s, which torch.load does not
            raise ValueError("wrong CRC32")
    except Exception as error:  # zipfile and torch.load raise errors of many types
        raise ValueError(f"'{path}' is damaged or not a checkpoint: delete it") from error
    if saved != hyperparameters:
        pairs = (saved, hyperparameters), (hyperparameters, saved)
        then, now = ({k: v for k, v in one.items() if v != other.get(k)} for one, other in pairs)
        raise ValueError(f"'{path}' has {then}, not {now}: restore them, or set RESUME = False")
    for name, part in state.items():
        if isinstance(part, list):
            part[:] = checkpoint[name]
        else:
            part.load_state_dict(checkpoint[name])
    return checkpoint["epoch"]


def init_distributed():
    """Join torchrun's processes, if any, and return this one's device: its own GPU or the CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return get_device()
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def end_distributed():
    """End every process except the first, which continues alone."""
    if dist.is_initialized():
        rank = dist.get_rank()
        dist.destroy_process_group()
        if rank > 0:
            sys.exit()


PAD_SCRIPT = """
export default { render({ model, el }) {
  el.innerHTML = `<canvas style="border: 1px solid; max-width: 100%; touch-action: none" role="img"
    aria-label="draw here"></canvas><br><button>Clear</button> <span role="status"></span><br>
    <label>or a photo: <input type="file" accept="image/*" style="color: transparent"></label>`;
  const [canvas, button, note, file] = el.querySelectorAll("canvas, button, span, input");
  const pen = canvas.getContext("2d");
  const clear = (width, height, paper) => {
    [canvas.width, canvas.height, pen.lineWidth, pen.fillStyle] = [width, height, 7, paper];
    pen.lineCap = pen.lineJoin = "round"; pen.fillRect(0, 0, width, height);
  };
  const line = canvas.onpointermove = ({ isPrimary, pointerId, offsetX, offsetY }, dot = 0) => {
    if (!isPrimary || !canvas.hasPointerCapture(pointerId)) return;
    const scale = canvas.width / canvas.clientWidth;  // a narrow window shrinks the canvas
    pen.lineTo(scale * offsetX + dot, scale * offsetY); pen.stroke();
  };
  const send = (url) => { model.set("drawing", url); model.save_changes(); };
  model.on("change:drawing", () => { note.innerText = model.get("drawing") && "…"; });
  model.on("msg:custom", ([url, text]) => url === model.get("drawing") && (note.innerText = text));
  canvas.onmousedown = (e) => e.preventDefault();  // no dragging of selected text
  canvas.onpointerdown = (e) => {
    if (!e.isPrimary || e.button > 0) return;  // a second finger, or not the left mouse button
    canvas.setPointerCapture(e.pointerId); pen.beginPath(); line(e); line(e, 0.1);  // a dot
  };
  canvas.onlostpointercapture = () => send(canvas.toDataURL());
  button.onclick = () => { clear(320, 320, "white"); send(""); };
  file.onchange = async () => {
    const photo = await createImageBitmap(file.files[0]).catch(() => null);
    file.value = "";  // so that it can be chosen again; "no file chosen" is transparent
    if (!photo) { note.innerText = "cannot read the file: choose a JPEG or PNG image"; return; }
    const scale = 320 / Math.max(photo.width, photo.height);
    clear(Math.ceil(scale * photo.width), Math.ceil(scale * photo.height), "grey");
    pen.drawImage(photo, 0, 0, canvas.width, canvas.height); send(canvas.toDataURL());
  };
  clear(320, 320, "white");
} };
"""


def drawing_pad(model, classes, temperature=1.0):
    """Return a widget that recognises a drawn or uploaded digit with a copy of `model` made now."""
    if not is_interactive():
        return print("Drawing pad: run all cells in Jupyter or Colab to draw a digit here.")
    import anywidget
    import traitlets
    from ipywidgets import Output, VBox

    class Pad(anywidget.AnyWidget):
        _esm = PAD_SCRIPT
        drawing = traitlets.Unicode().tag(sync=True)  # a PNG, as a data URL; empty if cleared

    model = copy.deepcopy(model)  # Jupyter may answer while a cell trains the original
    pad, output = Pad(), Output()

    @output.capture(clear_output=True, wait=True)
    def answer(change):
        image = base64.b64decode(pad.drawing.partition(",")[2])
        try:
            digit, probabilities, model_input = predict_image(model, image, temperature)
        except ValueError as error:
            pad.send([pad.drawing, str(error) if image else ""])
            return output.clear_output()
        pad.send([pad.drawing, f"{classes[digit]}, {100 * probabilities[digit]:.0f} %"])
        plot_prediction(image, probabilities, model_input, classes)
        plt.show()

    pad.observe(answer, "drawing")
    return VBox([pad, output])
