"""Train, test, data, plot and checkpoint helpers for small image classifiers.

In short:

    train_data, test_data = load_data("MNIST")
    train_loader = BatchLoader(train_data, 128, shuffle=True, augment=RandomAffine(10))
    test_loader = BatchLoader(test_data, 1000)
    loss, accuracy = train(model, "cpu", train_loader, optimizer, F.nll_loss)
    loss, accuracy = test(model, "cpu", test_loader, F.nll_loss)
"""

import base64
import contextlib
import hashlib
import io
import math
import operator
import os
import random
import sys
import time
import warnings
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.error import URLError

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter
from PIL import Image, ImageOps
from scipy import ndimage
from skimage import filters, measure, morphology
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from torchvision import datasets
from tqdm.auto import tqdm

__all__ = [
    "BatchLoader", "Digits", "Metrics", "RandomAffine", "RunningMetrics", "back_up_checkpoint",
    "data_parallel", "drawing_pad", "end_distributed", "get_correct_pred_count", "get_device",
    "init_distributed", "load_checkpoint", "load_data", "plot_confusion_matrix",
    "plot_misclassified", "plot_prediction", "plot_sample_data", "plot_train_metrics",
    "predict", "predict_image", "print_epoch", "progress_bar", "resume", "save_checkpoint",
    "set_seed", "test", "train",
]  # fmt: skip

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, scaled to 0…1; used for every dataset
WORK = 400  # pixels along the longer side at which a digit is looked for
PEN = 3.0  # pixels, the least thickness of a stroke in a prepared image
PARALLEL_MODELS = weakref.WeakSet()  # what data_parallel has returned
EMPTY = "the loader is empty: expected at least one batch of (images, labels)"
DIGESTS = {  # of the decoded images and labels: the training split's, the test split's
    "MNIST": ("d18cfd466eb143ac1097fde604dba9ee", "a0863a96c44e5666edbb30c4071ee79c"),
    "FashionMNIST": ("1f243a60b4b748a44c48b9a6f6907be2", "9a494dc49efeb996f4076c469b31cd05"),
}


# --- set-up


def get_device():
    """Return the best `torch.device` there is: CUDA, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def set_seed(seed):
    """Seed Python's, NumPy's and PyTorch's global generators, and make cuDNN deterministic.

    Two runs on one CPU then give bit-identical weights. `seed` is an integer, 0 to 2**32 - 1.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


# --- train and test


class Metrics(NamedTuple):
    """What one pass over a loader measured."""

    loss: float  # mean over the samples seen
    accuracy: float  # percent of those samples, 0 to 100


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
    progress=True,
):
    """Train `model` for one epoch and return its `Metrics(loss, accuracy)`.

    `criterion(output, target)` must return the mean over the batch. If it returns the sum, it needs
    an attribute `reduction` that says "sum": PyTorch's losses have one, and a function or `partial`
    can be given one (`criterion.reduction = "sum"`); without it, the loss reported is too large.

    Loss and accuracy of a batch are those before its optimizer step. They are averaged over the
    samples, and over all processes where there are several, which must then all call this.

    model: its output has the shape (N, classes); it is on `device`.
    train_loader: any iterable of batches (data, target): normalised float images and N integer
        labels, 0 to classes - 1.
    train_losses, train_acc: lists to which the loss and the accuracy (percent) are appended.
    scheduler: a learning rate scheduler that is stepped after each batch.
    progress: show a progress bar.

    Raises TypeError where the last two are not lists, ValueError for an empty loader, uint8 images,
    one-hot or float labels or an output of another shape, and FloatingPointError where the loss is
    not finite.
    """
    model.train()
    metrics = RunningMetrics(criterion, train_losses, train_acc, optimizer)
    is_cuda = torch.device(device).type == "cuda"  # elsewhere a copy not waited for may be wrong
    for data, target in progress_bar(train_loader, "train", metrics, progress):
        data = data.to(device, non_blocking=is_cuda)
        target = target.to(device, non_blocking=is_cuda)
        optimizer.zero_grad()
        output = model(data)
        loss = criterion(output, target)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        metrics.update(loss, output, target)
    return metrics.finish()


@torch.no_grad()
def test(model, device, test_loader, criterion, test_losses=None, test_acc=None, *, progress=True):
    """Evaluate `model` and return its `Metrics(loss, accuracy)`.

    Arguments and errors as for `train`. The model is left in evaluation mode.
    """
    model = _same_in_all_processes(model)
    model.eval()
    metrics = RunningMetrics(criterion, test_losses, test_acc)
    is_cuda = torch.device(device).type == "cuda"
    for data, target in progress_bar(test_loader, "test", metrics, progress):
        data = data.to(device, non_blocking=is_cuda)
        target = target.to(device, non_blocking=is_cuda)
        output = model(data)
        loss = criterion(output, target)
        metrics.update(loss, output, target)
    return metrics.finish()


test.__test__ = False  # or pytest takes it for a test wherever it is imported by name


@torch.no_grad()
def predict(model, device, loader):
    """Return `(predictions, probabilities, targets)` for all samples of a loader, in its order.

    They are on the CPU: classes (N,), probabilities (N, classes) whose rows sum to 1, and labels
    (N,). The model gives logits or log-probabilities; it is left in evaluation mode.

    Raises ValueError for an empty loader, FloatingPointError where an output is not a number, and
    RuntimeError in one of several processes, each of which would see only its share.
    """
    if _world_size() > 1:
        raise RuntimeError("predict is for one process: call it after end_distributed()")
    model.eval()
    outputs, targets = [], []
    for data, target in loader:
        outputs.append(model(data.to(device)).softmax(dim=1).cpu())
        targets.append(target.cpu())
    if not outputs:
        raise ValueError(EMPTY)
    probabilities = torch.cat(outputs)
    if probabilities.isnan().any():
        raise FloatingPointError("the model's output is not a number (nan)")
    return probabilities.argmax(dim=1), probabilities, torch.cat(targets)


