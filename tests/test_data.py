import http.client
import os
import random
import re
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import damage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, ToTensor
from torchvision.transforms.v2.functional import affine

import utils
from utils import BatchLoader, RandomAffine


def write_idx(path, array):
    """Write a NumPy array in the idx format of MNIST's files."""
    code = {"uint8": 8, "int32": 12}[str(array.dtype)]
    header = np.array([code * 256 + array.ndim, *array.shape], dtype=">i4")
    path.write_bytes(header.tobytes() + array.astype(array.dtype.newbyteorder(">")).tobytes())


def write_dataset(root, name, counts=(30, 20), classes=10):
    """Write random images in torchvision's layout, `counts` of them for training and for test."""
    folder, generator = root / name / "raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in zip(("train", "t10k"), counts, strict=True):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % classes).astype(np.uint8)
        if name == "QMNIST":
            split = {"train": "qmnist-train", "t10k": "qmnist-test"}[split]
            rows = np.stack([labels, *[labels + 10] * 7], axis=1).astype(np.int32)
            write_idx(folder / f"{split}-labels-idx2-int", rows)
        else:
            write_idx(folder / f"{split}-labels-idx1-ubyte", labels)
        write_idx(folder / f"{split}-images-idx3-ubyte", images)


@pytest.fixture
def offline(monkeypatch):
    """Let every download fail: by default as without a network, else by the error given."""

    def fail_with(error):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(urllib.request, "urlopen", fail)

    fail_with(URLError("no network"))
    return fail_with


# --- load_data


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST", "QMNIST"])
def test_torchvision_sets_are_read_from_disk(tmp_path, monkeypatch, offline, name):
    monkeypatch.setattr(utils, "DIGESTS", {})  # accept made-up files
    write_dataset(tmp_path, name)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for pair in (utils.load_data(name), utils.load_data(name, root=str(tmp_path))):
        for data, count in zip(pair, (30, 20), strict=True):
            assert type(data) is getattr(datasets, name) and data.name == name
            assert data.data.shape == (count, 28, 28) and data.data.dtype == torch.uint8
            assert len(data.classes) == 10
            _, labels = next(iter(BatchLoader(data, count)))
            assert torch.equal(labels, torch.arange(count) % 10)


@pytest.mark.parametrize("data_dir, folder", [("", "data"), ("~/there", "there")])
def test_auto_is_mnist_where_it_lies(tmp_path, monkeypatch, offline, data_dir, folder):
    monkeypatch.setattr(utils, "DIGESTS", {})  # accept made-up files
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_DIR", data_dir)
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / folder, "MNIST")
    assert [data.name for data in utils.load_data()] == ["MNIST", "MNIST"]


def test_auto_falls_back_to_digits_with_a_warning(tmp_path, offline):
    with pytest.warns(UserWarning, match="(?s)'digits' INSTEAD OF MNIST.*no network"):
        train_data, test_data = utils.load_data("auto", tmp_path)
    assert train_data.name == test_data.name == "digits"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'mnist'.*'MNIST'"):
        utils.load_data("mnist")


@pytest.mark.parametrize(
    "name, missing, hosts",
    [
        ("MNIST", "t10k", ["ossci-datasets.s3.amazonaws.com", "storage.googleapis.com"]),
        ("KMNIST", "t10k", ["codh.rois.ac.jp"]),
        ("QMNIST", "qmnist-test", ["raw.githubusercontent.com"]),
    ],
)
def test_a_failed_download_says_what_to_do(tmp_path, offline, name, missing, hosts):
    write_dataset(tmp_path, name)
    folder, file = tmp_path / name / "raw", f"{missing}-images-idx3-ubyte"
    (folder / file).unlink()
    for cause in (
        URLError("no network"),
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b""),
    ):
        offline(cause)
        with pytest.raises(FileNotFoundError) as error:
            utils.load_data(name, tmp_path)
        hint = f"Put {file} into '{folder}'"
        for part in (*hosts, hint, "DATA_DIR", "load_data('digits')", str(cause)):
            assert part in str(error.value)


