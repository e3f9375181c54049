"""Train, test, data, plot and checkpoint helpers for small image classifiers."""

import base64
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
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage
from skimage import filters, measure, morphology, segmentation
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Subset
from torchvision import datasets, transforms
from tqdm import tqdm

DIGESTS = {  # SHA-256 of the images and labels of both splits
    "MNIST": "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b",
    "FashionMNIST": "ece172613115fb18b120bec8f6c02271af90b8b8f0a5af5c51cbd5ceed68e619",
}
CHUNK = 16  # batches that BatchLoader prepares at a time: fewer calls, and it still fits a cache
MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, scaled to 0…1; used for every dataset


# --- set-up


def get_device():
    """Return the `torch.device` of this machine's GPU (CUDA, MPS, XPU, …), or else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def set_seed(seed):
    """Seed Python, NumPy and PyTorch, and make cuDNN deterministic.

    Call it before the model is made, and with another seed before each epoch: then an epoch's
    random numbers, such as dropout's, are the same in a run that was resumed.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def is_interactive():
    """Return whether someone sees the output live: in a terminal, or a notebook that is open."""
    ipython = sys.modules.get("IPython")  # already imported if a kernel is running
    kernel = ipython and getattr(ipython.get_ipython(), "kernel", None)
    return sys.stdout.isatty() if kernel is None else getattr(kernel, "_allow_stdin", True)


# --- train and test


def train(
    model,
    device,
    train_loader,
    optimizer,
    criterion,
    train_losses=None,
    train_acc=None,
    *,
    scheduler=None,
    cuda_graph=False,
    verbose=True,
):
    """Train `model` for one epoch and return its mean loss and its accuracy in percent.

    Both are means over the samples, measured before each optimizer step. If there are several
    processes, all must call this: gradients are averaged over them, and metrics over all samples.

    model: gives an output of shape (N, classes); is on `device`.
    train_loader: any iterable of batches (data, target), with N integer labels in `target`.
    criterion: returns the mean over the batch or, if its `reduction` is "sum", the sum.
    train_losses, train_acc: lists to which the loss and the accuracy are appended.
    scheduler: one that is stepped after each batch, such as OneCycleLR. Others, such as StepLR or
        ReduceLROnPlateau, count epochs: call their `step` yourself, after `train`.
    cuda_graph: on one CUDA GPU, record the forward and backward pass and replay it: `CudaGraph`.
    verbose: whether to print the loss and the accuracy.

    Raises FloatingPointError if the mean loss is not finite, ValueError if the loader is empty.
    """
    model.train()
    metrics = RunningMetrics(criterion, train_losses, train_acc)
    is_cuda = torch.device(device).type == "cuda"  # non-blocking copies are safe only there
    if dist.is_initialized() and not isinstance(model, DistributedDataParallel):
        model = DistributedDataParallel(model)  # averages the gradients of all processes

    def forward_backward(data, target):
        optimizer.zero_grad()
        output = model(data)
        loss = criterion(output, target)
        loss.backward()
        metrics.update(loss.detach(), output.detach(), target)

    if cuda_graph and is_cuda and not dist.is_initialized():
        forward_backward = CudaGraph(forward_backward)
    for data, target in progress_bar(train_loader, "train"):
        data = data.to(device, non_blocking=is_cuda)
        target = target.to(device, non_blocking=is_cuda)
        forward_backward(data, target)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return metrics.finish("train", verbose, all_processes=True)


@torch.no_grad()
def test(model, device, test_loader, criterion, test_losses=None, test_acc=None, *, verbose=True):
    """Evaluate `model` and return its mean loss and its accuracy in percent.

    Arguments and errors as for `train`. If there are several processes, each returns the means over
    its own batches: give it the whole test set, as a BatchLoader without `shuffle` does.
    """
    model.eval()
    metrics = RunningMetrics(criterion, test_losses, test_acc)
    for data, target in progress_bar(test_loader, "test"):
        data, target = data.to(device), target.to(device)
        output = model(data)
        loss = criterion(output, target)
        metrics.update(loss, output, target)
    return metrics.finish("test", verbose)