def get_correct_pred_count(pred, target):
    """Return how many of the N rows of `pred` (N, classes) have their maximum at `target` (N,)."""
    return int((pred.argmax(dim=1) == target).sum())


class RunningMetrics:
    """Loss and accuracy of a pass: `update` after each batch, `compute` whenever they are wanted.

    criterion: as for `train`.
    losses, accuracies: lists to which `finish` appends, or None.
    optimizer: its learning rate is named where the loss is not finite.
    """

    def __init__(self, criterion, losses=None, accuracies=None, optimizer=None):
        self.lists = losses, accuracies
        for values in self.lists:
            if values is not None and not hasattr(values, "append"):
                raise TypeError(
                    "expected a list for the losses and one for the accuracies, got "
                    f"{type(values).__name__}; a scheduler is passed by name: scheduler=..."
                )
        self.is_sum = getattr(criterion, "reduction", "mean") == "sum"
        self.optimizer = optimizer
        self.loss_sum = self.correct = self.count = 0

    def update(self, loss, output, target):
        """Add a batch: output (N, classes), target (N,). Never waits for the device."""
        if output.dim() != 2 or target.shape != output.shape[:1] or target.is_floating_point():
            raise ValueError(
                "expected a model output of shape (N, classes) and N integer labels, got "
                f"{tuple(output.shape)} and {target.dtype} of shape {tuple(target.shape)}; "
                "of one-hot labels, take .argmax(dim=1)"
            )
        weight = 1 if self.is_sum else len(target)
        precise = torch.float32 if loss.is_mps else torch.float64  # MPS has no float64
        self.loss_sum = self.loss_sum + weight * loss.detach().to(precise)
        self.correct = self.correct + (output.argmax(dim=1) == target).sum()
        self.count += len(target)

    def compute(self, all_processes=False):
        """Return the `Metrics` so far. Waits for the device, and for the others if asked to."""
        sums = float(self.loss_sum), int(self.correct), self.count
        loss_sum, correct, count = _sum_over_processes(sums) if all_processes else sums
        if count == 0:
            raise ValueError(EMPTY)
        if not math.isfinite(loss_sum):
            rate = ""
            if self.optimizer is not None:
                lr = float(self.optimizer.param_groups[0]["lr"])
                rate = f" at learning rate {lr:g}: try a lower one"
            raise FloatingPointError(f"the loss is not finite ({loss_sum}){rate}")
        return Metrics(loss_sum / count, 100 * correct / count)

    def finish(self):
        """Append the `Metrics` of all processes together to the lists, and return them."""
        metrics = self.compute(all_processes=True)
        for values, value in zip(self.lists, metrics, strict=True):
            if values is not None:
                values.append(value)
        return metrics


def progress_bar(loader, description, metrics, show=True):
    """Yield the loader's batches and show the metrics so far, every 50 batches and at the end."""
    start = time.perf_counter()

    def show_metrics():
        loss, accuracy = metrics.compute()  # here the host waits for the device
        speed = metrics.count * _world_size() / (time.perf_counter() - start)
        bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f} %, {speed:,.0f} images/s")

    total = operator.length_hint(loader) or None
    with tqdm(total=total, desc=description, disable=not show or _rank() > 0) as bar:
        for step, (data, target) in enumerate(loader, start=1):
            if data.dtype == torch.uint8:
                raise ValueError("expected normalised float images, got uint8 (0 to 255)")
            yield data, target
            bar.update()
            if step % 50 == 0:
                show_metrics()
        if metrics.count > 0:
            show_metrics()


def print_epoch(epoch, epochs, trained, tested, seconds):
    """Print a line about an epoch: its `Metrics` in training and test, and the training time."""
    print(
        f"Epoch {epoch}/{epochs}"
        f"  train loss {trained.loss:.4f} accuracy {trained.accuracy:.2f} %"
        f"  test loss {tested.loss:.4f} accuracy {tested.accuracy:.2f} %"
        f"  {seconds:.1f} s"
    )


# --- several processes, which torchrun starts


def init_distributed():
    """Join the processes that `torchrun` started, if any, and return this one's `torch.device`.

    One process alone gets `get_device()`. Of several, each gets a CUDA GPU of its own (NCCL), or
    all get the CPU where there is no CUDA (Gloo); from then on only the first one prints.

    Raises ValueError where a machine has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return get_device()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"expected a GPU for each process, got {torch.cuda.device_count()} for process "
                f"{device.index}, counted from 0: lower --nproc-per-node, or hide the GPUs "
                "(CUDA_VISIBLE_DEVICES=) to train on the CPU"
            )
        torch.cuda.set_device(device)
    # Imported later, by DDP, this module would keep the group alive (see end_distributed).
    from torch.distributed.nn import functional  # noqa: F401

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    if _rank() > 0:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    where = "a GPU" if device.type == "cuda" else "the CPU"
    print(f"{_world_size()} processes, each on {where}")
    return device


def data_parallel(model):
    """Return `model` in `DistributedDataParallel`, or as it is where there is one process.

    Each process trains on its share of a batch, and their gradients are averaged. Batch norm
    normalises each share by itself; the running statistics of the first process count.
    """
    if _world_size() == 1:
        return model
    parallel_model = DistributedDataParallel(model)
    PARALLEL_MODELS.add(parallel_model)
    return parallel_model


def end_distributed():
    """End all processes but the first, which goes on alone."""
    if _world_size() == 1:
        return
    rank = _rank()
    # A thread of Gloo's that is alive when Python exits may abort the process (PyTorch issue
    # 190489). They end with the last reference to the group, and these are references.
    for parallel_model in PARALLEL_MODELS:
        parallel_model.process_group = parallel_model.reducer = parallel_model.logger = None
    dist.destroy_process_group()
    if rank > 0:
        sys.exit()


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def _from_first(value):
    """Return what the first process gave for `value`, in each process."""
    values = [value]
    if _world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def _sum_over_processes(numbers):
    if _world_size() == 1:
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def _same_in_all_processes(model):
    """Return the plain model, with the first process's running statistics (batch norm's)."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if _world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    return model


