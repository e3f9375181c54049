"""Train, test, data, plot and checkpoint helpers for small image classifiers.

Example:

    train_data, test_data = load_data("MNIST")
    train_loader = BatchLoader(train_data, 128, shuffle=True, augment=RandomAffine(10))
    test_loader = BatchLoader(test_data, 1000)
    loss, accuracy = train(model, "cpu", train_loader, optimizer, F.nll_loss)
    loss, accuracy = test(model, "cpu", test_loader, F.nll_loss)
"""

import base64
import contextlib
import copy
import hashlib
import io
import math
import operator
import os
import random
import re
import sys
import time
import warnings
import weakref
import zipfile
from pathlib import Path
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
from tqdm import tqdm

__all__ = [
    "BatchLoader", "Digits", "Metrics", "RandomAffine", "RunningMetrics", "Stopped",
    "back_up_checkpoint", "data_parallel", "drawing_pad", "end_distributed",
    "get_correct_pred_count", "get_device", "init_distributed", "load_checkpoint", "load_data",
    "plot_confusion_matrix", "plot_misclassified", "plot_prediction", "plot_sample_data",
    "plot_train_metrics", "predict", "predict_image", "print_epoch", "progress_bar", "resume",
    "save_checkpoint", "set_seed", "test", "train",
]  # fmt: skip

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, scaled to 0…1; used for every dataset
PARALLEL_MODELS = weakref.WeakSet()  # what data_parallel has returned
EMPTY = "the loader is empty: expected at least one batch of (images, labels)"
DIGESTS = {  # of the decoded images and labels: the training split's, the test split's
    "MNIST": ("d18cfd466eb143ac1097fde604dba9ee", "a0863a96c44e5666edbb30c4071ee79c"),
    "FashionMNIST": ("1f243a60b4b748a44c48b9a6f6907be2", "9a494dc49efeb996f4076c469b31cd05"),
}
datasets.MNIST.mirrors = [  # instead of LeCun's, which answers with errors
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
]


# --- set-up