test.__test__ = False  # not a test, though pytest would take it for one


def progress_bar(loader, name):
    """Show the progress of a pass over `loader`, and remove it at the end."""
    return tqdm(loader, name, leave=False, file=sys.stdout, disable=not is_interactive())


class RunningMetrics:
    """Mean loss and accuracy over the samples of a pass. `update` never waits for the device."""

    def __init__(self, criterion, losses=None, accuracies=None):
        # Taken now, so that anything that is not a list fails before the pass, not after it.
        self.appends = [([] if x is None else x).append for x in (losses, accuracies)]
        parts = criterion, getattr(criterion, "func", None)  # of a functools.partial
        reductions = [getattr(part, "reduction", None) for part in parts]
        self.is_sum = "sum" in (getattr(criterion, "keywords", {}).get("reduction"), *reductions)
        self.sums = None  # a tensor on the device: loss, correct predictions, samples

    def update(self, loss, output, target):
        """Add a batch: output of shape (N, classes), target of shape (N,)."""
        correct = _correct(output, target)
        count = torch.full_like(correct, len(target))
        # not every other accelerator has float64
        wide = torch.float64 if output.device.type in ("cpu", "cuda") else torch.float32
        loss = loss.to(wide) * (1 if self.is_sum else len(target))
        sums = torch.stack((loss, correct.to(wide), count.to(wide)))
        if self.sums is None:
            self.sums = torch.zeros_like(sums)
        self.sums += sums  # in place, so that a CUDA graph can replay it

    def finish(self, name, verbose, all_processes=False):
        """Return the loss and the accuracy in percent, append each to its list, and print both."""
        if self.sums is None:
            raise ValueError("the loader is empty")
        if all_processes and dist.is_initialized():
            dist.all_reduce(self.sums)
        loss, correct, count = self.sums.tolist()  # here the host waits for the device
        loss, accuracy = loss / count, 100 * correct / count
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}: is the learning rate too high?")
        for append, value in zip(self.appends, (loss, accuracy), strict=True):
            append(value)
        if verbose:
            print(f"{name}: loss {loss:.4f}, accuracy {accuracy:.2f} %")
        return loss, accuracy


class CudaGraph:
    """A function of tensors, which returns nothing, as a CUDA graph: one launch for each batch.

    The first batch of a new shape runs as usual, the second is recorded, the others are replayed.
    The function must do the same for every batch and must not wait for the device.
    """

    def __init__(self, function):
        self.function, self.shape, self.graph = function, None, None

    def __call__(self, *inputs):
        if inputs[0].shape != self.shape:  # also the first call, which warms up CUDA's libraries
            self.shape, self.graph = inputs[0].shape, None
            return self.function(*inputs)
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(inputs[0].device)
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.function(*self.inputs)
        for static, tensor in zip(self.inputs, inputs, strict=True):
            static.copy_(tensor)
        self.graph.replay()


@torch.no_grad()
def predict(model, device, loader, temperature=1.0):
    """Return `(predictions, probabilities, targets)` for all samples of a loader, in its order.

    They are on the CPU, of shapes (N,), (N, classes) and (N,). The logits are divided by
    `temperature`, which changes the probabilities but not the predictions (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599).
    """
    model.eval()
    batches = [
        ((model(data.to(device)) / temperature).softmax(dim=1).cpu(), target.cpu())
        for data, target in loader
    ]
    probabilities, targets = map(torch.cat, zip(*batches, strict=True))
    _correct(probabilities, targets)  # refuses targets of another shape
    return probabilities.argmax(dim=1), probabilities, targets


def get_correct_pred_count(pred, target):
    """Return how many of the N rows of `pred` (N, classes) have their maximum at `target` (N,)."""
    return _correct(pred, target).item()


def _correct(output, target):
    if target.shape != output.shape[:1]:  # (N, 1) would be compared with every row
        raise ValueError(f"expected {len(output)} class numbers, got {tuple(target.shape)}")
    return (output.argmax(dim=1) == target).sum()


