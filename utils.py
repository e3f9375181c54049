"""Train, test, data, plot and checkpoint helpers for small image classifiers; bring your own model.

In short:

    train_data, test_data = load_data("MNIST")
    train_loader = BatchLoader(train_data, 128, shuffle=True, augment=RandomAffine(10))
    test_loader = BatchLoader(test_data, 1000)
    loss, accuracy = train(model, "cpu", train_loader, optimizer, F.nll_loss)
    loss, accuracy = test(model, "cpu", test_loader, F.nll_loss)
"""

import contextlib
import copy
import errno
import hashlib
import io
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageOps
from scipy import ndimage
from skimage import filters, measure, morphology
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from tqdm.auto import tqdm

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, scaled to 0…1; used for every dataset
DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}
DISK_ERRORS |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
DAMAGED = "the files in '{}' are damaged ({}): delete that folder to download them again"
READ_EVERY = 50  # batches between two looks at the losses, each of which waits for the device
RAW_MD5 = {  # of the unpacked files; torchvision knows those of the archives alone
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
CURVES = ("train_losses", "train_acc", "test_losses", "test_acc")
PARTS = ("model", "optimizer", "scheduler", "average")
CHECKPOINT_KEYS = {"epoch", "hyperparameters", "kinds", "random", *CURVES, *PARTS}


# --- run


def get_device():
    """Return the best `torch.device` there is: CUDA, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def init_distributed():
    """Join the processes that `torchrun` started, and return `(device, rank, world_size)`.

    With one process nothing is initialised: `(get_device(), 0, 1)`. With more, each takes a CUDA
    GPU of its own, over NCCL, or the CPU where there is no CUDA, over Gloo, and the processes of
    rank 1 and above print neither output nor warnings from then on.

    Raises ValueError where a machine has fewer GPUs than processes.
    """
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    rank, local_rank, world_size = (int(os.environ.get(name, names[name])) for name in names)
    if world_size == 1:
        return get_device(), 0, 1
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"expected a GPU for each process, got {torch.cuda.device_count()} here for "
                f"process {local_rank}, counted from 0: lower --nproc-per-node, or hide the GPUs "
                "(CUDA_VISIBLE_DEVICES=) to train on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    if rank == 0:
        print(f"{world_size} processes, each on {'the CPU' if device.type == 'cpu' else 'a GPU'}")
    else:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    return device, rank, world_size


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


def get_correct_pred_count(pred, target):
    """Return how many of the N rows of `pred` (N, classes) have their maximum at `target` (N,)."""
    return int((pred.argmax(dim=1) == target).sum())


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

    Loss and accuracy are those of each batch as it was trained on, so before its update. Where the
    loader is a `BatchLoader` of several processes, they are those of all processes together, the
    gradients too, and the model is to be in `DistributedDataParallel`; with other loaders, each
    process measures its own samples.

    model: gives an output of shape (N, classes), and is on `device`.
    train_loader: any iterable of batches (images, labels), float images of the shape that the model
        takes and N integer labels; they are moved to `device`.
    criterion: function or module of (output, labels), giving the mean over the batch, or the sum
        where it has `reduction="sum"`.
    train_losses, train_acc: lists to which the loss and the accuracy (percent) are appended.
    scheduler: a learning rate scheduler that is stepped after each batch.
    progress: show a progress bar.

    Raises ValueError where the loader is empty, the model is on another device, the batches are of
    another kind, a label is none of the model's classes or the criterion returns more than one
    number, and FloatingPointError at a loss that is not finite.
    """
    model.train()
    with tqdm(train_loader, "train", leave=False, disable=not progress) as bar:
        meter = _Meter(model, device, train_loader, criterion, bar)
        for data, target in meter.batches():
            optimizer.zero_grad()
            output = model(data)
            meter.check(output, target)
            loss = criterion(output, target)
            meter.update(loss, output, target, optimizer.param_groups[0]["lr"])
            meter.weigh(loss).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return meter.finish(train_losses, train_acc)


@torch.no_grad()
def test(model, device, test_loader, criterion, test_losses=None, test_acc=None, *, progress=True):
    """Evaluate `model` in evaluation mode and return its `Metrics(loss, accuracy)`.

    Arguments and errors as for `train`. The mode of the model and of each of its parts is restored.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with tqdm(test_loader, "test", leave=False, disable=not progress) as bar:
            meter = _Meter(model, device, test_loader, criterion, bar)
            for data, target in meter.batches():
                output = model(data)
                meter.check(output, target)
                meter.update(criterion(output, target), output, target)
            return meter.finish(test_losses, test_acc)
    finally:
        for module in training:
            module.training = True


test.__test__ = False  # or pytest takes it for a test wherever it is imported by name


def predict(model, device, loader):
    """Return `(predictions, probabilities, targets)` for all samples of a loader, in its order.

    They lie on the CPU: classes (N,), float probabilities (N, classes) whose rows sum to 1, and
    labels (N,). Arguments and errors as for `test`; the model gives logits or log-probabilities.
    The loader is to be a whole one, not the share of one process among several.
    """
    if getattr(loader, "world_size", 1) > 1:
        raise ValueError(
            f"expected a loader of all samples, got the share of process {loader.rank} of "
            f"{loader.world_size}: make a BatchLoader without rank and world_size"
        )
    seen = []

    def keep(output, target):
        seen.append((output.softmax(dim=1), target))
        return 0 * seen[-1][0].sum()  # nan where an output is

    test(model, device, loader, keep, progress=False)
    probabilities, targets = (torch.cat(parts).cpu() for parts in zip(*seen, strict=True))
    return probabilities.argmax(dim=1), probabilities, targets


class _Meter:
    """Checks the batches of one pass, and adds up loss and accuracy where they were computed."""

    def __init__(self, model, device, loader, criterion, bar):
        self.device = torch.empty(0, device=device).device  # with its index
        here = {parameter.device for parameter in model.parameters()}
        if here - {self.device}:
            raise ValueError(
                f"the model is on {', '.join(map(str, here))}, its batches go to {device}: call "
                "model.to(device) before the optimizer is made"
            )
        self.loader, self.labels = loader, None
        self.world_size = loader.world_size if isinstance(loader, BatchLoader) else 1
        self.is_shared = self.world_size > 1
        if self.is_shared:
            processes = dist.get_world_size() if dist.is_initialized() else 1
            parallel = isinstance(model, DistributedDataParallel) or not model.training
            if processes != self.world_size or not parallel:
                raise ValueError(
                    f"the loader gives a share for one of {self.world_size} processes: expected as "
                    f"many in the process group, got {processes}, and for training the model in "
                    "DistributedDataParallel"
                )
        self.is_sum = getattr(criterion, "reduction", "mean") == "sum"
        self.bar = bar
        self.start = time.perf_counter()
        self.unread = []  # per batch: loss, correct predictions, samples, learning rate
        self.steps = self.samples = self.correct = self.loss_sum = 0

    def batches(self):
        """Yield the loader's batches on the device."""
        for step, (data, target) in enumerate(self.loader):
            if not data.is_floating_point():
                raise ValueError(
                    f"expected normalised float images, as BatchLoader gives, got {data.dtype}"
                )
            if target.is_floating_point() or target.dim() != 1 or len(target) != len(data):
                raise ValueError(
                    f"expected an integer label for each of {len(data)} images, got {target.dtype} "
                    f"of shape {tuple(target.shape)}; of one-hot rows, take .argmax(dim=1)"
                )
            self.step, self.size = step, len(target)
            if self.is_shared and self.size == 0:
                # The last global batch has fewer samples than there are processes: those without
                # take part in the step with a blank image that weighs nothing.
                data, target = data.new_zeros(1, *data.shape[1:]), target.new_zeros(1)
            self.labels = target if target.device.type == "cpu" else None
            ahead = self.device.type != "cpu"  # the host need not wait for the copy
            yield (
                data.to(self.device, non_blocking=ahead),
                target.to(self.device, torch.long, non_blocking=ahead),
            )

    def check(self, output, target):
        """Compare output and labels, where these came from an accelerator the first time only."""
        if output.dim() != 2 or len(output) != len(target):
            raise ValueError(
                f"expected a model whose output has shape ({len(target)}, classes), got "
                f"{tuple(output.shape)}"
            )
        labels = self.labels
        if labels is None:
            if self.steps or self.unread:
                return  # to look again, the host would have to wait
            labels = self.loader.targets if isinstance(self.loader, BatchLoader) else target
        labels = labels.cpu().numpy()
        low, high = labels.min(), labels.max()
        if low < 0 or high >= output.shape[1]:
            raise ValueError(
                f"expected labels from 0 to {output.shape[1] - 1}, since the model tells "
                f"{output.shape[1]} classes apart, got {low} to {high}"
            )

    def update(self, loss, output, target, lr=None):
        if loss.dim() != 0:
            raise ValueError(
                f"criterion must return one number, got a tensor of shape {tuple(loss.shape)}: "
                'use reduction="mean" or reduction="sum"'
            )
        self.bar.update()
        if self.is_shared and self.size == 0:
            return
        correct = (output.argmax(dim=1) == target).sum()
        lr = None if lr is None else lr + 0  # a copy, where a scheduler changes a tensor in place
        self.unread.append((loss.detach(), correct, len(target), lr))
        if len(self.unread) == READ_EVERY:
            self.read()

    def weigh(self, loss):
        """Return what to backpropagate, so that DDP's mean is the gradient of the global batch."""
        if not self.is_shared:
            return loss
        count, batch_size = len(self.loader.images), self.loader.batch_size
        whole = min(batch_size, count - self.step * batch_size)  # samples of the global batch
        share = float(self.size > 0) if self.is_sum else self.size / whole
        return loss * (self.world_size * share)

    def read(self):
        losses, correct, sizes, rates = zip(*self.unread, strict=True)
        self.unread.clear()
        self.correct += int(torch.stack(correct).sum())  # here the host waits for the device
        self.samples += sum(sizes)
        for loss, size, lr in zip(torch.stack(losses).tolist(), sizes, rates, strict=True):
            self.steps += 1
            if not math.isfinite(loss):
                where = "" if lr is None else f" at learning rate {lr:g} (try a lower one)"
                raise FloatingPointError(f"the loss became {loss} in step {self.steps}{where}")
            self.loss_sum += loss if self.is_sum else loss * size
        metrics = Metrics(self.loss_sum / self.samples, 100 * self.correct / self.samples)
        speed = self.world_size * self.samples / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(
            "loss {:.4f}, accuracy {:.2f} %, {:,.0f} images/s".format(*metrics, speed)
        )

    def finish(self, losses, accuracies):
        if self.unread:
            self.read()
        sums = self.loss_sum, self.correct, self.samples
        if self.is_shared:
            sums = torch.tensor(sums, dtype=torch.float64, device=self.device)
            dist.all_reduce(sums)
            sums = sums.tolist()
        loss_sum, correct, samples = sums
        if samples == 0:
            raise ValueError("the loader is empty: expected at least one batch of (images, labels)")
        metrics = Metrics(loss_sum / samples, 100 * correct / samples)
        for values, value in zip((losses, accuracies), metrics, strict=True):
            if values is not None:
                values.append(value)
        return metrics


# --- data


def load_data(name="auto", root=None):
    """Return `(train_data, test_data)`, with `.data` (uint8, N×28×28), `.targets` and `.classes`.

    name: "MNIST", "FashionMNIST", "KMNIST" or "QMNIST", read from `root` in torchvision's layout
        and downloaded where they are not there; "digits", scikit-learn's small set, which needs no
        network; or "auto", MNIST where it can be had and otherwise, with a warning, "digits".
        The two datasets carry the name that was loaded as `.name`.
    root: folder of the data; by default the environment variable DATA_DIR, else "data".

    Of several processes, all have to call it. They take turns, since the first may download, and
    all get the set that rank 0 got.

    MNIST's and Fashion-MNIST's files are compared with their MD5. Of the others it is checked that
    each image is 28×28 and has a label, and that the labels are in range.

    Raises ValueError for another name and for damaged files, FileNotFoundError where the files are
    absent and cannot be downloaded, OSError where `root` cannot be read or written.
    """
    root = Path(root or os.environ.get("DATA_DIR") or "data").expanduser()
    if not dist.is_initialized():
        return _load(name, root)
    is_first = os.environ.get("LOCAL_RANK") == "0"  # on its machine
    turn = 0 if dist.get_rank() == 0 else 1 if is_first else 2
    pair = _load(name, root) if turn == 0 else None
    chosen = [pair and pair[0].name]
    dist.broadcast_object_list(chosen)
    for each in (1, 2):
        if turn == each:
            pair = _load(chosen[0], root)
        dist.barrier()
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
        pair = _load_torchvision(getattr(datasets, name), root)
    else:
        raise ValueError(
            f"unknown dataset {name!r}: expected 'auto', 'MNIST', 'FashionMNIST', 'KMNIST', "
            "'QMNIST' or 'digits'"
        )
    for data in pair:
        data.name = name
    return pair


def _load_torchvision(dataset, root):
    folder, name = root / dataset.__name__ / "raw", dataset.__name__
    resources = dataset.resources
    if dataset is datasets.QMNIST:
        resources = resources["train"] + resources["test"]
    files = [folder / Path(address).stem for address, _ in resources]  # each comes as FILE.gz
    archives = {folder / Path(address).name: md5 for address, md5 in resources}
    raw = {folder / file: md5 for file, md5 in RAW_MD5.get(name, {}).items()}
    legacy = root / name / "processed" / "training.pt"  # torchvision would take it, unchecked
    incomplete = []
    try:
        is_old = legacy.exists()
        damaged, incomplete = (
            [file.name for file in sums if file.exists() and not check_integrity(file, sums[file])]
            for sums in (raw, archives)
        )
        damage = [f"{file} is not what was published" for file in damaged]
        splits = () if damage or is_old else (True, False)
        pair = [dataset(root, train=split, download=True) for split in splits]
    except Exception as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise OSError(
                error.errno,
                f"{name}'s files cannot be read or written ({error.strerror}): in the environment "
                "variable DATA_DIR, name a folder where they can, and have room",
                str(folder),
            ) from error
        if incomplete or all(file.exists() for file in files):
            what = ", ".join(incomplete) or repr(error)
            raise ValueError(DAMAGED.format(folder, what)) from error
        raise FileNotFoundError(
            f"{name} is not in '{root}' and could not be downloaded. Put "
            f"{', '.join(file.name for file in files)} into '{folder}', or name another folder in "
            "the environment variable DATA_DIR, or go without a network: load_data('digits'). "
            f"What was tried: {error}"
        ) from error
    if is_old:
        raise ValueError(
            f"'{legacy.parent}' holds files of an old torchvision, which bear no checksum: delete "
            "that folder to use, or download, the original ones"
        )
    for data in pair:
        images, targets = _tensors(data)
        if len(targets) == 0 or images.shape != (len(targets), 28, 28):
            damage.append(f"{len(targets)} labels for images of shape {tuple(images.shape)}")
        elif not 0 <= targets.min() <= targets.max() < len(data.classes):
            damage.append(f"labels from {targets.min()} to {targets.max()}")
    if damage:
        raise ValueError(DAMAGED.format(folder, "; ".join(damage)))
    return pair


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
    """Batches of a dataset that lies on the device as one uint8 tensor; a fast `DataLoader`.

    Each pass yields each sample once, in batches `(images, labels)`: float32 images of shape
    (N, 1, 28, 28), scaled to 0…1 and normalised by MEAN and STD, and int64 labels of shape (N,),
    both on `device`. The last batch may be smaller.

    The order and the augmentation of a pass depend on `seed` and `epoch` alone, not on the device
    or the global generators. `epoch` counts the passes that were exhausted and can be set: peeking
    at a batch changes nothing, and a run resumes at any epoch.

    dataset: has `.data`, uint8 of shape (N, 28, 28), and `.targets`, N integers; or a `Subset` of
        such a dataset. Its transforms are not applied.
    augment: a `RandomAffine`.
    rank, world_size: of several processes, each with a loader that differs in `rank` alone, each
        gets its share of every batch of `batch_size`: each `world_size`-th sample from the
        `rank`-th on, counted from 0. All get as many batches, whatever `world_size` is; if the
        last one has too few samples, some of the shares are empty.

    Raises ValueError for images or labels of another kind, a batch size below 1 or `world_size` and
    a rank that is not below `world_size`, TypeError for a dataset without `.data` and `.targets`
    and for another kind of augmentation.
    """

    def __init__(
        self,
        dataset,
        batch_size,
        *,
        device="cpu",
        shuffle=False,
        augment=None,
        seed=0,
        rank=0,
        world_size=1,
    ):
        images, targets = _tensors(dataset)
        if images.dtype != torch.uint8 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise ValueError(
                "expected a dataset whose .data is uint8 of shape (N, 28, 28) with N > 0, got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        if targets.shape != images.shape[:1] or targets.is_floating_point():
            raise ValueError(
                f"expected an integer label for each of {len(images)} images, got {targets.dtype} "
                f"of shape {tuple(targets.shape)}; of one-hot rows, take .argmax(dim=1)"
            )
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        if augment is not None and not hasattr(augment, "draw"):
            raise TypeError(f"augment must be a RandomAffine, got {type(augment).__name__}")
        if not 0 <= rank < world_size <= batch_size:
            raise ValueError(
                f"expected 0 <= rank < world_size <= batch_size, got rank {rank} of {world_size} "
                f"and batches of {batch_size}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.images = images.unsqueeze(1).to(device)
        self.targets = targets.long().to(device)

    def __len__(self):
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        epoch, count, device = self.epoch, len(self.images), self.images.device
        # SeedSequence mixes the two numbers, so that seed 0 in epoch 1 is not seed 1 in epoch 0.
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(count, generator=generator)
        order = order.to(device)
        if self.augment:
            matrices = self.augment.draw(count, generator).to(device)
        for start in range(0, count, self.batch_size):
            batch = slice(start + self.rank, start + self.batch_size, self.world_size)
            index = order[batch]
            images = self.images[index]
            if self.augment and len(images) > 0:  # affine_grid refuses an empty share
                images = self.augment(images.float(), matrices[batch])
            yield images.sub(255 * MEAN).div_(255 * STD), self.targets[index]
        if self.epoch == epoch:  # else it was set meanwhile, or another pass was quicker
            self.epoch = epoch + 1


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
    targets = torch.as_tensor(dataset.targets)
    if isinstance(dataset, datasets.QMNIST):
        targets = targets[:, 0]  # the class; the other columns tell who wrote it, and where
    return torch.as_tensor(dataset.data), targets


class RandomAffine:
    """Rotate, translate, scale and shear each image of a batch by parameters of its own.

    The arguments mean what they mean to `torchvision.transforms.v2.RandomAffine`, which draws one
    set of parameters for a whole batch. Interpolation is bilinear, translations are not rounded to
    whole pixels, and what comes from outside the image is 0.

    degrees: rotation in degrees, clockwise: a number d for (-d, d), or (low, high).
    translate: largest shifts (horizontal, vertical) as fractions of the image's side, 0 to 1.
    scale: (low, high), factors above 0.
    shear: in degrees along x: a number s for (-s, s), or (low, high); or along both axes, as
        (x low, x high, y low, y high).

    Raises ValueError for a value out of its range.
    """

    def __init__(self, degrees, translate=None, scale=None, shear=None):
        self.degrees = _ranges(degrees, lengths=(2,))
        self.translate = (0.0, 0.0) if translate is None else translate
        self.scale = (1.0, 1.0) if scale is None else scale
        self.shear = _ranges(0.0 if shear is None else shear, lengths=(2, 4))
        if len(self.shear) == 2:
            self.shear = (*self.shear, 0.0, 0.0)
        x, y = self.translate
        small, large = self.scale
        if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < small <= large):
            raise ValueError(
                "expected translate=(0 to 1, 0 to 1) and scale=(low, high) with 0 < low <= high, "
                f"got {translate} and {scale}"
            )

    def draw(self, count, generator=None):
        """Draw the parameters of `count` images on the CPU, as matrices (count, 2, 3)."""

        def uniform(low, high):
            return torch.empty(count).uniform_(low, high, generator=generator)

        x, y = self.translate
        return affine_matrices(
            angle=uniform(*self.degrees),
            translate=torch.stack((uniform(-x, x), uniform(-y, y)), dim=1),
            scale=uniform(*self.scale),
            shear=torch.stack((uniform(*self.shear[:2]), uniform(*self.shear[2:])), dim=1),
        )

    def __call__(self, images, matrices=None):
        """Transform float images (N, C, S, S) with black at 0; draw where no matrices are given."""
        if matrices is None:
            matrices = self.draw(len(images)).to(images.device)
        grid = F.affine_grid(matrices, images.shape, align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


def _ranges(value, lengths):
    angles = (-value, value) if isinstance(value, Real) else tuple(value)
    if len(angles) not in lengths or not all(
        -math.inf < low <= high < math.inf
        for low, high in zip(angles[::2], angles[1::2], strict=True)
    ):
        raise ValueError(
            f"expected an angle of at least 0, or its range (low, high), in degrees, got {value}"
        )
    return angles


def affine_matrices(angle, translate, scale, shear):
    """Return the matrices (N, 2, 3) with which `F.affine_grid` transforms N square images.

    angle (N,) and shear (N, 2) in degrees, translate (N, 2) in fractions of the side, scale (N,).
    With x right and y down from the image's centre, a point p moves to
    scale · R(angle) · Y(shear y) · X(shear x) · p + translate, as in torchvision's `affine`.
    """
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    tan_x, tan_y = shear.deg2rad().tan().unbind(dim=1)
    # The grid tells where each output pixel comes from, so this is the inverse of the linear part.
    # R·Y·X has determinant 1.
    a, b = cos + sin * tan_y, sin - cos * tan_y  # first column of R·Y
    c, d = -sin - a * tan_x, cos - b * tan_x  # second column of R·Y·X
    inverse = torch.stack((d, -c, -b, a), dim=1).view(-1, 2, 2) / scale.view(-1, 1, 1)
    shift = inverse @ (2 * translate).unsqueeze(2)  # the grid's coordinates run from -1 to 1
    return torch.cat((inverse, -shift), dim=2)


# --- one photo or scan

# Two kinds of numbers: those marked "derived" follow from MNIST or from arithmetic; the others are
# chosen, and tests/handwriting.py measures what they are worth. "Extent" is a box's longer side.
SMALLEST_SIDE = 8  # pixels; an image with a shorter side cannot show a digit and is refused
SHOWN_SIDE = 1_000  # pixels, the limit of the longer side; plots show no more, and it saves memory
SEARCH_SIDE = 400  # pixels of the longer side while ink is searched: a pen of 1 % is 4 pixels wide
CLOSE_UP = 0.4  # share of SEARCH_SIDE; a digit of a smaller extent is cut out and searched again
CLOSE_UP_MARGIN = 0.5  # share of the digit's extent, the paper left on each side of a close-up
BROADEST_INK = 0.3  # share of the shorter side: what is broader is paper or shadow, not a stroke
FULL_INK = 99.95  # percentile of all pixels: the pen's full strength, not that of the noisiest few
LEAST_INK = 0.06  # on a scale from black 0 to white 1: ink differs from its paper by this at least
LEAST_SIGNAL = 6  # standard deviations of the noise, so that no pixel gets there by chance
QUANTILES, SIGMAS = (5, 30), 1.12  # derived: a normal's percentiles and how far apart they are
SURE_INK = 0.6  # share of the pen's full strength; each part of the digit gets there somewhere
FAINT_INK = 0.4, 0.2  # the share that is enough beside sure ink; the second joins broken strokes
LINE_RATIO = 0.15  # of width to length; what is thinner may be a ruled line or a table's edge
BORDER_FACTOR = 0.4  # on a part's weight for each border that it touches, as shadows do
FRAME_CONTENT = 0.3  # share of a part's extent: around a part larger than this it is a frame
RIVAL = 0.6  # share of the digit's weight, above which another part is a second digit
NEAR = 0.25  # share of the digit's extent: strokes that belong to it are not farther away
SPECK = 0.12  # share of the digit's extent: smaller parts are dirt
DIGIT_SIDE, IMAGE_SIDE = 20, 28  # pixels, derived: MNIST's longer side of a digit and of an image
PEN = 3.0  # pixels; thinner strokes are broadened to it: MNIST's are 1.6 to 3.4 pixels thick


def predict_image(model, image):
    """Recognise one handwritten digit in a photo or scan: `(digit, probabilities, prepared)`.

    probabilities: float tensor (classes,) on the CPU that sums to 1; if its maximum is low, the
        model is not sure. prepared: what the model saw, a uint8 array (28, 28), light on dark.

    model: takes images (1, 1, 28, 28) and gives logits or log-probabilities (1, classes). It is
        left in evaluation mode.
    image: a path or a PIL image; dark on light or light on dark, in any light. The digit may be
        anywhere and of any size, with some paper around it; specks, ruled lines paler than the
        pen, a frame, and parts of other digits at the border do not matter.

    The digit is prepared as MNIST's were: its box is scaled to 20×20 pixels, and its centre of mass
    is put into the middle of 28×28 (http://yann.lecun.com/exdb/mnist). Thin strokes are broadened
    to the thickness of MNIST's.

    Raises ValueError if the image is smaller than 8×8 pixels, its file is damaged, or it contains
    no ink or several digits, TypeError if it is neither a path nor a PIL image, FloatingPointError
    if the model's output is nan, and Pillow's errors if there is no such file, it is no image or
    it has more pixels than Pillow accepts, about 179 million.
    """
    prepared = _mnist_form(_find_digit(_upright_grey(image)))
    like = next(model.parameters())  # of the model's dtype, on its device
    data = (torch.from_numpy(prepared).to(like) / 255 - MEAN) / STD
    model.eval()
    with torch.no_grad():
        output = model(data[None, None])  # (1, 1, 28, 28) to (1, classes)
    probabilities = output[0].softmax(dim=0).cpu()
    if probabilities.isnan().any():
        raise FloatingPointError("the model's output is nan, so its weights are of no use")
    return int(probabilities.argmax()), probabilities, prepared


def _upright_grey(image):
    """Return a path's or PIL image's greys (H, W), 0 to 1, its longer side at most 1,000 pixels."""
    if isinstance(image, (str, os.PathLike)):
        image = _open(image)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"expected a path or a PIL image, got {type(image).__name__}: of an array, take "
            "Image.fromarray(array)"
        )
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE:
        raise ValueError(f"expected an image of at least 8×8 pixels, got {width}×{height}")
    is_deep = image.mode.startswith(("I", "F"))  # more than 8 bits
    mode = "F" if is_deep else "LA" if image.has_transparency_data else "L"
    small = image.convert(mode).reduce(math.ceil(max(width, height) / SHOWN_SIDE))
    values = np.asarray(ImageOps.exif_transpose(small), float)
    if is_deep:
        values = np.nan_to_num(values)
        return (values / max(values.max(), 1)).clip(0, 1)  # the full range is rarely used
    if mode == "L":
        return values / 255
    grey, alpha = np.moveaxis(values / 255, 2, 0)
    is_dark = (grey * alpha).sum() < 0.5 * alpha.sum()
    return grey * alpha + is_dark * (1 - alpha)  # dark ink on white, light ink on black


def _open(path):
    picture = Image.open(path)
    try:
        picture.load()
    except Exception as error:  # Pillow's readers raise errors of all kinds
        raise ValueError(f"'{path}' is damaged: {error}") from error
    return picture


def _find_digit(grey):
    """Return the mask (h, w) of the digit in an image (H, W), cut to its box, at its own scale."""
    digit, scale = _look(grey)
    box = ndimage.find_objects(digit)[0]
    extent = max(digit[box].shape)
    if extent <= CLOSE_UP * SEARCH_SIDE and scale < 1:  # a small digit in a large image
        margin = CLOSE_UP_MARGIN * extent
        close_up = tuple(
            slice(max(0, int((side.start - margin) / scale)), int((side.stop + margin) / scale))
            for side in box
        )
        digit, _ = _look(grey[close_up])
        box = ndimage.find_objects(digit)[0]
    return digit[box] > 0


def _look(grey):
    """Return `(digit, scale)`: 1 where the digit is and else 0, and its size by grey's."""
    scale = SEARCH_SIDE / max(grey.shape)
    ink = _ink(_resize(grey, [max(1, round(side * scale)) for side in grey.shape]))
    for faint in FAINT_INK:
        digit, has_rival = _choose(filters.apply_hysteresis_threshold(ink, faint, SURE_INK))
        if not has_rival:
            return digit, scale
    raise ValueError("found several digits in the image: expected one; cut the image to it")


def _ink(grey):
    """Return how strong the ink is in each pixel of `grey` (H, W): paper about 0, pen about 1."""
    # The light on the paper, as a quadratic surface fitted to all pixels
    y, x = np.mgrid[-1 : 1 : grey.shape[0] * 1j, -1 : 1 : grey.shape[1] * 1j]
    terms = np.stack([x**0, x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    light = terms @ np.linalg.lstsq(terms, grey.ravel(), rcond=None)[0]
    grey = grey - light.reshape(grey.shape)  # otherwise a slope looks like ink at the borders
    # What is left of shades is local: ink is what a closing fills, which is as broad as its size.
    size = round(BROADEST_INK * min(grey.shape)) | 1  # odd, so that it has a middle
    around = size / 4  # standard deviation: most of the weight lies within size
    contrast = grey - ndimage.gaussian_filter(grey, around)
    if (contrast**3).sum() > 0:  # ink, which covers less than the paper, is light
        grey = -grey
    paper = ndimage.grey_closing(ndimage.gaussian_filter(grey, 1), size)  # as if without ink
    ink = ndimage.gaussian_filter(paper, around) - grey
    low, middle, full = np.percentile(ink, (*QUANTILES, FULL_INK))
    noise = (middle - low) / SIGMAS  # of the palest pixels, which are paper for sure
    if full < max(LEAST_INK, LEAST_SIGNAL * noise):
        raise ValueError(
            "found no ink in the image: expected a digit that is clearly darker, or clearly "
            "lighter, than the paper around it"
        )
    return ink / full


def _choose(mask):
    """Return `(digit, has_rival)`: the digit in a mask (H, W) as 0 and 1, whether there is another.

    The digit is the part of the mask with the greatest weight, and what lies near it.
    """
    labels = measure.label(mask)
    parts = measure.regionprops(labels)
    weights = {part.label: _weight(part, mask.shape) for part in parts}
    parts.sort(key=lambda part: weights[part.label], reverse=True)
    main, *others = [part for part in parts if _frames(parts[0], part)] or parts
    kept, has_rival = [main.label], False
    for part in others:
        if _borders(part, mask.shape) > 0:
            continue
        (top, left), (bottom, right) = _corners(main) - _corners(part)[::-1]
        down, across = max(top, -bottom), max(left, -right)  # between the boxes; below 0: overlap
        is_near = math.hypot(max(down, 0), max(across, 0)) < NEAR * max(main.image.shape)
        if weights[part.label] > RIVAL * weights[main.label] and (across >= 0 or not is_near):
            has_rival = True
        elif is_near and max(part.image.shape) > SPECK * max(main.image.shape):
            kept.append(part.label)
    return np.isin(labels, kept).astype(int), has_rival


def _weight(part, shape):
    """Return how likely a part is the digit: large, in the middle, away from the borders."""
    (height, width), borders = part.image.shape, _borders(part, shape)
    is_line = min(height, width) < LINE_RATIO * max(height, width)
    if is_line and (height < width or borders >= 2):  # other upright lines may be a 1
        return 0
    off_middle = math.dist(np.divide(part.centroid, shape), (0.5, 0.5))
    return max(height, width) * (1 - off_middle) * BORDER_FACTOR**borders


def _corners(part):
    return np.reshape(part.bbox, (2, 2))  # (top, left), (bottom, right)


def _borders(part, shape):
    """Return how many of the image's four borders a part touches."""
    start, stop = _corners(part)
    return (start == 0).sum() + (stop == shape).sum()


def _frames(frame, part):
    """Tell whether `part`, which is no speck, lies inside the box of `frame`."""
    start, stop = _corners(part)
    outer_start, outer_stop = _corners(frame)
    is_inside = (outer_start < start).all() and (stop < outer_stop).all()
    return is_inside and max(part.image.shape) > FRAME_CONTENT * max(frame.image.shape)


def _mnist_form(digit):
    """Bring the mask of a digit, cut to its box, into MNIST's form: uint8 (28, 28)."""
    depth = ndimage.distance_transform_edt(np.pad(digit, 1))[1:-1, 1:-1]
    # Twice the depth in a stroke's middle is its thickness where that is even, 1 more where odd.
    thickness = 2 * np.median(depth[morphology.skeletonize(digit)]) - 0.5
    grow = max(0, (PEN * max(digit.shape) / DIGIT_SIDE - thickness) / 2)
    digit = morphology.isotropic_dilation(np.pad(digit, math.ceil(grow)), grow)
    digit = digit[ndimage.find_objects(digit.astype(int))[0]]
    scale = DIGIT_SIDE / max(digit.shape)
    small = _resize(digit.astype(float), [max(1, round(side * scale)) for side in digit.shape])
    middle = np.array(ndimage.center_of_mass(small))
    free = IMAGE_SIDE - np.array(small.shape)
    top, left = np.clip(np.round((IMAGE_SIDE - 1) / 2 - middle).astype(int), 0, free)
    image = np.zeros((IMAGE_SIDE, IMAGE_SIDE))
    image[top : top + small.shape[0], left : left + small.shape[1]] = small.clip(0, 1)
    return (255 * image / image.max()).round().astype(np.uint8)


def _resize(values, shape):
    picture = Image.fromarray(values.astype(np.float32))
    method = Image.Resampling.BOX if shape[0] < len(values) else Image.Resampling.BICUBIC
    return np.asarray(picture.resize(shape[::-1], method), float)


# --- plots


def plot_train_metrics(train_losses, train_acc, test_losses, test_acc, *, title=None):
    """Plot loss and accuracy (percent) per epoch, train against test, and return the `Figure`.

    Raises ValueError where the four lists are empty or differ in length.
    """
    lengths = [len(values) for values in (train_losses, train_acc, test_losses, test_acc)]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(f"expected four lists of one length, an entry per epoch, got {lengths}")
    epochs = range(1, lengths[0] + 1)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    plt.close(fig)  # pyplot forgets it, whatever happens; the caller has it
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
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    fig.suptitle(title)
    return fig


def plot_sample_data(data_loader, *, title=None):
    """Plot up to 24 images of the first batch as they enter the model and return the `Figure`.

    Each bears its class's name where the loader's dataset has one, else its label.
    Raises ValueError where the loader is empty, its images are not of shape (N, 1, H, W) or its
    labels not N integers.
    """
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws from the global generator
        images, labels = next(iter(data_loader), (torch.empty(0), None))
    _check_grey(images)
    if labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise ValueError(
            f"expected an integer label for each of {len(images)} images, got {labels.dtype} of "
            f"shape {tuple(labels.shape)}"
        )
    names = _class_names(data_loader)
    return _plot_images(images, [names.get(label, label) for label in labels.tolist()], title)


def plot_misclassified(loader, predictions, probabilities, targets, *, title=None):
    """Plot up to 24 wrong predictions, the most confident first, and return the `Figure`.

    Each bears its label, the prediction and the prediction's probability in percent.

    loader: of N images (1, H, W), in the order of the others.
    predictions, probabilities, targets: what `predict` returned for it, of shape (N,), (N, classes)
        and (N,).

    Raises ValueError where the loader's labels are not `targets`, as when it shuffles, and where
    an image has another shape.
    """
    images, labels = zip(*loader, strict=True)
    if not torch.equal(torch.cat(labels).cpu(), targets) or len(predictions) != len(targets):
        raise ValueError(
            "expected the loader that gave these predictions, in the same order: its labels are "
            "others; use one that does not shuffle"
        )
    confidences = probabilities.max(dim=1).values
    wrong = (predictions != targets).nonzero().flatten()
    wrong = wrong[confidences[wrong].argsort(descending=True)]
    names = _class_names(loader)
    titles = [
        f"{names.get(label, label)}\n→ {names.get(guess, guess)}, {percent:.0f} %"
        for label, guess, percent in zip(
            targets[wrong].tolist(),
            predictions[wrong].tolist(),
            (100 * confidences[wrong]).tolist(),
            strict=True,
        )
    ]
    return _plot_images(torch.cat(images)[wrong.to(images[0].device)], titles, title)


def plot_confusion_matrix(predictions, targets, classes, *, title=None):
    """Plot how often each class was taken for each other, and return the `Figure`.

    Colour shows the errors alone, as the correct predictions on the diagonal would drown them.

    predictions, targets: N integers each, 0 to len(classes) - 1.
    classes: the classes' names.

    Raises ValueError where there are no predictions, they are not as many as the targets, or one of
    either is out of range.
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix  # takes a second

    if len(predictions) != len(targets) or len(targets) == 0:
        raise ValueError(
            "expected as many predictions as targets, and one at least, got "
            f"{len(predictions)} and {len(targets)}"
        )
    counts = confusion_matrix(targets, predictions, labels=range(len(classes)))
    if counts.sum() != len(targets):
        raise ValueError(
            f"expected integers from 0 to {len(classes) - 1}, since there are {len(classes)} class "
            f"names, got predictions up to {max(predictions)} and targets up to {max(targets)}"
        )
    fig, axes = plt.subplots(figsize=(7, 6.4), layout="constrained")
    plt.close(fig)
    errors = counts - np.diag(counts.diagonal())
    display = ConfusionMatrixDisplay(errors, display_labels=classes)
    display.plot(ax=axes, cmap="Reds", colorbar=False, xticks_rotation=45)
    for (true, predicted), text in np.ndenumerate(display.text_):
        text.set_text(counts[true, predicted] or "")
        if true == predicted:
            text.set(color="gray", fontsize=9)
    axes.set(xlabel="predicted", ylabel="true")
    fig.suptitle(title)
    return fig


def plot_prediction(image, probabilities, prepared, classes=None, *, title=None):
    """Plot what `predict_image` was given, what the model saw of it, and what it made of that.

    Returns the `Figure`.

    image: as for `predict_image`, which returned the next two for it.
    probabilities: (classes,), 0 to 1.
    prepared: (28, 28), uint8.
    classes: the classes' names; by default, 0, 1, 2 and so on.
    """
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    plt.close(fig)
    left.imshow(_upright_grey(image), cmap="gray", vmin=0, vmax=1)
    left.set_title("the image, in grey")
    middle.imshow(prepared, cmap="gray", vmin=0, vmax=255)
    middle.set_title("what the model sees")
    for axes in (left, middle):
        axes.axis("off")
    percent = 100 * np.asarray(probabilities)
    bars = right.bar(range(len(percent)), percent)
    right.bar_label(bars, [f"{value:.0f}" for value in percent], fontsize=8)
    right.set(xlabel="class", ylabel="probability (%)", ylim=(0, 110), xticks=range(len(percent)))
    if classes is not None:
        right.set_xticklabels(classes, rotation=45, ha="right")
    fig.suptitle(title)
    return fig


def _class_names(loader):
    """Return {label: name} of the loader's dataset, empty where it has none."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dict(enumerate(getattr(dataset, "classes", ())))


def _check_grey(images):
    if images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(
            f"expected a batch of images of shape (N, 1, H, W), got {tuple(images.shape)}"
        )


def _plot_images(images, titles, title):
    """Show up to 24 images (N, 1, H, W) in a grid."""
    _check_grey(images)
    fig, grid = plt.subplots(3, 8, figsize=(11, 4.6), layout="constrained")
    plt.close(fig)
    images = images.cpu()
    low, high = map(float, images.aminmax()) if len(images) else (0, 1)
    if len(images) == 0:
        fig.text(0.5, 0.5, "none", ha="center")
    for axes, image, name in zip(grid.flat, images, titles, strict=False):
        axes.imshow(image.squeeze(0).numpy(), cmap="gray", vmin=low, vmax=high)
        axes.set_title(name, fontsize=8)
    for axes in grid.flat:
        axes.axis("off")
    fig.suptitle(title)
    return fig


# --- checkpoints


def save_checkpoint(
    path,
    model,
    optimizer,
    train_losses,
    train_acc,
    test_losses,
    test_acc,
    *,
    scheduler=None,
    average=None,
    hyperparameters=None,
):
    """Write all that a run needs in order to go on after a whole epoch as if it had never stopped.

    The file is written beside `path`, flushed to disk and moved over it: whenever the machine dies,
    `path` is the old checkpoint or the new one, whole. It ends with the SHA-256 of what precedes,
    and holds tensors, numbers, strings, lists and dictionaries alone: `torch.load` reads it too.

    train_losses, train_acc, test_losses, test_acc: lists with a number for each epoch so far.
    average: a weight average, such as `torch.optim.swa_utils.AveragedModel`.
    hyperparameters: dictionary by which `load_checkpoint` tells this run from another.

    Raises TypeError for a state that holds anything else, ValueError for lists of unequal length
    and OSError where the file cannot be written; the previous one is then untouched.
    """
    path = Path(path)
    curves = train_losses, train_acc, test_losses, test_acc
    lengths = [len(values) for values in curves]
    if len(set(lengths)) != 1:
        raise ValueError(f"expected four lists of one length, an entry per epoch, got {lengths}")
    parts = dict(zip(PARTS, (model, optimizer, scheduler, average), strict=True))
    kinds = {name: type(part).__name__ for name, part in parts.items()}
    kind, numbers, *more = np.random.get_state()
    random_states = {
        "python": random.getstate(),
        "numpy": (kind, numbers.tolist(), *more),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }
    checkpoint = {
        "epoch": lengths[0],
        **dict(zip(CURVES, curves, strict=True)),
        **{name: None if part is None else part.state_dict() for name, part in parts.items()},
        "kinds": kinds,
        "random": random_states,
        "hyperparameters": hyperparameters or {},
    }
    buffer = io.BytesIO()
    torch.save({key: _plain(value, key) for key, value in checkpoint.items()}, buffer)
    content = buffer.getvalue()
    unfinished = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            raise OSError(
                error.errno, f"could not write the checkpoint ({error.strerror})", str(path)
            ) from error
        raise


def load_checkpoint(
    path,
    model=None,
    optimizer=None,
    train_losses=None,
    train_acc=None,
    test_losses=None,
    test_acc=None,
    *,
    scheduler=None,
    average=None,
    hyperparameters=None,
):
    """Read a checkpoint, restore what is given from it, and return it as a dictionary.

    The dictionary has the keys epoch, train_losses, train_acc, test_losses, test_acc, model,
    optimizer, scheduler, average, kinds, random and hyperparameters; its tensors are on the CPU.

    model, optimizer, scheduler, average: get the state saved for them, with the settings that it
        holds. With an optimizer, training goes on: every part that was saved must then be given,
        and the global random states are restored too; a `BatchLoader` goes on where its `epoch`
        is set to the checkpoint's.
    train_losses, train_acc, test_losses, test_acc: lists whose content is replaced.
    hyperparameters: dictionary to compare with the one saved.

    Raises FileNotFoundError where there is no file, and ValueError where it is damaged or another
    kind of file, or where it does not fit: other hyperparameters, another kind of optimizer or
    scheduler, other names, shapes or dtypes in a model. Nothing is restored then.
    """
    path = Path(path)
    data = path.read_bytes()
    content, digest = data[:-32], data[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(
            f"'{path}' is damaged, or not a checkpoint that save_checkpoint wrote: go back to an "
            "earlier one, or move it away and start anew"
        )
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        keys = set(checkpoint)
    except Exception as error:
        raise ValueError(
            f"'{path}' was not read: it holds more than tensors, numbers, strings, lists and "
            f"dictionaries, or comes from another version of PyTorch ({error!r:.200})"
        ) from error
    if keys != CHECKPOINT_KEYS:
        raise ValueError(
            f"'{path}' comes from another version of save_checkpoint: only one of the two knows "
            f"{', '.join(sorted(map(str, keys ^ CHECKPOINT_KEYS)))}"
        )

    different = []
    if hyperparameters is not None:
        here = _plain(hyperparameters, "hyperparameters")
        different += _differences(checkpoint["hyperparameters"], here)
    parts = dict(zip(PARTS, (model, optimizer, scheduler, average), strict=True))
    for name, part in parts.items():
        if part is not None or optimizer is not None:
            there = _describe(name, checkpoint[name], checkpoint["kinds"][name])
            state = None if part is None else part.state_dict()
            different += _differences(there, _describe(name, state, type(part).__name__))
    if different:
        more = f", and {len(different) - 8} more" if len(different) > 8 else ""
        raise ValueError(
            f"'{path}' is another run's: {', '.join(different[:8])}{more}; set that back, or move "
            "the file away to start anew"
        )
    given = {name: part for name, part in parts.items() if part is not None}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in given.items()}
    try:
        for name, part in given.items():
            state = part.state_dict()  # a module's has its version beside the tensors
            state.update(copy.deepcopy(checkpoint[name]))  # optimizers keep what they get
            part.load_state_dict(state)
    except Exception as error:
        for name, part in given.items():
            part.load_state_dict(before[name])
        raise ValueError(f"'{path}' does not fit the {name} given: {error}") from error
    curves = train_losses, train_acc, test_losses, test_acc
    for name, values in zip(CURVES, curves, strict=True):
        if values is not None:
            values[:] = checkpoint[name]
    if optimizer is not None:
        random.setstate(checkpoint["random"]["python"])
        np.random.set_state(checkpoint["random"]["numpy"])
        torch.set_rng_state(checkpoint["random"]["torch"])
        if torch.cuda.is_available() and checkpoint["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"])
    return checkpoint


def _describe(name, state, kind):
    """Return what the state of a model, optimizer or scheduler has to fit, by name."""
    if state is None:
        return {}
    if name == "optimizer":
        groups = [len(group["params"]) for group in state["param_groups"]]
        return {"the optimizer": kind, "the optimizer's number of parameters": groups}
    if name == "scheduler":
        return {"the scheduler": kind, "the scheduler's total_steps": state.get("total_steps")}
    return {
        f"{name}.{key}": f"{tuple(value.shape)} {value.dtype}"
        if isinstance(value, torch.Tensor)
        else "no tensor"
        for key, value in state.items()
    }


def _differences(there, here):
    return [
        f"{key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here"
        for key in there | here
        if key not in there or key not in here or repr(there[key]) != repr(here[key])
    ]


def _plain(value, where):
    """Copy a state to the CPU as what `torch.load` reads without running code."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        if not all(isinstance(key, (str, int)) for key in value):
            raise TypeError(f"the keys of {where} must be strings or integers: {list(value)}")
        return {
            str(key) if isinstance(key, str) else int(key): _plain(each, f"{where}.{key}")
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_plain(each, where) for each in value)
    if value is None:
        return None
    for kind, plain in ((str, str), ((bool, np.bool_), bool), (Integral, int), (Real, float)):
        if isinstance(value, kind):  # or what is derived from it, such as NumPy's
            return plain(value)
    raise TypeError(
        "a checkpoint holds tensors, numbers, strings, lists and dictionaries, but "
        f"{where} is of type {type(value).__name__}"
    )