def test_where_the_first_mirror_fails_the_second_is_tried(tmp_path, monkeypatch):
    write_dataset(tmp_path / "server", "MNIST")
    tried = []

    def download(url, download_root, **options):
        tried.append(url)
        if "ossci" in url:
            raise URLError("no answer")
        shutil.copy(tmp_path / "server" / "MNIST" / "raw" / Path(url).stem, download_root)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    monkeypatch.setattr(utils, "DIGESTS", {})
    assert len(utils.load_data("MNIST", tmp_path)[0]) > 0
    assert len(tried) == 8 and tried[1] == (
        "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz"
    )


def test_disk_errors_are_left_as_they_are(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        utils.load_data("auto", tmp_path / "file")


@pytest.mark.parametrize(
    "shape, classes, message",
    [
        ((30, 28, 28), 11, "labels from 0 to 10"),
        ((31, 28, 28), 10, "30 labels for images of shape (31, 28, 28)"),
        ((30, 14, 56), 10, "30 labels for images of shape (30, 14, 56)"),
    ],
)
def test_sets_without_a_digest_are_checked(tmp_path, offline, shape, classes, message):
    write_dataset(tmp_path, "KMNIST", classes=classes)
    images = np.zeros(shape, dtype=np.uint8)
    write_idx(tmp_path / "KMNIST" / "raw" / "train-images-idx3-ubyte", images)
    with pytest.raises(ValueError, match=f"damaged.*{re.escape(message)}.*delete"):
        utils.load_data("KMNIST", tmp_path)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_published_files_are_accepted(mnist_root, offline, name):
    if not (mnist_root / name).exists():
        pytest.skip(f"{name} is not there")
    train_data, test_data = utils.load_data(name, mnist_root)
    assert (len(train_data), len(test_data)) == (60_000, 10_000)
    if name == "MNIST":
        pixels = train_data.data / 255
        assert pixels.mean().item() == pytest.approx(utils.MEAN, abs=1e-4)
        assert pixels.std().item() == pytest.approx(utils.STD, abs=1e-4)


@pytest.fixture
def published(tmp_path, mnist_root):
    """MNIST's folder, the large file linked, the others copied, to be damaged."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for file in (mnist_root / "MNIST" / "raw").glob("*-ubyte"):
        if file.name.startswith("train-images"):
            (folder / file.name).symlink_to(file)
        else:
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.parametrize("file", ["t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_one_flipped_bit_is_noticed(published, tmp_path, offline, file):
    content = bytearray((published / file).read_bytes())
    content[len(content) // 2] ^= 1
    (published / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"'{published.parent}' are damaged.*not the published"):
        utils.load_data("auto", tmp_path)


def test_fuzzed_files_are_refused(published, tmp_path, mnist_root, offline):
    """Flip, cut out or insert bytes in MNIST's files: refused, or the same data all the same."""
    original = utils.load_data("MNIST", mnist_root)
    files = [file for file in sorted(published.iterdir()) if not file.is_symlink()]
    generator = random.Random(0)
    refused, count = 0, int(os.environ.get("FUZZ", 10))
    for _ in range(count):
        file = generator.choice(files)
        content = file.read_bytes()
        file.write_bytes(damage(content, generator))
        try:
            pair = utils.load_data("MNIST", tmp_path)
        except ValueError as error:
            assert re.search(f"'{published.parent}' are damaged.*delete that folder", str(error))
            refused += 1
        else:
            for data, expected in zip(pair, original, strict=True):
                assert torch.equal(data.data, expected.data)
                assert torch.equal(data.targets, expected.targets)
        file.write_bytes(content)
    print(f"{refused} of {count} refused")
    assert refused > 0 and len(utils.load_data("MNIST", tmp_path)[0]) == 60_000


def test_digits():
    train_data, test_data = utils.load_data("digits")
    assert (len(train_data), len(test_data)) == (1437, 360)
    assert len(torch.cat((train_data.data, test_data.data)).unique(dim=0)) == 1797  # none twice
    assert test_data.targets[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    for data in (train_data, test_data):
        assert data.data.dtype == torch.uint8 and data.data.shape[1:] == (28, 28)
        brightest = data.data.amax(dim=0)
        assert brightest.max() == 255 and brightest[4:24, 4:24].amax(dim=0).min() > 0
        brightest[4:24, 4:24] = 0
        assert brightest.max() == 0  # outside the box of 20×20
        shares = data.targets.bincount() / len(data)
        assert len(shares) == len(data.classes) == 10
        assert shares.min() > 0.09 and shares.max() < 0.11
    train_data.transform = ToTensor()
    images, labels = next(iter(DataLoader(train_data, 5)))
    assert images.shape == (5, 1, 28, 28) and labels.tolist() == train_data.targets[:5].tolist()


# --- BatchLoader


def numbered(count):
    """A dataset in which image i shows i as pixel values and bears i as its label."""
    number = torch.arange(count)
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    images[:, 0, 0], images[:, 0, 1] = number // 256, number % 256
    return SimpleNamespace(data=images, targets=number)


def numbers(images):
    """The numbers that a batch of `numbered` shows."""
    pixels = (images[:, 0, 0, :2] * utils.STD + utils.MEAN) * 255
    return (pixels.round() @ torch.tensor([256.0, 1.0])).long()


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 350),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=50, deadline=None)
def test_a_pass_yields_each_sample_once(count, batch_size, shuffle, seed):
    dataset = numbered(count)
    loader = BatchLoader(dataset, batch_size, shuffle=shuffle, seed=seed)
    batches = list(loader)
    assert loader.dataset is dataset and loader.epoch == 1 and len(loader) == len(batches)
    sizes = [len(labels) for _, labels in batches]
    assert set(sizes[:-1]) <= {batch_size} and 0 < sizes[-1] <= batch_size
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert images.dtype == torch.float32 and images.shape == (count, 1, 28, 28)
    assert labels.dtype == torch.int64
    assert torch.equal(numbers(images), labels)
    assert torch.equal(labels.sort().values, torch.arange(count))
    if count > 20 or not shuffle:  # a few may come in their order by chance
        assert torch.equal(labels, torch.arange(count)) == (not shuffle)