def get_device():
    """Return the `torch.device` of this machine's GPU (CUDA, MPS, XPU, …), or else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
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

    loss: float  # mean over the samples seen; with class weights, over the batches' means
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
    progress=None,
    cuda_graph=False,
):
    """Train `model` for one epoch and return its `Metrics(loss, accuracy)`.

    `criterion(output, target)` must return the mean over the batch. If it returns the sum, it needs
    an attribute `reduction` with the value "sum", as PyTorch's losses have it; for a function or
    `partial`, set `criterion.reduction = "sum"`. Otherwise, the loss reported is too large.

    Loss and accuracy of a batch are those before its optimizer step. They are averaged over all
    samples and, if there are several processes, over these; all of them must call this.

    model: its output has the shape (N, classes); it is on `device`.
    train_loader: any iterable of batches (data, target): normalised float images and N integer
        labels, 0 to classes - 1.
    train_losses, train_acc: lists to which the loss and the accuracy (percent) are appended.
    scheduler: a learning rate scheduler that is stepped after each batch.
    progress: None shows a progress bar during the pass in a terminal or a notebook, but not in a
        log file or under papermill; True shows one and leaves it there; False shows none.
    cuda_graph: on CUDA, run the first batch of a shape as usual, record the second, and replay the
        recorded forward and backward pass for the others: then the GPU does not wait for Python.
        The model and the criterion must run the same operations for every batch and must not wait
        for the device (no `.item()`, no `if` on a tensor). Ignored if there are several processes.

    Raises TypeError if train_losses or train_acc is no list, ValueError for an empty loader, uint8
    images, one-hot or float labels or an output of another shape, and FloatingPointError if the
    loss is not finite.
    """
    model.train()
    metrics = RunningMetrics(criterion, train_losses, train_acc, optimizer)
    is_cuda = torch.device(device).type == "cuda"  # elsewhere a copy not waited for may be wrong

    def forward_and_backward(data, target):
        optimizer.zero_grad()
        output = model(data)
        loss = criterion(output, target)
        loss.backward()
        return loss.detach(), output.detach()

    if cuda_graph and is_cuda and _world_size() == 1:
        forward_and_backward = _Recorded(forward_and_backward)
    for data, target in progress_bar(train_loader, "train", metrics, progress):
        data = data.to(device, non_blocking=is_cuda)
        target = target.to(device, non_blocking=is_cuda)
        loss, output = forward_and_backward(data, target)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        metrics.update(loss, output, target)
    return metrics.finish()


class _Recorded:
    """A function of tensors, recorded as a CUDA graph: one launch for all its operations."""

    def __init__(self, function):
        self.function, self.shape, self.graph = function, None, None

    def __call__(self, *inputs):
        if inputs[0].shape != self.shape:  # or the first call, in which CUDA's libraries get ready
            self.shape, self.graph = inputs[0].shape, None
            return self.function(*inputs)
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream(inputs[0].device)  # which may not be the current device
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.outputs


@torch.no_grad()
def test(model, device, test_loader, criterion, test_losses=None, test_acc=None, *, progress=None):
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
def predict(model, device, loader, temperature=1.0):
    """Return `(predictions, probabilities, targets)` for all samples of a loader, in its order.

    They are on the CPU: classes (N,), probabilities (N, classes) whose rows sum to 1, and labels
    (N,). The model gives logits or log-probabilities; it is left in evaluation mode.

    temperature: a positive number by which the logits are divided (Guo et al. 2017,
        https://arxiv.org/abs/1706.04599). Below 1, the probabilities are more extreme; the
        predictions stay the same.

    Raises ValueError for an empty loader, FloatingPointError if an output is nan, and RuntimeError
    if several processes are running, because each would see only its share.
    """
    if _world_size() > 1:
        raise RuntimeError("predict is for one process: call it after end_distributed()")
    model.eval()
    outputs, targets = [], []
    for data, target in loader:
        outputs.append((model(data.to(device)) / temperature).softmax(dim=1).cpu())
        targets.append(target.cpu())
    if not outputs:
        raise ValueError(EMPTY)
    probabilities = torch.cat(outputs)
    if probabilities.isnan().any():
        raise FloatingPointError("the model's output is nan: its weights are probably nan, too")
    return probabilities.argmax(dim=1), probabilities, torch.cat(targets)


def get_correct_pred_count(pred, target):
    """Return how many of the N rows of `pred` (N, classes) have their maximum at `target` (N,)."""
    return int((pred.argmax(dim=1) == target).sum())


class Stopped(KeyboardInterrupt):
    """A stop by the user, which a notebook shows as one sentence and not as a traceback."""

    def _render_traceback_(self):  # IPython calls this
        return [str(self)]


class RunningMetrics:
    """Loss and accuracy of a pass: `update` after each batch, `compute` whenever they are wanted.

    criterion: as for `train`.
    losses, accuracies: lists to which `finish` appends, or None.
    optimizer: its learning rate is named if the loss is not finite.
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
        # not every other accelerator has float64
        precise = torch.float64 if loss.device.type in ("cpu", "cuda") else torch.float32
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


def progress_bar(loader, description, metrics, show=None):
    """Yield the loader's batches and show the metrics so far, every 50 batches and at the end.

    It is a line of text on stdout, in notebooks too: a bar that is a widget leaves an error in its
    place when the notebook is opened again. `show` is as `progress` for `train`.
    """

    def show_metrics():
        loss, accuracy = metrics.compute()  # here the host waits for the device
        bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f} %")

    losses = metrics.lists[0]
    epoch = "" if losses is None else f"Epoch {len(losses) + 1} "
    total = operator.length_hint(loader) or None
    form = "{desc} {percentage:3.0f}%|{bar:10}| {elapsed}<{remaining}, {rate_fmt}{postfix}"
    with tqdm(
        total=total,
        desc=epoch + description,
        unit="batch",
        file=sys.stdout,
        leave=show is True,
        disable=_rank() > 0 or not (_is_watched() if show is None else show),
        bar_format=form if total else None,
    ) as bar:
        for step, (data, target) in enumerate(loader, start=1):
            if data.dtype == torch.uint8:
                raise ValueError("expected normalised float images, got uint8 (0 to 255)")
            yield data, target
            bar.update()
            if step % 50 == 0:
                show_metrics()
        if metrics.count > 0:
            show_metrics()


def _shell():
    ipython = sys.modules.get("IPython")
    return ipython and ipython.get_ipython()


def _is_watched():
    """Tell whether output is live: in a terminal, or a notebook that can ask someone for input."""
    kernel = getattr(_shell(), "kernel", None)
    return sys.stdout.isatty() if kernel is None else getattr(kernel, "_allow_stdin", True)