# --- several processes, started by torchrun


def init_distributed():
    """Join the processes that `torchrun` started, if any, and return this one's `torch.device`.

    Of several processes, each gets a CUDA GPU of its own or, without CUDA, the CPU.
    """
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
    """End all processes but the first, which goes on alone."""
    if dist.is_initialized():
        rank = dist.get_rank()
        dist.destroy_process_group()
        if rank > 0:
            sys.exit()


# --- data


def load_data(name="auto", root=None):
    """Return `(train_data, test_data)` with `.data` (uint8, N×28×28), `.targets` and `.classes`.

    name: "MNIST", "FashionMNIST" or "KMNIST", downloaded to `root` if they are not there; "digits",
        scikit-learn's 1,797 small digits, which need no network; or "auto": MNIST, or digits with a
        warning if MNIST cannot be downloaded. What was loaded is in `.name`.
    root: folder of the data; by default the environment variable DATA_DIR, else "data".

    Raises ValueError if the files are damaged, RuntimeError if they cannot be downloaded.
    """
    root = Path(root or os.environ.get("DATA_DIR") or "data").expanduser()
    if name == "auto":
        try:
            return load_data("MNIST", root)
        except RuntimeError as error:  # no network, no permission to write, …
            warnings.warn(f"USING THE SMALL SET 'digits' INSTEAD OF MNIST: {error}", stacklevel=2)
            name = "digits"
    names = "MNIST", "FashionMNIST", "KMNIST", "digits"
    if name not in names:
        raise ValueError(f"expected 'auto' or one of {names}, got {name!r}")
    dataset = Digits if name == "digits" else getattr(datasets, name)
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()  # the first process downloads
    folder = root / name / "raw"
    damage = f"the files in '{folder}' are damaged: delete them to download them again"
    try:
        pair = [dataset(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision raises errors of many types
        if len(list(folder.glob("*-ubyte"))) == 4:  # they are there, but cannot be decoded
            raise ValueError(damage) from error
        advice = f"put its four files into '{folder}', or name another folder in DATA_DIR"
        raise RuntimeError(f"cannot download {name}: {advice}. {error}") from error
    finally:
        if dist.is_initialized() and dist.get_rank() == 0:
            dist.barrier()
    tensors = [tensor for data in pair for tensor in (data.data, data.targets)]
    digest = hashlib.sha256(b"".join(tensor.numpy() for tensor in tensors)).hexdigest()
    if DIGESTS.get(name, digest) != digest or max(data.targets.max() for data in pair) > 9:
        raise ValueError(damage)
    for data in pair:
        data.name = name
        data.classes = [label.split(" - ")[0] for label in data.classes]  # "7", not "7 - seven"
    return pair


class Digits(datasets.MNIST):
    """scikit-learn's 8×8 digits, enlarged to MNIST's form: 1,437 for training and 360 for test.

    Far fewer and easier than MNIST's: their accuracies do not compare. Source: Alpaydin and Kaynak,
    Optical Recognition of Handwritten Digits, UCI, 1998.
    """

    def __init__(self, root, train=True, download=False):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        datasets.VisionDataset.__init__(self, root)
        self.train = train
        digits = load_digits()
        split = train_test_split(range(1797), test_size=360, stratify=digits.target, random_state=0)
        split = split[0 if train else 1]
        images = torch.from_numpy(digits.images[split]).float().unsqueeze(1)  # (N, 1, 8, 8), 0…16
        images = F.interpolate(images * (255 / 16), size=(20, 20), mode="bicubic").clamp(0, 255)
        self.data = F.pad(images.round().to(torch.uint8), (4, 4, 4, 4)).squeeze(1)  # (N, 28, 28)
        self.targets = torch.from_numpy(digits.target[split])


class BatchLoader:
    """A fast `DataLoader` for a dataset that fits on the device.

    Yields `(images, labels)` on `device`: float32 images (N, 1, H, W), normalised by MEAN and STD,
    and int64 labels (N,). The last batch may be smaller.

    Order and augmentation depend on `seed` and `epoch` alone. Each pass adds 1 to `epoch`; set it
    before each pass of a run that may be resumed.

    If there are several processes, a loader that shuffles splits every batch among them and leaves
    out up to `world_size - 1` samples; any other gives each process everything.

    dataset: has `.data`, uint8 of shape (N, H, W), and `.targets`, N integers, and no transform; or
        is a `Subset` of such a dataset.
    augment: a `RandomAffine`.
    """

    def __init__(self, dataset, batch_size, *, device="cpu", shuffle=False, augment=None, seed=0):
        indices = slice(None)
        while isinstance(dataset, Subset):
            indices = torch.as_tensor(dataset.indices, dtype=torch.long)[indices]
            dataset = dataset.dataset
        images, targets = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        transform = [getattr(dataset, f"{name}transform", None) for name in ("", "target_")]
        form = images.dtype, images.dim(), targets.shape, any(transform)
        if form != (torch.uint8, 3, images.shape[:1], False):
            form = f"{images.dtype} {tuple(images.shape)}, {tuple(targets.shape)}, {transform}"
            raise ValueError(f"expected uint8 images (N, H, W), N labels, no transform; got {form}")
        if not isinstance(augment, RandomAffine | None):
            raise TypeError(f"expected utils.RandomAffine(…), got {augment}")
        self.batch_size = BatchSampler((), batch_size, False).batch_size  # checked as DataLoader's
        self.dataset, self.shuffle, self.augment = dataset, shuffle, augment
        self.images = images[indices].unsqueeze(1).to(device)
        self.targets = targets[indices].long().to(device)
        self.epoch, self.seed = 0, np.random.SeedSequence((seed, 0)).entropy[0]  # checks it

    def __len__(self):
        shard, batch_size = self._shard()
        return math.ceil(len(range(len(self.images))[shard]) / batch_size)

    def _shard(self):
        """Return which positions in a pass are this process's, and the size of its batches."""
        if not (self.shuffle and dist.is_initialized()):
            return slice(None), self.batch_size
        rank, size = dist.get_rank(), dist.get_world_size()
        if self.batch_size % size > 0:
            raise ValueError(f"batch size {self.batch_size} is not a multiple of {size} processes")
        stop = len(self.images) // size * size  # shards of equal size
        return slice(rank, stop, size), self.batch_size // size

    def __iter__(self):
        count, device = len(self.images), self.images.device
        # SeedSequence mixes the two: seed 0 in epoch 1 is not seed 1 in epoch 0.
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        self.epoch += 1
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        shard, batch_size = self._shard()
        order = order[shard].to(device)
        if self.augment:
            matrices = self.augment.sample(count, generator)[shard].to(device)
        chunk = CHUNK * batch_size
        for start in range(0, len(order), chunk):
            index = order[start : start + chunk]
            images, labels = self.images[index].float(), self.targets[index]
            if self.augment:
                images = self.augment(images, matrices[start : start + chunk])
            images = images.sub_(255 * MEAN).div_(255 * STD)
            yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)


class RandomAffine(transforms.RandomAffine):
    """Rotate, shift, scale and shear each image of a batch by random parameters of its own.

    The arguments are the first four of torchvision's `RandomAffine`, which draws one set for a
    whole batch. Shear is along x only. Images are square; what comes from outside is 0.
    """

    def __init__(self, degrees, translate=None, scale=None, shear=None):
        super().__init__(degrees, translate or (0.0, 0.0), scale or (1.0, 1.0), shear or 0.0)
        if len(self.shear) > 2:
            raise ValueError(f"expected a shear along x only, got {shear}")

    def sample(self, count, generator=None):
        """Draw parameters for `count` images: matrices (count, 2, 3) from output to input."""
        x, y = self.translate
        angle, right, down, scale, shear = (
            torch.empty(count).uniform_(*limits, generator=generator)
            for limits in (self.degrees, (-x, x), (-y, y), self.scale, self.shear)
        )
        angle, tan, shift = angle.deg2rad(), shear.deg2rad().tan(), torch.stack((right, down), 1)
        cos, sin = angle.cos(), angle.sin()
        # p moves to scale · R(angle) · X(-shear) · p + shift; F.affine_grid wants the inverse.
        inverse = torch.stack((cos - sin * tan, sin + cos * tan, -sin, cos), dim=1)
        inverse = inverse.view(-1, 2, 2) / scale.view(-1, 1, 1)
        shift = inverse @ (2 * shift).unsqueeze(2)  # the grid's coordinates run from -1 to 1
        return torch.cat((inverse, -shift), dim=2)

    def forward(self, images, matrices):
        """Transform float images (N, C, H, W)."""
        grid = F.affine_grid(matrices, images.shape, align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


# --- one photo or scan


def predict_image(model, image, temperature=1.0):
    """Recognise one handwritten digit in a photo or scan: `(digit, probabilities, model_input)`.

    probabilities: float tensor (classes,) on the CPU that sums to 1.
    model_input: what the model saw, a uint8 array (28, 28), light on dark, in MNIST's form: scaled
        to 20 pixels, its centre of mass in the middle (http://yann.lecun.com/exdb/mnist).
    model: gives logits or log-probabilities (1, classes). temperature: as for `predict`.
    image: a path, a PIL image, or an array (H, W), (H, W, C) or (C, H, W), whose channels are
        averaged; dark on light or light on dark, with some paper around the digit.

    Raises ValueError if the image cannot be read, or does not show one digit.
    """
    model_input = _mnist_form(_find_digit(_small_grey(image)))
    like = next(model.parameters(), torch.empty(0))  # of the model's dtype, on its device
    data = (torch.from_numpy(model_input).to(like) / 255 - MEAN) / STD
    batch = data[None, None], torch.zeros(1)  # (1, 1, 28, 28), and a label that is not used
    (digit,), (probabilities,), _ = predict(model, like.device, [batch], temperature)
    return int(digit), probabilities, model_input


def _small_grey(image):
    """Return an image's greys, upright, its longer side 200 pixels, as a PIL image."""
    try:
        if isinstance(image, np.ndarray | torch.Tensor):
            image = np.atleast_3d(np.asarray(image, np.float32).squeeze())
            image = Image.fromarray(image.mean(axis=np.argmin(image.shape)))
        is_read = isinstance(image, Image.Image)
        image = ImageOps.exif_transpose(image if is_read else Image.open(image))
    except Exception as error:  # Pillow's are of many types
        raise ValueError(f"cannot read the image '{image}': {error}") from error
    if image.has_transparency_data:  # on grey, black ink and white ink can both be seen
        image = Image.alpha_composite(Image.new("RGBA", image.size, "grey"), image.convert("RGBA"))
    return ImageOps.contain(image.convert("F"), (200, 200))


def _find_digit(grey):
    """Return the mask (H, W) of the digit in a grey PIL image."""
    middle = np.outer(*(np.hanning(side + 2)[1:-1] for side in grey.size[::-1]))
    for mask in _ink_masks(grey, middle):
        labels = measure.label(mask)
        inside = segmentation.clear_border(labels)
        score = np.bincount(labels.flat, (middle * mask).flat)
        parts = sorted(measure.regionprops(labels), key=lambda part: -score[part.label])
        for digit in (part for part in parts if _may_be_digit(part, inside)):  # the most central
            mask = (inside > 0) | (labels == digit.label)
            near = measure.label(morphology.isotropic_dilation(mask, 4)) * mask  # within 8 pixels
            near = near == near[tuple(digit.coords[0])]
            for part in parts:  # a stroke that is near belongs to it, unless beside it as tall
                beside = part.bbox[3] <= digit.bbox[1] or part.bbox[1] >= digit.bbox[3]
                above = part.bbox[2] <= digit.bbox[0] or part.bbox[0] >= digit.bbox[2]
                joined, tall = near[tuple(part.coords[0])], len(part.image) / len(digit.image)
                rival = beside and 0.8 < tall < 1.25 if joined else (beside or above) and tall > 0.6
                if rival and part.label in inside and score[part.label] > 0.2 * score[digit.label]:
                    raise ValueError("found several digits in the image: crop it to one of them")
            return near
    raise ValueError("found no digit in the image: expected one, with some paper around it")


def _ink_masks(grey, middle):
    """Yield masks of what may be ink, more and more strictly; at last those of dark and light."""
    # A median over most of a tiny copy is the paper without the ink, with its shades and shadows.
    tiny = grey.resize((40, 40), Image.Resampling.BOX)
    paper = tiny.filter(ImageFilter.MedianFilter(33)).resize(grey.size)
    grey = np.asarray(grey)
    ink = ndimage.gaussian_filter(np.asarray(paper, float) - grey, 0.7)
    ink *= np.sign((middle * ink**3).sum())  # far from the paper: now it is positive, dark or light
    least, sure = 0.06 * np.abs(grey).max(), filters.threshold_otsu(ink)
    for strictness in (1, 1.5, 1.5):
        mask = filters.apply_hysteresis_threshold(ink, 0.7 * sure, sure)  # faint beside surer ink
        if mask.any() and ink[mask].mean() > strictness * max(least, 3 * ink[~mask].std()):
            yield mask
        sure = filters.threshold_otsu(ink[ink >= sure])  # those were shades or lines
    # A digit cut out by its bounding box leaves the median no paper, but touches all four sides.
    dark = grey < filters.threshold_otsu(grey)
    labels = measure.label(dark.astype(int), background=-1)
    if np.ptp(grey) > least and np.corrcoef(dark.flat, grey.flat)[0, 1] < -0.85:  # black and white
        for part in measure.regionprops(labels):
            corners = part.image[[0, 0, -1, -1], [0, -1, 0, -1]]
            if np.subtract(grey.shape, part.image.shape).max() < 3 and corners.sum() < 3:
                yield labels == part.label


def _may_be_digit(part, inside):
    """Return whether a part of the ink is not a speck, line, grid, blob or shadow."""
    (height, width), side = part.image.shape, max(part.image.shape)
    if side < 8 or width > 3 * height or part.euler_number < -2:
        return False
    thickness = 2 * ndimage.distance_transform_edt(np.pad(part.image, 1)).max() - 2
    cut_out = np.subtract(inside.shape, part.image.shape).max() < 3
    is_whole = cut_out or part.label in inside or part.solidity < 0.7
    return is_whole and thickness * part.solidity < (0.5 if cut_out else 0.35) * side


def _mnist_form(digit):
    """Scale a digit's mask to 20 pixels, its centre of mass in the middle of uint8 (28, 28)."""
    scale = max(np.ptp(np.nonzero(digit), axis=1) + 1) / 20
    soft = ndimage.gaussian_filter(digit.astype(float), 0.4 * scale)
    corner = np.array(ndimage.center_of_mass(soft)) - scale * 27 / 2
    image = ndimage.affine_transform(soft, scale * np.eye(2), corner, (28, 28), order=1)
    return (255 * image / image.max()).round().astype(np.uint8)


# --- plots: each draws a new pyplot figure and leaves it open, to be shown or saved


def plot_train_metrics(train_losses, train_acc, test_losses, test_acc, *, title=None):
    """Plot loss and accuracy (percent) by epoch, train against test."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rows = ("train", train_losses, train_acc), ("test", test_losses, test_acc)
    for name, losses, accuracies in rows:
        epochs = range(1, len(losses) + 1)
        left.plot(epochs, losses, ".-", label=f"{name} {losses[-1]:.4f}")
        right.plot(epochs, accuracies, ".-", label=f"{name} {accuracies[-1]:.2f} %")
    low, high = 100.1 - 1.1 * (100.1 - min(*train_acc, *test_acc)), 100.02
    right.set_ylim(low, high)  # on a scale that widens towards 100 %: nearly the error's logarithm
    widen, narrow = lambda acc: -np.log(100.1 - acc), lambda y: 100.1 - np.exp(-y)
    right.set_yscale("function", functions=(widen, narrow))
    ticks = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 100)
    right.set_yticks([tick for tick in ticks if low <= tick <= high])
    right.yaxis.set_major_formatter("{x:g}")
    for axes, name in ((left, "loss"), (right, "accuracy (%)")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(title=f"after epoch {len(train_losses)}")
    fig.suptitle(title)


def plot_images(images, titles, *, title=None):
    """Plot up to 24 images, (N, H, W) or (N, channels, H, W), each under its title."""
    images = torch.as_tensor(images[:24]).detach().cpu().float()
    if len(images) > 0:
        images = (images - images.min()) / (images.max() - images.min()).clamp(min=1e-9)
    if images.dim() == 4:
        images = images.movedim(1, -1).squeeze(-1)
    rows = max(1, math.ceil(len(images) / 8))
    fig, grid = plt.subplots(rows, 8, figsize=(11, 1.53 * rows), layout="constrained")
    plt.setp(grid, frame_on=False, xticks=[], yticks=[])
    for axes, image, name in zip(grid.flat, images, titles, strict=False):
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=10 if len(str(name)) < 16 else 7)
    fig.suptitle(title)


def plot_sample_data(data_loader, *, title=None):
    """Plot up to 24 images of the first batch, as the model sees them, with their labels."""
    with torch.random.fork_rng(devices=[]):  # a DataLoader would draw from the run's numbers
        images, labels = next(iter(data_loader))
    labels = labels.reshape(len(images)).tolist() if isinstance(labels, torch.Tensor) else labels
    names = dict(enumerate(getattr(getattr(data_loader, "dataset", 0), "classes", ())))
    plot_images(images, [names.get(label, label) for label in labels], title=title)


def plot_misclassified(images, predictions, probabilities, targets, classes, *, title=None):
    """Plot up to 24 wrong predictions, the most confident first: label → prediction, probability.

    images: of shape (N, H, W), in the order of the other three, which `predict` returned.
    """
    confidences = torch.as_tensor(probabilities).max(dim=1).values
    order = confidences.argsort(descending=True)
    wrong = order[(torch.as_tensor(predictions) != torch.as_tensor(targets))[order]][:24]
    titles = [
        f"{classes[targets[i]]} → {classes[predictions[i]]}, {100 * confidences[i]:.0f} %"
        for i in wrong
    ]
    plot_images(images[wrong], titles, title=title)


def plot_prediction(image, probabilities, model_input, classes, *, title=None):
    """Plot an image, what the model saw of it, and the probability of each class."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    left.imshow(np.asarray(_small_grey(image)), cmap="gray")  # upright, as it is read
    middle.imshow(model_input, cmap="gray", vmin=0, vmax=255)
    left.set(xlabel="the image, in grey", xticks=[], yticks=[])
    middle.set(xlabel="what the model sees", xticks=[], yticks=[])
    bars = right.barh(classes, 100 * np.asarray(probabilities))
    right.bar_label(bars, fmt="{:.0f} %", padding=4)
    right.set(xlabel="probability (%)", xlim=(0, 120), xticks=range(0, 101, 20))
    right.invert_yaxis()
    fig.suptitle(title)


# --- checkpoints


def save_checkpoint(path, epoch, hyperparameters, **state):
    """Save a run after `epoch`: whenever the process is killed, `path` is whole, old or new.

    hyperparameters: a dictionary of numbers and strings by which the run is recognised.
    state: by name, what has a `state_dict()` (model, optimizer, scheduler), and lists.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    parts = {k: v if isinstance(v, list) else v.state_dict() for k, v in state.items()}
    checkpoint = {"epoch": epoch, "hyperparameters": hyperparameters, **parts}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    torch.load(io.BytesIO(buffer.getbuffer()), "cpu", weights_only=True)  # fails now, not later
    try:
        with open(f"{path}.new", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)  # at once, or not at all
    finally:
        Path(f"{path}.new").unlink(missing_ok=True)  # if the disk is full


def load_checkpoint(path, hyperparameters, **state):
    """Restore `state` from a checkpoint, lists in place, and return the number of epochs done.

    Arguments as for `save_checkpoint`. No code in the file is run.

    Raises ValueError if the file is damaged, or belongs to a run with other hyperparameters.
    """
    if dist.is_initialized():
        dist.barrier()  # until the first process has written it
    file = io.BytesIO(Path(path).read_bytes())
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        saved = checkpoint["hyperparameters"]
        damaged = zipfile.ZipFile(file).testzip()  # compares CRC32s, which torch.load does not
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
    except Exception as error:  # zipfile and torch.load raise errors of many types
        raise ValueError(f"'{path}' is damaged or not a checkpoint: delete it") from error
    if saved != hyperparameters:
        changes = {k: (saved.get(k), hyperparameters.get(k)) for k in saved | hyperparameters}
        changes = {k: (then, now) for k, (then, now) in changes.items() if then != now}
        raise ValueError(f"'{path}' belongs to a run with other parameters (then, now): {changes}")
    for name, part in state.items():
        if isinstance(part, list):
            part[:] = checkpoint[name]
        else:
            part.load_state_dict(checkpoint[name])
    return checkpoint["epoch"]


# --- drawing pad

PAD_SCRIPT = """
function render({ model, el }) {
  el.innerHTML = `<canvas style="border: 1px solid; touch-action: none"></canvas>
    <br><button>Clear</button> <input type="file" accept="image/*">`;
  const [canvas, button, file] = el.querySelectorAll("canvas, button, input");
  const pen = canvas.getContext("2d");
  const clear = (width, height) => {
    [canvas.width, canvas.height] = [width, height];  // which also resets the pen
    [pen.lineWidth, pen.lineCap, pen.lineJoin, pen.fillStyle] = [7, "round", "round", "white"];
    pen.fillRect(0, 0, width, height);
  };
  const send = () => { model.set("drawing", canvas.toDataURL()); model.save_changes(); };
  canvas.onmousedown = (e) => e.preventDefault();  // no dragging of selected text
  canvas.onpointerdown = ({ isPrimary, pointerId }) => {
    if (isPrimary) { canvas.setPointerCapture(pointerId); pen.beginPath(); }
  };
  canvas.onpointermove = ({ isPrimary, pointerId, offsetX: x, offsetY: y }) => {
    if (isPrimary && canvas.hasPointerCapture(pointerId)) { pen.lineTo(x, y); pen.stroke(); }
  };
  canvas.onlostpointercapture = send;
  button.onclick = () => clear(320, 320);
  file.onchange = async () => {
    const photo = await createImageBitmap(file.files[0]).catch(() => alert("Not a valid image"));
    const scale = 320 / Math.max(photo.width, photo.height);
    clear(scale * photo.width, scale * photo.height);
    pen.drawImage(photo, 0, 0, canvas.width, canvas.height);
    send();
  };
  clear(320, 320);
}
export default { render };
"""


def drawing_pad(model, classes, temperature=1.0):
    """Return a widget to draw a digit in or upload a photo; `plot_prediction` shows the answer.

    It answers with the weights that `model` has now. Arguments as for `predict_image`.
    """
    if not is_interactive():
        return print("Drawing pad: run all cells in Jupyter or Colab to draw a digit here.")
    import anywidget
    import traitlets
    from ipywidgets import Output, VBox

    class Pad(anywidget.AnyWidget):
        _esm = PAD_SCRIPT
        drawing = traitlets.Unicode().tag(sync=True)  # a PNG, as a data URL

    model = copy.deepcopy(model)  # Jupyter may answer while a cell trains it
    pad, output = Pad(), Output()

    @output.capture(clear_output=True, wait=True)
    def answer(change):
        image = Image.open(io.BytesIO(base64.b64decode(pad.drawing.split(",")[1])))
        try:
            digit, probabilities, model_input = predict_image(model, image, temperature)
        except ValueError as error:
            return print(error)
        plot_prediction(image, probabilities, model_input, classes, title=classes[digit])
        plt.show()

    pad.observe(answer, "drawing")
    return VBox([pad, output])