def augmented(seed=0):
    test_data = Subset(utils.load_data("digits")[1], range(50))
    return BatchLoader(test_data, 20, shuffle=True, augment=RandomAffine(30), seed=seed)


def images_of_a_pass(loader):
    return torch.cat([images for images, _ in loader])


def test_a_pass_is_a_function_of_seed_and_epoch():
    loader = augmented()
    epochs = [images_of_a_pass(loader) for _ in range(3)]
    assert not torch.equal(epochs[0], epochs[1])
    torch.manual_seed(1)
    resumed = augmented()
    resumed.epoch = 2
    assert torch.equal(images_of_a_pass(resumed), epochs[2])
    other_seed = images_of_a_pass(augmented(seed=1))
    assert not torch.equal(other_seed, epochs[0]) and not torch.equal(other_seed, epochs[1])


def test_peeking_changes_nothing():
    loader, reference = augmented(), augmented()
    peeked = iter(loader)
    next(peeked)
    utils.plot_sample_data(loader)
    assert loader.epoch == 0
    for _ in range(2):
        assert torch.equal(images_of_a_pass(loader), images_of_a_pass(reference))
    assert len(list(peeked)) == 2  # an old pass that ends late
    assert loader.epoch == 2


def test_global_generators_stay_as_they_are():
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    utils.set_seed(0)
    expected = draw()
    utils.set_seed(0)
    images_of_a_pass(augmented())
    assert draw() == expected