# --- data


def load_data(name="auto", root=None):
    """Return `(train_data, test_data)`, with `.data` (uint8, N×28×28), `.targets` and `.classes`.

    name: "MNIST", "FashionMNIST", "KMNIST" or "QMNIST", read from `root` in torchvision's layout
        and downloaded if they are not there; "digits", scikit-learn's small set, which needs no
        network; or "auto": MNIST or, if it can neither be read nor downloaded, "digits" with a
        warning. The datasets carry the name that was loaded as `.name`.
    root: folder of the data; by default the environment variable DATA_DIR, else "data".

    With several processes, all must call it. They load one after another, because the first may
    have to download, and all load the dataset that rank 0 got.

    MNIST and Fashion-MNIST are compared with the SHA-256 of the published images and labels. The
    others must have 28×28 pixels, a label for each image and labels in range.

    Raises ValueError for an unknown name and for damaged files, FileNotFoundError if files are
    missing and cannot be downloaded, and any other OSError as the disk raised it.
    """
    root = Path(root or os.environ.get("DATA_DIR") or "data").expanduser()
    if not dist.is_initialized():
        return _load(name, root)
    chosen = [name]
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            pair = _load(chosen[0], root)
            chosen = [pair[0].name]
        dist.broadcast_object_list(chosen, src=turn)  # those whose turn comes later wait here
    return pair


def _load(name, root):
    if name == "auto":
        try:
            return _load("MNIST", root)
        except FileNotFoundError as error:
            warnings.warn(f"USING THE SMALL SET 'digits' INSTEAD OF MNIST. {error}", stacklevel=3)
            return _load("digits", root)
    if name == "digits":
        pair = Digits(train=True), Digits(train=False)
    elif name in ("MNIST", "FashionMNIST", "KMNIST", "QMNIST"):
        pair = _load_split(name, root, train=True), _load_split(name, root, train=False)
    else:
        raise ValueError(
            f"unknown dataset {name!r}: expected 'auto', 'MNIST', 'FashionMNIST', 'KMNIST', "
            "'QMNIST' or 'digits'"
        )
    for data in pair:
        data.name = name
    return pair


def _load_split(name, root, train):
    """Load the training or the test split of one of torchvision's datasets, and check it."""
    dataset, folder = getattr(datasets, name), root / name
    try:
        data = dataset(root, train=train, download=True)
    except Exception as error:
        is_network_error = isinstance(error, (URLError, ConnectionError, TimeoutError))
        if isinstance(error, OSError) and not is_network_error:
            raise  # the disk's: no permission, no space left, …
        resources = dataset.resources  # (FILE.gz or its address, MD5)
        if name == "QMNIST":
            resources = resources["train" if train else "test"]
        files = [folder / "raw" / Path(address).stem for address, _ in resources]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{name} is not in '{root}' and could not be downloaded. Put {', '.join(missing)} "
                f"into '{folder / 'raw'}', or name another folder in the environment variable "
                f"DATA_DIR, or use load_data('digits'), which needs no network. Error: {error}"
            ) from error
        damage = repr(error)  # the files are there, but torchvision cannot decode them
    else:
        damage = _find_damage(data, name)
    if damage:
        raise ValueError(
            f"the files in '{folder}' are damaged ({damage}): delete that folder to download them "
            "again"
        )
    return data


def _find_damage(data, name):
    """Return what is wrong with a split of the dataset `name`, or None."""
    images, targets = _tensors(data)
    if images.shape != (len(targets), 28, 28):
        return f"{len(targets)} labels for images of shape {tuple(images.shape)}"
    if not 0 <= targets.min() <= targets.max() < len(data.classes):
        return f"labels from {targets.min()} to {targets.max()}"
    if name in DIGESTS:
        digest = hashlib.sha256(images.numpy())
        digest.update(targets.numpy())
        if digest.hexdigest()[:32] != DIGESTS[name][0 if data.train else 1]:
            return "not the published images and labels"
    return None


class Digits(datasets.MNIST):
    """scikit-learn's 1,797 scanned digits (8×8, 17 grey levels) in MNIST's form, for use offline.

    Each is enlarged to 20×20 in a frame of 28×28; 1,437 are for training and 360 for test, a fixed
    split stratified by digit. Far fewer and easier than MNIST's: their accuracies do not compare.
    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """

    def __init__(self, train=True):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        datasets.VisionDataset.__init__(self, root="scikit-learn")
        self.train = train
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1)  # (1797, 1, 8, 8), 0 to 16
        images = F.interpolate(images * (255 / 16), size=(20, 20), mode="bicubic").clamp(0, 255)
        images = F.pad(images.round().to(torch.uint8), (4, 4, 4, 4)).squeeze(1)  # (1797, 28, 28)
        targets = torch.from_numpy(digits.target)
        split = train_test_split(range(1797), test_size=360, stratify=targets, random_state=0)
        index = split[0 if train else 1]
        self.data, self.targets = images[index], targets[index]