def print_epoch(epoch, epochs, train_metrics, test_metrics, seconds):
    """Print a line about an epoch: its `Metrics` in training and test, and the training time."""
    print(
        f"Epoch {epoch:{len(str(epochs))}}/{epochs}"
        f"  train loss {train_metrics.loss:.4f} accuracy {train_metrics.accuracy:6.2f} %"
        f"  test loss {test_metrics.loss:.4f} accuracy {test_metrics.accuracy:6.2f} %"
        f"  {seconds:6.1f} s"
    )


# --- several processes, which torchrun starts


def init_distributed():
    """Join the processes that `torchrun` started, if any, and return this one's `torch.device`.

    A single process gets `get_device()`. Of several, each gets a CUDA GPU of its own (NCCL) or, if
    there is no CUDA, the CPU (Gloo); from then on, only the first one prints.

    Raises ValueError if a machine has fewer GPUs than processes.
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
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    if _rank() > 0:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    where = "a GPU" if device.type == "cuda" else "the CPU"
    print(f"{_world_size()} processes, each on {where}")
    return device


def data_parallel(model):
    """Return `model` in `DistributedDataParallel`, or `model` itself if there is one process.

    Each process trains on its share of a batch, and the gradients are averaged. Batch norm
    normalises each share by itself; the running statistics of the first process are kept.
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
            mirrors = resources[0][:1] if name == "QMNIST" else dataset.mirrors
            raise FileNotFoundError(
                f"{name} is not in '{root}' and could not be downloaded ({' or '.join(mirrors)}). "
                f"Put {', '.join(missing)} into '{folder / 'raw'}', or name another folder in the "
                "environment variable DATA_DIR, or use load_data('digits'), which needs no "
                f"network. Error: {error}"
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
    and can be set, for example to resume a run; looking at a batch changes nothing.

    If there are several processes, each gets its share of every batch; `batch_size` is that of all
    together. In training, all shares are of equal size, so up to `world_size - 1` samples are left
    out of a pass; under `torch.no_grad()`, as in `test`, none is.

    dataset: has `.data`, uint8 of shape (N, 28, 28), and `.targets`, N integers, and no transform;
        or is a `Subset` of such a dataset.
    augment: a `RandomAffine`.

    Raises ValueError for other images or labels, for a dataset with a transform, which would not be
    applied, and in training if the batch size is not a multiple of the number of processes.
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
    if getattr(dataset, "transform", None) or getattr(dataset, "target_transform", None):
        raise ValueError(
            "BatchLoader does not apply the dataset's transform: leave it out (BatchLoader scales "
            "and normalises by itself), or use torch.utils.data.DataLoader"
        )
    targets = torch.as_tensor(dataset.targets)
    if isinstance(dataset, datasets.QMNIST):
        targets = targets[:, 0]  # the class; the other columns tell who wrote it, and where
    return torch.as_tensor(dataset.data), targets


class RandomAffine:
    """Rotate, shift, scale and shear each image of a batch by random parameters of its own.

    Like `torchvision.transforms.v2.RandomAffine`, which draws one set of parameters for a whole
    batch; degrees and shear are single numbers here. Interpolation is bilinear, shifts are not
    rounded to whole pixels, and what comes from outside the image is 0.

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
FIT_BORDER = 0.8  # of the way from the middle to the border: beyond it, all is paper at first
FIT_STEP, FIT_ROUNDS = 3, 6  # pixels and repetitions, enough for the six numbers of a surface
OUTLIER = 3.7  # median deviations, 2.5 standard deviations of a normal: what is farther is no paper
LEAST_DEVIATION = 0.01  # on the same scale, for paper that is perfectly even
QUANTILES, SIGMAS = (5, 30), 1.12  # derived: a normal's percentiles and how far apart they are
SURE_INK = 0.6  # share of the pen's full strength; each part of the digit gets there somewhere
FAINT_INK = 0.4, 0.2  # the share that is enough beside sure ink; the second joins broken strokes
LINE_RATIO = 0.15  # of width to length; what is thinner may be a ruled line or a table's edge
BORDER_FACTOR = 0.4  # on a part's weight for each border that it touches, as shadows do
FRAME_CONTENT = 0.3  # share of a part's extent: around a part larger than this it is a frame
RIVAL = 0.6  # share of the digit's weight, above which another part is a second digit
APART = 0.3  # share of the digit's extent: a rival at a smaller distance, above or below, is a part
NEAR = 0.2  # share of the digit's extent: smaller strokes that belong to it are nearer than this
SPECK = 0.12  # share of the digit's extent: smaller parts are dirt
DIGIT_SIDE, IMAGE_SIDE = 20, 28  # pixels, derived: MNIST's longer side of a digit and of an image
PEN = 3.0  # pixels; thinner strokes are broadened to it: MNIST's are 1.6 to 3.4 pixels thick


def predict_image(model, image, temperature=1.0):
    """Recognise one handwritten digit in a photo or scan: `(digit, probabilities, prepared)`.

    probabilities: float tensor (classes,) on the CPU that sums to 1; if its maximum is low, the
        model is not sure. prepared: what the model saw, a uint8 array (28, 28), light on dark.

    model: takes images (1, 1, 28, 28) and gives logits or log-probabilities (1, classes). It is
        left in evaluation mode.
    image: a path or a PIL image; dark on light or light on dark, in any light. The digit may be
        anywhere and of any size, with some paper around it; specks, ruled lines paler than the
        pen, a frame, and parts of other digits at the border do not matter.
    temperature: as for `predict`.

    The digit is prepared as MNIST's were: its box is scaled to 20×20 pixels, and its centre of mass
    is put into the middle of 28×28 (http://yann.lecun.com/exdb/mnist). Thin strokes are broadened
    to the thickness of MNIST's.

    Raises ValueError if the image is smaller than 8×8 pixels, its file is damaged, or it contains
    no ink or several digits, TypeError if it is neither a path nor a PIL image, FloatingPointError
    if the model's output is nan, and Pillow's errors if there is no such file, it is no image or
    it has more pixels than Pillow accepts, about 179 million.
    """
    prepared = _mnist_form(_find_digit(_upright_grey(image)))
    like = next(model.parameters(), torch.empty(0))  # of the model's dtype, on its device
    data = (torch.from_numpy(prepared).to(like) / 255 - MEAN) / STD
    batch = data[None, None], torch.zeros(1)  # (1, 1, 28, 28), and a label that is not used
    (digit,), (probabilities,), _ = predict(model, like.device, [batch], temperature)
    return int(digit), probabilities, prepared


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
    small = _resize(grey, [max(1, round(side * scale)) for side in grey.shape])
    ink = _ink(small if scale < 1 else ndimage.median_filter(small, 3))  # means have less noise
    for faint in FAINT_INK:
        digit, has_rival = _choose(filters.apply_hysteresis_threshold(ink, faint, SURE_INK))
        if not has_rival:
            return digit, scale
    raise ValueError("found several digits in the image: expected one; cut the image to it")


def _ink(grey):
    """Return how strong the ink is in each pixel of `grey` (H, W): paper about 0, pen about 1."""
    grey = _even_light(grey)
    # What is left of shades is local: ink is what a closing fills, which is as broad as its size.
    size = round(BROADEST_INK * min(grey.shape)) | 1  # odd, so that it has a middle
    paper = ndimage.grey_closing(ndimage.gaussian_filter(grey, 1), size)  # as if without ink
    ink = ndimage.gaussian_filter(paper, size / 4) - grey
    low, middle, full = np.percentile(ink, (*QUANTILES, FULL_INK))
    noise = (middle - low) / SIGMAS  # of the palest pixels, which are paper for sure
    if full < max(LEAST_INK, LEAST_SIGNAL * noise):
        raise ValueError(
            "found no ink in the image: expected a digit that is clearly darker, or clearly "
            "lighter, than the paper around it"
        )
    return ink / full


def _even_light(grey):
    """Subtract the light on the paper from `grey` (H, W): paper about 0, ink below."""
    y, x = np.mgrid[-1 : 1 : grey.shape[0] * 1j, -1 : 1 : grey.shape[1] * 1j]
    terms = np.stack([x**0, x, y, x * x, x * y, y * y], axis=-1)  # of a quadratic surface
    values = grey[::FIT_STEP, ::FIT_STEP].ravel()
    few = terms[::FIT_STEP, ::FIT_STEP].reshape(-1, 6)
    is_paper = abs(few[:, 1:3]).max(axis=1) > FIT_BORDER
    for _ in range(FIT_ROUNDS):  # each without what is far from the surface before: the ink
        weights = np.linalg.lstsq(few[is_paper], values[is_paper], rcond=None)[0]
        off = values - few @ weights
        is_paper = abs(off) <= max(OUTLIER * np.median(abs(off[is_paper])), LEAST_DEVIATION)
    even = grey - terms @ weights
    return -even if (off**3).sum() > 0 else even  # the ink, far from the surface, is light


def _choose(mask):
    """Return `(digit, has_rival)`: the digit in a mask (H, W) as 0 and 1, whether there is another.

    The digit is the part of the mask with the greatest weight, and what lies near it.
    """
    labels = measure.label(mask)
    parts = measure.regionprops(labels)
    weights = {part.label: _weight(part, mask.shape) for part in parts}
    parts.sort(key=lambda part: weights[part.label], reverse=True)
    main, *others = [part for part in parts if _frames(parts[0], part)] or parts
    extent, kept, has_rival = max(main.image.shape), [main.label], False
    for part in others:
        if _borders(part, mask.shape) > 0:
            continue
        (top, left), (bottom, right) = _corners(main) - _corners(part)[::-1]
        down, across = max(top, -bottom), max(left, -right)  # between the boxes; below 0: overlap
        gap = math.hypot(max(down, 0), max(across, 0)) / extent
        is_rival = weights[part.label] > RIVAL * weights[main.label]
        if is_rival and (across >= 0 or gap > APART):
            has_rival = True
        elif gap < NEAR and max(part.image.shape) > SPECK * extent:
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
#
# Like pyplot's own functions, these draw a new figure and leave it open: a notebook shows it when
# its cell has run, plt.savefig() saves it, and in a script plt.show() opens a window.


def plot_train_metrics(
    train_losses, train_acc, test_losses, test_acc, *, loss_floor=None, title=None
):
    """Plot loss and error (100 % - accuracy) by epoch on logarithmic axes, train against test.

    train_acc, test_acc: accuracies in percent.
    loss_floor: the smallest possible loss, drawn as a dashed line; above 0 with label smoothing.

    Raises ValueError where the four lists differ in length or are empty.
    """
    lengths = [len(values) for values in (train_losses, train_acc, test_losses, test_acc)]
    if len(set(lengths)) > 1 or 0 in lengths:
        raise ValueError(f"expected four lists with an entry per epoch, got lengths {lengths}")
    epochs = range(1, lengths[0] + 1)
    train_errors, test_errors = 100 - np.array(train_acc), 100 - np.array(test_acc)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, curves, name, final in (
        (left, (train_losses, test_losses), "loss", "{} {:.4f}"),
        (right, (train_errors, test_errors), "error (%)", "{} {:.2f} %"),
    ):
        for label, values in zip(("train", "test"), curves, strict=True):
            axes.plot(epochs, values, marker=".", label=final.format(label, values[-1]))
        if axes is left and loss_floor is not None:
            axes.axhline(loss_floor, ls="--", color="gray", label=f"floor {loss_floor:.4f}")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if np.max(curves) > 0:
            axes.set_yscale("log")
            low, high = axes.get_ylim()  # within a decade, 1, 2 and 5 may be too few ticks
            narrow = high < 10 * low
            axes.yaxis.set_major_locator(AutoLocator() if narrow else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")  # 0.05, not 5×10⁻²
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(title=f"after epoch {lengths[0]}")
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

    Above each image: its label → the prediction, and the probability of the latter.

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
        f"{label} → {guess}, {100 * confidence:.0f} %"
        for label, guess, confidence in zip(labels, guesses, confidences[wrong], strict=True)
    ]
    _plot_images(images[wrong], titles, title)


def plot_confusion_matrix(predictions, targets, classes, *, title=None):
    """Plot how often each class was predicted for each true class.

    Only the errors are coloured: the many correct predictions on the diagonal would swamp them.

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
    names = [_short(name) for name in classes]
    display = ConfusionMatrixDisplay(errors, display_labels=names)
    display.plot(ax=axes, cmap="Reds", colorbar=False)
    _name_x_axis(axes, names)
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
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    left.imshow(grey, cmap="gray", vmin=0, vmax=1)
    left.set(xlabel="the image, in grey", xticks=[], yticks=[])
    middle.imshow(prepared, cmap="gray", vmin=0, vmax=255)
    middle.set(xlabel="what the model sees", xticks=[], yticks=[])
    names = [_short(str(name)) for name in classes or range(len(percent))]
    bars = right.bar(range(len(percent)), percent)
    right.bar_label(bars, fmt=lambda value: f"{value:.0f} %" if value >= 5 else "")
    right.set(xlabel="class", ylabel="probability (%)", ylim=(0, 110))
    _name_x_axis(right, names)
    fig.suptitle(title)


def _class_names(loader, labels):
    """Return the names of labels (N,), or the labels where the loader's dataset has no names.

    A name that begins with the digit that it stands for, "7 - seven", is cut to the digit.
    """
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = dict(enumerate(map(_short, getattr(dataset, "classes", ()))))
    return [names.get(label, label) for label in labels.tolist()]


def _short(name):
    return re.sub(r"^(\d) - .*", r"\1", name)


def _name_x_axis(axes, names):
    slanted = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 3 else {}
    axes.set_xticks(range(len(names)), names, **slanted)  # long names would overlap


def _plot_images(images, titles, title):
    """Plot up to 24 images (N, 1, H, W) in a grid, on a common grey scale."""
    if images.dim() != 4 or images.shape[1] != 1:
        raise ValueError(f"expected images of shape (N, 1, H, W), got {tuple(images.shape)}")
    images = images[:24, 0].cpu().numpy()
    fig, grid = plt.subplots(3, 8, figsize=(11, 4.6), layout="constrained")
    for axes, image, name in zip(grid.flat, images, titles, strict=False):
        axes.imshow(image, cmap="gray", vmin=images.min(), vmax=images.max())
        axes.set_title(name, fontsize=10 if len(str(name)) < 16 else 7)
    for axes in grid.flat:
        axes.axis("off")
    if len(images) == 0:
        fig.text(0.5, 0.5, "none", ha="center")
    fig.suptitle(title)


# --- checkpoints


def save_checkpoint(path, epoch, hyperparameters, **state):
    """Write what a run needs in order to go on after `epoch` as if it had never stopped.

    That is `state` and PyTorch's random state, but neither Python's nor NumPy's. The file is
    written beside `path`, flushed to disk and moved over it: whenever the machine stops, `path` is
    the old checkpoint or the new one, whole. Of several processes, the first one writes.

    epoch: number of completed epochs.
    hyperparameters: a dictionary, by which `resume` tells this run from another.
    state: by name, the model, the optimizer and whatever else has a `state_dict()`, and lists.

    Raises ValueError for anything other than tensors, numbers, strings, lists, tuples and
    dictionaries, and OSError if the file cannot be written. The previous checkpoint is then
    untouched.
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
    except ValueError as error:
        raise ValueError(
            f"'{path}' was not saved: a checkpoint may contain tensors, Python's own numbers (of "
            "another, take float(x)), strings, lists, tuples and dictionaries"
        ) from error.__cause__
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

    Raises FileNotFoundError if there is no file, and ValueError if it is damaged or not a
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
            f"'{path}' is damaged, or not a checkpoint. Go back to an earlier one, or start a new "
            "run with RESUME = False, which keeps this file as .damaged"
        ) from error
    return checkpoint


def resume(path, hyperparameters, **state):
    """Restore a run from its checkpoint and return the epoch to go on with, 1 for a new run.

    If there is no checkpoint, the run is new, and its state is saved as that after epoch 0: so even
    a run that is stopped in its first epoch can go on. If there are several processes, all must
    call this, and all get what the first one reads.

    path, hyperparameters, state: as for `save_checkpoint`; lists are filled in place.

    Raises ValueError if the checkpoint is damaged, or belongs to a run with other hyperparameters
    or with a part of another type, such as another optimizer. Nothing is changed then.
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
            f"'{path}' belongs to a run with other parameters: {', '.join(changes)}. Set them back "
            "to continue that run. Or start a new one: set RESUME = False and run all cells from "
            "Parameters on. It can start from the old one's weights: "
            f"model.load_state_dict(load_checkpoint('{path}.bak')['model'])"
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
        print(f"Restored epoch {checkpoint['epoch']} from {path}")
    return checkpoint["epoch"] + 1


def back_up_checkpoint(path):
    """Make room for a new run: rename the checkpoint of an earlier one to `path`.bak.

    An untrained checkpoint (epoch 0) is deleted and a damaged one renamed to `path`.damaged, so
    that neither replaces a trained backup.
    """
    path = Path(path)
    if _rank() > 0 or not path.exists():
        return
    try:
        if load_checkpoint(path)["epoch"] == 0:
            path.unlink()
            return
        backup = f"{path}.bak"
    except ValueError:
        backup = f"{path}.damaged"
    path.replace(backup)
    print(f"The previous run's checkpoint is now {backup}")


def _types(state):
    return {name: type(part).__name__ for name, part in state.items()}


# --- drawing pad

SMALLEST_DRAWING = 16  # of the pad's 320 pixels; a dot of the pen has 7
# Below this probability an answer is marked as not sure. With the notebook's temperature, that is
# so for 2.2 % of 5,000 held-out digits of MNIST, 5 % of 400 digits that tests/handwriting.py draws,
# and 71 % of 410 letters and other shapes drawn the same way.
SURE = 0.99
PAD_SCRIPT = """
function render({ model, el }) {
  const rows = model.get("classes").map((name) =>
    `<tr><td>${name}<td><meter max="100" style="width: 70px"></meter><td style="width: 4em">`);
  el.innerHTML = `
    <div style="display: flex; flex-wrap: wrap; gap: 10px; max-width: 540px">
      <output style="flex: 1 0 100%; min-height: 3em; font-size: 120%"></output>
      <div>
        <canvas width="320" height="320" style="border: 1px solid; touch-action: none"></canvas>
        <br><button>Clear</button> <input type="file" accept="image/*" style="width: 240px">
      </div>
      <div>
        <img width="112" height="112" style="background: black; image-rendering: pixelated">
        <div>what the model sees</div>
        <table>${rows.join("")}</table>
      </div>
    </div>`;
  const [output, canvas, button, file, image] =
    el.querySelectorAll("output, canvas, button, input, img");
  const pen = canvas.getContext("2d");
  pen.lineWidth = 7;  // thin enough for a digit drawn small in a corner
  pen.lineCap = pen.lineJoin = "round";
  let timer;

  const clear = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, 320, 320); };
  const paste = (picture) => {
    const scale = 320 / Math.max(picture.width, picture.height);
    pen.drawImage(picture, 0, 0, scale * picture.width, scale * picture.height);
  };
  const send = (url) => {  // with a number, so that no other drawing's answer is shown
    model.set("drawing", { url, number: Date.now() });
    model.save_changes();
    show();
  };
  const show = () => {
    const { url, number } = model.get("drawing");
    let answer = model.get("answer");
    clearTimeout(timer);
    if (!url) {
      answer = { text: "Draw a digit, or choose a photo of one." };
    } else if (answer.number !== number) {
      answer = { text: "…" };
      timer = setTimeout(() => {
        output.textContent = "No answer: the kernel is busy, or it was restarted. Wait until the "
          + "running cell has ended, or run all cells up to this one again.";
      }, 2000);
    }
    output.textContent = answer.text;
    image.src = answer.prepared || "data:,";
    image.style.visibility = answer.prepared ? "visible" : "hidden";
    el.querySelectorAll("tr").forEach((row, label) => {
      const percent = answer.percent?.[label] ?? 0;
      row.querySelector("meter").value = percent;
      row.lastChild.textContent = answer.percent ? `${percent} %` : "";
    });
  };
  const draw = (event) => {
    pen.lineTo(event.offsetX, event.offsetY);
    pen.stroke();
  };
  let active;  // the pointer that draws: not a second finger, nor one that comes from outside
  canvas.onpointerdown = (event) => {
    if (event.button || active !== undefined) return;
    active = event.pointerId;
    canvas.setPointerCapture(event.pointerId);  // a stroke may leave the canvas and come back
    pen.beginPath();
    pen.moveTo(event.offsetX, event.offsetY);
    draw(event);  // a click leaves a dot
  };
  canvas.onmousedown = (event) => event.preventDefault();  // no dragging of selected text
  canvas.onpointermove = (event) => { if (event.pointerId === active) draw(event); };
  canvas.onlostpointercapture = (event) => {
    if (event.pointerId !== active) return;
    active = undefined;
    send(canvas.toDataURL());
  };
  button.onclick = () => { clear(); send(""); };
  file.onchange = async () => {
    try {
      const photo = await createImageBitmap(file.files[0]);
      const scale = Math.min(1, 1000 / Math.max(photo.width, photo.height));
      const small = document.createElement("canvas");
      [small.width, small.height] = [scale * photo.width, scale * photo.height];
      small.getContext("2d").drawImage(photo, 0, 0, small.width, small.height);
      clear();
      paste(small);
      send(small.toDataURL());
    } catch {
      output.textContent = "This file is no image, or of a kind that the browser cannot read.";
    }
    file.value = "";  // the same photo may be chosen again
  };
  model.on("change:answer", show);
  clear();
  const earlier = new Image();  // what was drawn before the page was loaded again
  earlier.onload = () => paste(earlier);
  earlier.src = model.get("drawing").url || "data:,";
  show();
}

// In JupyterLab, the pad replaces a sentence that is already on the page.
function initialize({ model }) {
  const timer = setInterval(() => {
    for (const place of document.querySelectorAll(`[id="${model.get("place")}"]`))
      if (!place.querySelector("canvas")) render({ model, el: place });
  }, 300);
  return () => clearInterval(timer);
}
export default { initialize, render };
"""


def drawing_pad(model, classes, temperature=1.0):
    """Return a Jupyter widget to draw a digit in, with the mouse or a finger, or to upload a photo.

    After each stroke it shows the answer of `predict_image`, the probabilities and the 28×28 image
    that the model saw. Below 99 %, the answer is marked as not sure. A notebook that is not running
    shows a sentence in its place.

    model: as for `predict_image`. The pad takes a copy: Jupyter may answer while a cell trains it.
    classes: names of the classes.
    temperature: as for `predict`; for a network trained with label smoothing of 0.1, 0.49.
    """
    import anywidget  # only the pad needs these two
    import traitlets

    model = copy.deepcopy(model)

    class DrawingPad(anywidget.AnyWidget):
        _esm = PAD_SCRIPT
        classes = traitlets.List().tag(sync=True)
        place = traitlets.Unicode().tag(sync=True)  # id of the element that the pad replaces
        drawing = traitlets.Dict({"url": "", "number": 0}).tag(sync=True)  # url: a PNG as data
        answer = traitlets.Dict().tag(sync=True)  # with the number of the drawing

        @traitlets.observe("drawing")
        def _read_drawing(self, change):
            if self.drawing["url"]:
                image = Image.open(io.BytesIO(base64.b64decode(self.drawing["url"].split(",")[1])))
                try:
                    answer = _answer(model, classes, temperature, image)
                except Exception as error:  # which Jupyter would hide
                    answer = {"text": f"{type(error).__name__}: {error}"}
                self.answer = {"number": self.drawing["number"], **answer}

        _ipython_display_ = None  # of ipywidgets 7, which Colab has: it would have precedence

        def _repr_mimebundle_(self, **options):
            sentence = "Drawing pad: run all cells in Jupyter or Colab to draw a digit here."
            data, metadata = {}, {}
            if _in_jupyterlab():  # which would save a view that cannot be opened again
                data = {"text/html": f'<div id="{self.place}">{sentence}</div>'}
            elif _is_watched():
                data, metadata = super()._repr_mimebundle_(**options)
            return data | {"text/plain": sentence}, metadata

    return DrawingPad(classes=list(classes), place=f"pad-{time.time_ns()}")


def _in_jupyterlab():
    """Tell whether a Jupyter server started the kernel, but not for Colab or VS Code."""
    names = getattr(_shell(), "user_ns", {})
    is_other = "google.colab" in sys.modules or "__vsc_ipynb_file__" in names
    return "JPY_SESSION_NAME" in os.environ and not is_other


def _answer(model, classes, temperature, image):
    """Return what the pad shows for a drawing or photo: text and, if it could be read, more."""
    left, top, right, bottom = ImageOps.invert(image.convert("L")).getbbox() or (0, 0, 0, 0)
    if max(right - left, bottom - top) < SMALLEST_DRAWING:
        return {"text": "This is only a dot: draw a digit."}
    try:
        digit, probabilities, prepared = predict_image(model, image, temperature)
    except ValueError:
        return {"text": "Found no single digit: draw one in thin strokes, or take a closer photo."}
    text = f"{classes[digit]} ({100 * probabilities[digit]:.0f} %)"
    if probabilities[digit] < SURE:
        text = f"Not sure: perhaps {classes[digit]}, perhaps no digit."
    png = io.BytesIO()
    Image.fromarray(prepared).save(png, "PNG")
    return {
        "text": text,
        "percent": [round(100 * probability) for probability in probabilities.tolist()],
        "prepared": f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}",
    }