def test_augmentation_keeps_images_with_their_labels():
    dataset = numbered(40)
    dataset.data[:] = dataset.targets[:, None, None] * 5  # uniform images
    loader = BatchLoader(dataset, 16, shuffle=True, augment=RandomAffine(30))
    for images, labels in loader:
        centre = (images[:, 0, 14, 14] * utils.STD + utils.MEAN) * 51
        torch.testing.assert_close(centre, labels.float())


def test_subset():
    chosen = Subset(Subset(numbered(50), range(10, 50)), [0, 5, 39])
    (images, labels), *rest = BatchLoader(chosen, 10)
    assert labels.tolist() == numbers(images).tolist() == [10, 15, 49] and not rest


PIXELS, LABELS = torch.zeros(5, 28, 28, dtype=torch.uint8), torch.arange(5)


@pytest.mark.parametrize(
    "data, targets, message",
    [
        (PIXELS.float(), LABELS, r"uint8 of shape \(N, 28, 28\).*got torch.float32"),
        (PIXELS.flatten(1), LABELS, r"uint8 of shape \(N, 28, 28\).*got .* \(5, 784\)"),
        (PIXELS[:0], LABELS[:0], r"N > 0, got .* \(0, 28, 28\)"),
        (PIXELS, LABELS[:3], r"integer label for each of 5 images.*\(3,\)"),
        (PIXELS, LABELS.float(), "integer label for each of 5 images.*float32.*argmax"),
    ],
)
def test_wrong_images_and_labels_are_refused(data, targets, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(SimpleNamespace(data=data, targets=targets), 2)


@pytest.mark.parametrize("name", ["transform", "target_transform"])
def test_a_transform_that_would_not_be_applied_is_refused(name):
    dataset = numbered(5)
    setattr(dataset, name, ToTensor())
    for data in (dataset, Subset(dataset, [0, 1])):
        with pytest.raises(ValueError, match="does not apply the dataset's transform.*DataLoader"):
            BatchLoader(data, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_and_cpu_see_the_same_batches():
    train_data, _ = utils.load_data("digits")
    options = {"shuffle": True, "augment": RandomAffine(10, (0.1, 0.1)), "seed": 3}
    loaders = [BatchLoader(train_data, 100, device=device, **options) for device in ("cpu", "cuda")]
    for (images, labels), (gpu_images, gpu_labels) in zip(*loaders, strict=True):
        assert torch.equal(labels, gpu_labels.cpu())
        torch.testing.assert_close(images, gpu_images.cpu(), atol=1e-4, rtol=1e-4)


# --- RandomAffine


@pytest.mark.parametrize(
    "degrees, translate, scale, shear",
    [(30, None, None, None), (180, (0.2, 0.3), (0.7, 1.4), 40)],
)
def test_affine_is_torchvisions(degrees, translate, scale, shear):
    """Each image's parameters, drawn in this order, do what they do in torchvision's `affine`."""
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    transformed = RandomAffine(degrees, translate, scale, shear)(images)

    x, y = translate or (0, 0)
    low, high = scale or (1, 1)
    limits = [(-degrees, degrees), (-x, x), (-y, y), (low, high), (-(shear or 0), shear or 0)]
    torch.manual_seed(1)
    drawn = [torch.empty(20).uniform_(*each).tolist() for each in limits]
    for i, (angle, right, down, factor, slant) in enumerate(zip(*drawn, strict=True)):
        shift, shear_xy = [28 * right, 28 * down], [slant, 0.0]
        expected = affine(images[i], angle, shift, factor, shear_xy, InterpolationMode.BILINEAR)
        torch.testing.assert_close(transformed[i], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "option, value",
    [
        ("translate", (2, 0)),
        ("translate", (0, -0.1)),
        ("scale", (0, 1)),
        ("scale", (1.2, 0.8)),
        ("shear", -5),
        ("shear", 90),
    ],
)
def test_parameters_out_of_range_are_refused(option, value):
    message = f"expected translate=.*'{option}': {re.escape(str(value))}"
    with pytest.raises(ValueError, match=message):
        RandomAffine(10, **{option: value})