class BatchLoader:
    """Batches of a dataset that is kept on the device as one uint8 tensor; a fast `DataLoader`.

    A pass yields each sample once, in batches `(images, labels)` on `device`: float32 images of
    shape (N, 1, 28, 28), scaled to 0 to 1 and normalised by MEAN and STD, and int64 labels of shape
    (N,). The last batch may be smaller.

    Order and augmentation depend on `seed` and `epoch` alone. `epoch` counts the completed passes
    and can be set, as when a run is resumed; looking at a batch changes nothing.

    Of several processes (see `init_distributed`), each gets its share of every batch; `batch_size`
    is that of all together. In training, all shares are of equal size, which leaves out up to
    `world_size - 1` samples a pass; under `torch.no_grad()`, as in `test`, none is left out.

    dataset: has `.data`, uint8 of shape (N, 28, 28), and `.targets`, N integers, and no transform;
        or is a `Subset` of such a dataset.
    augment: a `RandomAffine`.

    Raises TypeError for a dataset without `.data` and `.targets`, ValueError for images or labels
    of another kind, for a dataset with a transform, which would not be applied, and in training
    for a batch size that is not a multiple of the number of processes.
    """

    def __init__(self, dataset, batch_size, *, device="cpu", shuffle=False, augment=None, seed=0):
        images, targets = _tensors(dataset)
        if images.dtype != torch.uint8 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise ValueError(
                "expected a dataset whose .data is uint8 of shape (N, 28, 28) with N > 0, got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        if targets.shape != images.shape[:1] or targets.is_floating_point():
            raise ValueError(
                f"expected an integer label for each of {len(images)} images, got {targets.dtype} "
                f"of shape {tuple(targets.shape)}; of one-hot labels, take .argmax(dim=1)"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self.images = images.unsqueeze(1).to(device)
        self.targets = targets.long().to(device)

    def __len__(self):
        share, batch_size = self._share()
        return math.ceil(len(share) / batch_size)

    def __iter__(self):
        epoch, count, device = self.epoch, len(self.images), self.images.device
        # SeedSequence mixes the two numbers, so that seed 0 in epoch 1 is not seed 1 in epoch 0.
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(count, generator=generator)
        share, batch_size = self._share()
        order = order[share].to(device)
        if self.augment:
            matrices = self.augment.draw(count, generator)[share].to(device)
        for start in range(0, len(order), batch_size):
            batch = slice(start, start + batch_size)
            images, labels = self.images[order[batch]], self.targets[order[batch]]
            if self.augment:
                images = self.augment(images.float(), matrices[batch])
            yield images.sub(255 * MEAN).div_(255 * STD), labels
        if self.epoch == epoch:  # else it was set meanwhile, or another pass was quicker
            self.epoch = epoch + 1

    def _share(self):
        """Return the positions in a pass that are this process's, and its batch size."""
        count, world_size = len(self.images), _world_size()
        if torch.is_grad_enabled():  # averaging gradients is right for shares of equal size alone
            count -= count % world_size
            if self.batch_size % world_size > 0:
                raise ValueError(
                    "expected a batch size that is a multiple of the number of processes, "
                    f"{world_size}, got {self.batch_size}"
                )
        return range(_rank(), count, world_size), max(1, self.batch_size // world_size)


def _tensors(dataset):
    """Return the images and the labels of a dataset or of a `Subset` of one."""
    if isinstance(dataset, Subset):
        images, targets = _tensors(dataset.dataset)
        return images[dataset.indices], targets[dataset.indices]
    if not hasattr(dataset, "data") or not hasattr(dataset, "targets"):
        raise TypeError(
            "expected a dataset with .data and .targets, such as load_data returns, got "
            f"{type(dataset).__name__}; for others there is torch.utils.data.DataLoader"
        )
    if getattr(dataset, "transform", None) or getattr(dataset, "target_transform", None):
        raise ValueError(
            "BatchLoader does not apply the dataset's transform: leave it out (BatchLoader scales "
            "and normalises, augment= distorts), or use torch.utils.data.DataLoader"
        )
    targets = torch.as_tensor(dataset.targets)
    if isinstance(dataset, datasets.QMNIST):
        targets = targets[:, 0]  # the class; the other columns tell who wrote it, and where
    return torch.as_tensor(dataset.data), targets


class RandomAffine:
    """Rotate, shift, scale and shear each image of a batch by random parameters of its own.

    The arguments are those of `torchvision.transforms.v2.RandomAffine`, which draws one set of
    parameters for a whole batch. Interpolation is bilinear, shifts are not rounded to whole pixels,
    and what comes from outside the image is 0.

    degrees: largest rotation in degrees, in both directions.
    translate: largest shifts (horizontal, vertical) as fractions of the image's side, 0 to 1.
    scale: (low, high), factors above 0.
    shear: largest shear along x in degrees, in both directions, below 90.

    Raises ValueError for translate, scale or shear out of range.
    """

    def __init__(self, degrees, translate=None, scale=None, shear=None):
        self.degrees = degrees
        self.translate = (0.0, 0.0) if translate is None else translate
        self.scale = (1.0, 1.0) if scale is None else scale
        self.shear = 0.0 if shear is None else shear
        x, y = self.translate
        low, high = self.scale
        if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < low <= high and 0 <= self.shear < 90):
            raise ValueError(
                "expected translate=(0 to 1, 0 to 1), scale=(low, high) with 0 < low <= high and "
                f"shear from 0 to below 90, got {vars(self)}"
            )

    def draw(self, count, generator=None):
        """Draw the parameters of `count` images on the CPU, as matrices (count, 2, 3).

        With x right and y down from the image's centre, a point p moves to
        scale · R(angle) · X(shear) · p + shift, as in torchvision's `affine`.
        """

        def uniform(low, high):
            return torch.empty(count).uniform_(low, high, generator=generator)

        x, y = self.translate
        angle = uniform(-self.degrees, self.degrees).deg2rad()
        shift = torch.stack((uniform(-x, x), uniform(-y, y)), dim=1)
        scale = uniform(*self.scale)
        tan = uniform(-self.shear, self.shear).deg2rad().tan()
        cos, sin = angle.cos(), angle.sin()
        # F.affine_grid wants to know where each output pixel comes from: the inverse of R·X, whose
        # determinant is 1.
        inverse = torch.stack((cos - sin * tan, sin + cos * tan, -sin, cos), dim=1)
        inverse = inverse.view(-1, 2, 2) / scale.view(-1, 1, 1)
        shift = inverse @ (2 * shift).unsqueeze(2)  # the grid's coordinates run from -1 to 1
        return torch.cat((inverse, -shift), dim=2)

    def __call__(self, images, matrices=None):
        """Transform float images (N, C, S, S) with black at 0; draw where no matrices are given."""
        if matrices is None:
            matrices = self.draw(len(images)).to(images.device)
        grid = F.affine_grid(matrices, images.shape, align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


# --- one image, as people have it


def predict_image(model, image):
    """Recognise one handwritten digit in a photo or scan: `(digit, probabilities, prepared)`.

    probabilities: float tensor (classes,) that sums to 1; a low maximum says that the model is not
        sure. prepared: what the model saw, a uint8 array (28, 28), light on dark.

    image: a path, a PIL image, or an array or tensor of shape (H, W), (H, W, 1 to 4) or
        (1 to 4, H, W), of bytes or of floats 0 to 1; dark on light or light on dark, in any light,
        the digit anywhere and of any size, with some paper around it; specks, paler lines, and
        parts of other digits that touch the border do not matter.

    The digit is prepared as MNIST's were, its box scaled to 20×20 pixels and its centre of mass put
    into the middle of 28×28 (http://yann.lecun.com/exdb/mnist), and thin pens are made as broad as
    MNIST's.

    Raises OSError where there is no such file, or it may not be read, and ValueError where the
    image is none, is smaller than 8×8 or larger than Pillow's limit of some 89 million pixels, has
    no ink in it or several digits.
    """
    prepared = _prepare(_find_digit(_upright_grey(image)))
    data = SimpleNamespace(data=torch.from_numpy(prepared)[None], targets=torch.zeros(1).long())
    like = next(model.parameters(), torch.empty(0))  # of its type, on its device
    batches = [(images.to(like), labels) for images, labels in BatchLoader(data, 1)]
    predictions, probabilities, _ = predict(model, like.device, batches)
    return int(predictions), probabilities[0], prepared


def _upright_grey(image):
    """Return an image as floats (H, W), 0 to 1, its longer side at most 1,000 pixels."""
    if isinstance(image, (str, os.PathLike, Image.Image)):
        picture = _open(image)
    else:
        picture = _from_array(image)
    width, height = picture.size
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    if min(width, height) < 8 or width * height > limit:
        raise ValueError(f"expected an image of 8×8 to {limit:,} pixels, got {width}×{height}")
    if picture.mode.startswith(("I", "F")):  # more than 8 bits
        picture = ImageOps.exif_transpose(picture)
        values = np.nan_to_num(np.asarray(picture, float))
        picture = Image.fromarray((255 * values / max(values.max(), 1)).clip(0, 255).astype("u1"))
    has_alpha = "A" in picture.getbands() or "transparency" in picture.info
    picture = picture.convert("LA" if has_alpha else "L")
    picture = ImageOps.exif_transpose(picture.reduce(math.ceil(max(picture.size) / 1000)))
    if not has_alpha:
        return np.asarray(picture, float) / 255
    grey, alpha = np.moveaxis(np.asarray(picture, float) / 255, 2, 0)
    paper = float(np.average(grey, weights=alpha + 1e-9) < 0.5)  # dark ink is laid on white
    return grey * alpha + paper * (1 - alpha)


def _open(image):
    """Read an image from a path, or what a PIL image has not yet read of its file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = image if isinstance(image, Image.Image) else Image.open(image)
            picture.load()
        return picture
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # Pillow's readers raise of every kind
        raise ValueError(
            f"'{image}' was not read: expected an image of a kind that Pillow knows, of at most "
            f"{Image.MAX_IMAGE_PIXELS or math.inf:,} pixels ({error!r:.200})"
        ) from error


def _from_array(values):
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy has no bfloat16
    array = np.asarray(values)
    if array.ndim == 3 and array.shape[2] > 4 >= array.shape[0]:  # channels first
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    numbers = array.dtype.kind in "buif" and array.size > 0 and np.isfinite(array).all()
    fits = array.ndim == 2 or array.ndim == 3 and array.shape[2] in (2, 3, 4)
    if not (numbers and fits and 0 <= array.min() <= array.max() <= 255):
        span = f", {array.min()} to {array.max()}" if numbers else ""
        raise ValueError(
            "expected a path, a PIL image or an array (H, W) or (H, W, 1 to 4) of bytes 0 to 255 "
            f"or floats 0 to 1, got {type(values).__name__}: {array.dtype} {array.shape}{span}"
        )
    if array.max() < 1.1:  # a little above 1 is what resizing may leave
        array = 255 * array.astype(float).clip(max=1)
    return Image.fromarray(array.round().astype(np.uint8))


def _find_digit(grey):
    """Return the mask (H, W) of the digit's ink, cut to its box, at a scale of its own."""
    for last in (False, True):
        scale = WORK / max(grey.shape)
        small = _resize(grey, [max(1, round(side * scale)) for side in grey.shape])
        ink = _ink(small if scale < 1 else ndimage.median_filter(small, 3))  # means have less noise
        for low in (0.4, 0.2):  # where thin strokes fall apart, a second look
            parts = filters.apply_hysteresis_threshold(ink, low, 0.6)
            digit, others = _choose(parts)
            if not others:
                break
        else:
            raise ValueError("found several digits in the image: expected one; cut the image to it")
        rows, columns = ndimage.find_objects(digit)[0]
        extent = max(rows.stop - rows.start, columns.stop - columns.start)
        if last or extent > 0.4 * WORK or scale >= 1:
            return digit[rows, columns] > 0
        grey = grey[  # look again, nearer
            tuple(
                slice(
                    max(0, int((s.start - 0.5 * extent) / scale)),
                    int((s.stop + 0.5 * extent) / scale),
                )
                for s in (rows, columns)
            )
        ]


def _ink(grey):
    """Return how strong the ink is in each pixel of `grey` (H, W): paper about 0, pen about 1."""
    # The paper's light: a quadratic surface, fitted again and again without what is far from it.
    y, x = np.mgrid[-1 : 1 : grey.shape[0] * 1j, -1 : 1 : grey.shape[1] * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    values, few = grey[::3, ::3].ravel(), terms[::3, ::3].reshape(-1, 6)
    paper = np.abs(few[:, 1:3]).max(axis=1) > 0.8  # at first, what lies near the border
    for _ in range(6):
        weights = np.linalg.lstsq(few[paper], values[paper], rcond=None)[0]
        off = values - few @ weights
        paper = np.abs(off) <= max(3.7 * np.median(np.abs(off[paper])), 0.01)
    smooth = grey - terms @ weights
    if (off**3).sum() > 0:
        smooth = -smooth  # light ink on dark paper
    size = round(0.3 * min(grey.shape)) | 1
    light = ndimage.grey_closing(ndimage.gaussian_filter(smooth, 1), size)
    ink = ndimage.gaussian_filter(light, size / 4) - smooth
    low, middle, level = np.percentile(ink, (5, 30, 99.95))
    noise = (middle - low) / 1.12  # standard deviation, as if normal, of what is sure to be paper
    if level < max(0.06, 6 * noise):
        raise ValueError(
            "found no ink in the image: expected a digit that is clearly darker, or clearly "
            "lighter, than the paper around it"
        )
    return ink / level


def _choose(mask):
    """Return the digit in the middle of a mask as 0 and 1, and whether there is another one."""
    height, width = mask.shape

    def extent(part):
        top, left, bottom, right = part.bbox
        return max(bottom - top, right - left)

    def edges(part):  # of the image, that it touches
        top, left, bottom, right = part.bbox
        return (top == 0) + (left == 0) + (bottom == height) + (right == width)

    def weight(part):
        top, left, bottom, right = part.bbox
        tall, wide = bottom - top, right - left
        if min(tall, wide) < 0.15 * max(tall, wide) and (edges(part) >= 2 or tall < wide):
            return 0  # a line
        away = math.hypot(part.centroid[0] / height - 0.5, part.centroid[1] / width - 0.5)
        return max(tall, wide) * (1 - away) * 0.4 ** min(edges(part), 2)

    labels = measure.label(mask)
    ranked = sorted(measure.regionprops(labels), key=weight, reverse=True)
    top, left, bottom, right = ranked[0].bbox
    inside = [
        part
        for part in ranked[1:]
        if top < part.bbox[0] and left < part.bbox[1] and part.bbox[2] < bottom
        if part.bbox[3] < right and extent(part) > 0.3 * extent(ranked[0])
    ]
    main, *others = inside or ranked  # where something is inside it, the first is a frame
    top, left, bottom, right = main.bbox
    size, keep, several = extent(main), [main.label], False
    for part in others:
        above = max(top - part.bbox[2], part.bbox[0] - bottom, 0)
        beside = max(left - part.bbox[3], part.bbox[1] - right)
        gap = math.hypot(above, max(beside, 0))
        if edges(part) > 0:
            continue
        if weight(part) > 0.6 * weight(main) and (beside >= 0 or gap > 0.3 * size):
            several = True
        elif gap < 0.2 * size and extent(part) > 0.12 * size:
            keep.append(part.label)
    return np.isin(labels, keep).astype(int), several


def _prepare(digit):
    """Bring the mask of a digit into MNIST's form, uint8 (28, 28)."""
    scale = 20 / max(digit.shape)
    inside = ndimage.distance_transform_edt(np.pad(digit, 1))[1:-1, 1:-1]
    thickness = 2 * np.median(inside[morphology.skeletonize(digit)]) - 0.5
    grow = (PEN / scale - thickness) / 2
    if grow > 0.5:
        digit = np.pad(digit, math.ceil(grow) + 1)
        digit = ndimage.distance_transform_edt(~digit) <= grow
        digit = digit[ndimage.find_objects(digit.astype(int))[0]]
        scale = 20 / max(digit.shape)
    height, width = (max(1, round(side * scale)) for side in digit.shape)
    small = _resize(digit.astype(float), (height, width)).clip(0, 1)
    y, x = ndimage.center_of_mass(small)
    top = min(max(round(13.5 - y), 0), 28 - height)
    left = min(max(round(13.5 - x), 0), 28 - width)
    canvas = np.zeros((28, 28))
    canvas[top : top + height, left : left + width] = small
    return (255 * canvas / canvas.max()).round().astype(np.uint8)


def _resize(values, shape):
    picture = Image.fromarray(values.astype(np.float32))
    method = Image.Resampling.BOX if shape[0] < len(values) else Image.Resampling.BICUBIC
    return np.asarray(picture.resize(shape[::-1], method), float)


# --- plots
#
# Like pyplot's own functions, these draw a new figure and leave it open: a notebook shows it when
# its cell has run, plt.savefig() saves it, and in a script plt.show() opens a window.


def plot_train_metrics(train_losses, train_acc, test_losses, test_acc, *, title=None):
    """Plot loss (on a log scale) and accuracy (percent) by epoch, train against test.

    Raises ValueError where the four lists differ in length or are empty.
    """
    lengths = [len(values) for values in (train_losses, train_acc, test_losses, test_acc)]
    if len(set(lengths)) > 1 or 0 in lengths:
        raise ValueError(f"expected four lists with an entry per epoch, got lengths {lengths}")
    epochs = range(1, lengths[0] + 1)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, curves, name, final in (
        (left, (train_losses, test_losses), "loss", "{} {:.4f}"),
        (right, (train_acc, test_acc), "accuracy (%)", "{} {:.2f} %"),
    ):
        for label, values in zip(("train", "test"), curves, strict=True):
            axes.plot(epochs, values, marker=".", label=final.format(label, values[-1]))
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend(title=f"after epoch {lengths[0]}")
    left.set_yscale("log")
    low, high = left.get_ylim()  # within a decade, 1, 2 and 5 may be too few ticks
    left.yaxis.set_major_locator(AutoLocator() if high < 10 * low else LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")  # 0.05, not 5×10⁻²
    left.yaxis.set_minor_formatter(NullFormatter())
    fig.suptitle(title)


def plot_sample_data(data_loader, *, title=None):
    """Plot up to 24 images of the first batch as the model sees them, with their labels.

    data_loader: yields images of shape (N, 1, H, W) and labels of shape (N,). The labels' names are
        taken from `data_loader.dataset.classes` if it has them.
    """
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws from the global generator
        images, labels = next(iter(data_loader))
    _plot_images(images, _class_names(data_loader, labels), title)


def plot_misclassified(loader, predictions, probabilities, targets, *, title=None):
    """Plot up to 24 wrong predictions, the most confident first.

    Above each image: its label, then the prediction and its probability.

    loader: yields the images, of shape (N, 1, H, W), in the order of the predictions.
    predictions, probabilities, targets: as `predict` returned them for this loader.

    Raises ValueError where the loader's labels are not `targets`, as when it shuffles.
    """
    images, labels = (torch.cat(batches).cpu() for batches in zip(*loader, strict=True))
    if not torch.equal(labels, targets):
        raise ValueError("the loader's labels differ from targets: use one that does not shuffle")
    confidences = probabilities.max(dim=1).values
    wrong = (predictions != targets).nonzero().flatten()
    wrong = wrong[confidences[wrong].argsort(descending=True)][:24]
    labels, guesses = (_class_names(loader, values[wrong]) for values in (targets, predictions))
    titles = [
        f"{label}\n→ {guess}, {100 * confidence:.0f} %"
        for label, guess, confidence in zip(labels, guesses, confidences[wrong], strict=True)
    ]
    _plot_images(images[wrong], titles, title)


def plot_confusion_matrix(predictions, targets, classes, *, title=None):
    """Plot how often each class was predicted for each true class.

    Only the errors are coloured: the many correct predictions on the diagonal would outshine them.

    predictions, targets: N integers each, 0 to len(classes) - 1.
    classes: names of the classes.

    Raises ValueError where a prediction or a target is out of range.
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix  # takes a second

    counts = confusion_matrix(targets, predictions, labels=range(len(classes)))
    if counts.sum() != len(targets):  # scikit-learn leaves out what is not in labels
        raise ValueError(f"expected predictions and targets from 0 to {len(classes) - 1}")
    fig, axes = plt.subplots(figsize=(7, 6.4), layout="constrained")
    errors = counts - np.diag(counts.diagonal())
    display = ConfusionMatrixDisplay(errors, display_labels=classes)
    display.plot(ax=axes, cmap="Reds", colorbar=False, xticks_rotation=45)
    for (true, predicted), text in np.ndenumerate(display.text_):
        text.set_text(counts[true, predicted] or "")
        if true == predicted:
            text.set(color="gray", fontsize=9)
    axes.set(xlabel="predicted", ylabel="true")
    fig.suptitle(title)


def plot_prediction(image, probabilities, prepared, classes=None, *, title=None):
    """Plot an image, what the model saw of it, and the probability of each class.

    image: a path or a PIL image, as given to `predict_image`.
    probabilities, prepared: as `predict_image` returned them, of shape (classes,) and (28, 28).
    classes: names of the classes; by default their numbers.
    """
    grey, percent = _upright_grey(image), 100 * np.asarray(probabilities)
    if classes is not None and len(classes) != len(percent):
        raise ValueError(f"expected {len(percent)} names of classes, got {len(classes)}")
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    left.imshow(grey, cmap="gray", vmin=0, vmax=1)
    left.set_title("the image, in grey")
    middle.imshow(prepared, cmap="gray", vmin=0, vmax=255)
    middle.set_title("what the model sees")
    for axes in (left, middle):
        axes.axis("off")
    numbers = range(len(percent))
    bars = right.bar(numbers, percent)
    right.bar_label(bars, fmt="%.0f", fontsize=8)
    right.set(xlabel="class", ylabel="probability (%)", ylim=(0, 110), xticks=numbers)
    if classes is not None:
        right.set_xticklabels(classes, rotation=45, ha="right")
    fig.suptitle(title)


def _class_names(loader, labels):
    """Return the names of labels (N,), or the labels where the loader's dataset has no names."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = dict(enumerate(getattr(dataset, "classes", ())))
    return [names.get(label, label) for label in labels.tolist()]


def _plot_images(images, titles, title):
    """Plot up to 24 images (N, 1, H, W) in a grid, on a common grey scale."""
    if images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(f"expected images of shape (N, 1, H, W), got {tuple(images.shape)}")
    images = images[:24, 0].cpu().numpy()
    fig, grid = plt.subplots(3, 8, figsize=(11, 4.6), layout="constrained")
    for axes, image, name in zip(grid.flat, images, titles, strict=False):
        axes.imshow(image, cmap="gray", vmin=images.min(), vmax=images.max())
        axes.set_title(name, fontsize=8)
    for axes in grid.flat:
        axes.axis("off")
    if len(images) == 0:
        fig.text(0.5, 0.5, "none", ha="center")
    fig.suptitle(title)


# --- checkpoints


def save_checkpoint(path, epoch, hyperparameters, **state):
    """Write what a run needs in order to go on after `epoch` as if it had never stopped.

    The file is written beside `path`, flushed to disk and moved over it: whenever the machine
    stops, `path` is the old checkpoint or the new one, whole. Of several processes, the first one
    writes.

    epoch: number of completed epochs.
    hyperparameters: a dictionary, by which `resume` tells this run from another.
    state: by name, the model, the optimizer and whatever else has a `state_dict()`, and lists.

    Raises ValueError if something else than tensors, numbers, strings, lists, tuples and
    dictionaries is to be saved, and OSError if the file cannot be written. The previous checkpoint
    is then untouched.
    """
    if _rank() > 0:
        return
    path = Path(path)
    checkpoint = {
        "epoch": epoch,
        "hyperparameters": hyperparameters,
        "types": _types(state),
        "random_state": torch.get_rng_state(),
        "cuda_random_state": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }
    for name, part in state.items():
        checkpoint[name] = part if isinstance(part, list) else part.state_dict()
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    unfinished = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        load_checkpoint(unfinished)  # what cannot be read is refused now, not when it is needed
        os.replace(unfinished, path)
    except OSError as error:
        message = f"could not write the checkpoint ({error.strerror})"
        raise OSError(error.errno, message, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def load_checkpoint(path):
    """Return a checkpoint as a dictionary, with its tensors on the CPU. No code in it is run.

    Its keys are epoch, hyperparameters, types, random_state, cuda_random_state and the names that
    `save_checkpoint` was given.

    Raises FileNotFoundError if there is no file, and ValueError if it is damaged or is no
    checkpoint.
    """
    file = io.BytesIO(Path(path).read_bytes())
    try:
        damaged = zipfile.ZipFile(file).testzip()  # compares CRC32s, which torch.load does not
        if damaged is not None:
            raise ValueError(f"wrong checksum: {damaged}")
        file.seek(0)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if not {"epoch", "hyperparameters", "types", "random_state"} <= set(checkpoint):
            raise ValueError("some of a checkpoint's keys are missing")
    except Exception as error:  # zipfile and torch.load raise errors of many types
        raise ValueError(
            f"'{path}' cannot be read: it is damaged, or contains something else than tensors, "
            "numbers, strings, lists and dictionaries. Go back to an earlier checkpoint, or start "
            "a new run with RESUME = False"
        ) from error
    return checkpoint


def resume(path, hyperparameters, **state):
    """Restore a run from its checkpoint and return the epoch to go on with, 1 for a new run.

    Where there is no checkpoint, the run is new, and its state is saved as that after epoch 0: so
    even a run that is stopped in its first epoch can go on. Of several processes, all call this,
    and all get what the first one reads.

    path, hyperparameters, state: as for `save_checkpoint`; lists are filled in place.

    Raises ValueError where the checkpoint is damaged, or belongs to a run with other
    hyperparameters or with another type of model, optimizer and so on. Nothing is changed then.
    """
    path = Path(path)
    if _rank() == 0 and not path.exists():
        save_checkpoint(path, 0, hyperparameters, **state)
        print(f"There is no {path} yet: training starts with epoch 1")
    checkpoint = _from_first(load_checkpoint(path) if _rank() == 0 else None)
    saved = checkpoint["hyperparameters"] | checkpoint["types"]
    given = hyperparameters | _types(state)
    changes = [
        f"{name} was {saved.get(name, 'absent')} and is now {given.get(name, 'absent')}"
        for name in saved | given
        if saved.get(name, "absent") != given.get(name, "absent")
    ]
    if changes:
        raise ValueError(
            f"'{path}' holds a run with other parameters: {', '.join(changes)}. Set them back to "
            "go on with that run. Or start a new one with RESUME = False; it can start from the "
            f"old one's weights: model.load_state_dict(load_checkpoint('{path}.bak')['model'])"
        )
    for name, part in state.items():
        if isinstance(part, list):
            part[:] = checkpoint[name]
        else:
            part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["random_state"])
    if torch.cuda.is_available() and checkpoint["cuda_random_state"] is not None:
        torch.cuda.set_rng_state(checkpoint["cuda_random_state"])
    if checkpoint["epoch"] > 0:
        print(f"Going on after epoch {checkpoint['epoch']}, from {path}")
    return checkpoint["epoch"] + 1


def back_up_checkpoint(path):
    """Make room for a new run: move the checkpoint of an earlier one to `path`.bak.

    One after epoch 0 is deleted instead, lest it replace a backup that was trained.
    """
    path = Path(path)
    if _rank() > 0 or not path.exists():
        return
    with contextlib.suppress(ValueError):  # a damaged one is moved, too
        if load_checkpoint(path)["epoch"] == 0:
            path.unlink()
            return
    path.replace(f"{path}.bak")
    print(f"The checkpoint of the run before is now {path}.bak")


def _types(state):
    return {name: type(part).__name__ for name, part in state.items()}


# --- drawing pad

PAD_SCRIPT = """
function render({ model, el }) {
  el.innerHTML = `
    <canvas width="280" height="280" style="border: 1px solid gray; touch-action: none"></canvas>
    <br><button>Clear</button> <output></output>`;
  const [canvas, button, output] = el.querySelectorAll("canvas, button, output");
  const pen = canvas.getContext("2d");
  pen.lineWidth = 14;
  pen.lineCap = pen.lineJoin = "round";

  const clear = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, 280, 280); };
  const send = (drawing) => { model.set("drawing", drawing); model.save_changes(); };
  const showAnswer = () => { output.textContent = model.get("answer"); };

  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);  // a stroke may leave the canvas and come back
    pen.beginPath();
    pen.moveTo(event.offsetX, event.offsetY);
  };
  canvas.onpointermove = (event) => {
    if (!event.buttons) return;  // the mouse moves, but no button is pressed
    pen.lineTo(event.offsetX, event.offsetY);
    pen.stroke();
  };
  canvas.onpointerup = () => send(canvas.toDataURL());
  button.onclick = () => { clear(); send(""); };
  model.on("change:answer", showAnswer);
  clear();
  showAnswer();
}
export default { render };
"""


def drawing_pad(model, classes):
    """Return a Jupyter widget to draw a digit in, with the mouse or a finger.

    After each stroke it shows the answer of `predict_image`, such as "7 - seven (98%)", or the
    message of the ValueError that `predict_image` raised.

    model: as for `predict_image`.
    classes: names of the classes.
    """
    import anywidget  # only the pad needs these two
    import traitlets

    class DrawingPad(anywidget.AnyWidget):
        _esm = PAD_SCRIPT
        drawing = traitlets.Unicode().tag(sync=True)  # a PNG as a data URL; empty when cleared
        answer = traitlets.Unicode("Draw a digit.").tag(sync=True)

        @traitlets.observe("drawing")
        def _read_drawing(self, change):
            if not self.drawing:
                self.answer = "Draw a digit."
                return
            png = base64.b64decode(self.drawing.partition(",")[2])
            try:
                digit, probabilities, _ = predict_image(model, Image.open(io.BytesIO(png)))
                self.answer = f"{classes[digit]} ({probabilities[digit]:.0%})"
            except ValueError as error:
                self.answer = str(error)

        def __repr__(self):  # what a viewer without widgets shows, such as GitHub
            return "Drawing pad: run this cell in Jupyter to draw a digit."

    return DrawingPad()
