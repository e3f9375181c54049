import copy
import http.client
import os
import random
import re
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import damage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, ToTensor
from torchvision.transforms.v2.functional import affine

import utils
from utils import BatchLoader, RandomAffine

NAMES = ["MNIST", "FashionMNIST", "KMNIST", "QMNIST"]


def write_idx(path, array):
    """Write a NumPy array in the idx format of MNIST's files."""
    code = {"uint8": 8, "int32": 12}[str(array.dtype)]
    header = np.array([code * 256 + array.ndim, *array.shape], dtype=">i4")
    path.write_bytes(header.tobytes() + array.astype(array.dtype.newbyteorder(">")).tobytes())


def write_dataset(root, name, counts=(30, 20), classes=10):
    """Write random images in torchvision's layout: 30 for training, 20 for test."""
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
    """Let every download fail, as on a machine without a network."""

    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


@pytest.fixture
def unchecked(monkeypatch):
    """Accept made-up files as MNIST's and Fashion-MNIST's."""
    monkeypatch.setattr(utils, "DIGESTS", {})


# --- load_data


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_sets_are_read_from_disk(tmp_path, monkeypatch, offline, unchecked, name):
    write_dataset(tmp_path, name)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for pair in (utils.load_data(name), utils.load_data(name, root=str(tmp_path))):
        for data, count in zip(pair, (30, 20), strict=True):
            assert type(data) is getattr(datasets, name) and data.name == name
            assert data.data.shape == (count, 28, 28) and data.data.dtype == torch.uint8
            assert len(data.classes) == 10
            _, labels = next(iter(BatchLoader(data, count)))
            assert torch.equal(labels, torch.arange(count) % 10)


@pytest.mark.parametrize("data_dir, folder", [(None, "data"), ("~", "."), ("~/there", "there")])
def test_auto_is_mnist_where_it_lies(tmp_path, monkeypatch, offline, unchecked, data_dir, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    if data_dir:
        monkeypatch.setenv("DATA_DIR", data_dir)
    write_dataset(tmp_path / folder, "MNIST")
    assert [data.name for data in utils.load_data()] == ["MNIST", "MNIST"]


def test_auto_falls_back_to_digits_with_a_warning(tmp_path, offline):
    with pytest.warns(UserWarning, match="(?s)'digits' INSTEAD OF MNIST.*no network"):
        train_data, test_data = utils.load_data("auto", tmp_path)
    assert train_data.name == test_data.name == "digits"


def test_unknown_name():
    with pytest.raises(ValueError, match="'mnist'.*'MNIST'"):
        utils.load_data("mnist")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "cause",
    [
        urllib.error.URLError("no network"),
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b""),
    ],
)
def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch, name, cause):
    def fail(*args, **kwargs):
        raise cause

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    write_dataset(tmp_path, name)
    folder = tmp_path / name / "raw"
    missing = ("qmnist-test" if name == "QMNIST" else "t10k") + "-images-idx3-ubyte"
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError) as error:
        utils.load_data(name, tmp_path)
    for part in (f"Put {missing} into '{folder}'", "DATA_DIR", "load_data('digits')", str(cause)):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["auto", "MNIST"])
@pytest.mark.parametrize(
    "root, error", [("file", NotADirectoryError), ("parent", FileExistsError), ("x" * 300, OSError)]
)
def test_disk_errors_are_left_as_they_are(tmp_path, name, root, error):
    (tmp_path / "file").touch()
    (tmp_path / "parent" / "MNIST").mkdir(parents=True)
    (tmp_path / "parent" / "MNIST" / "raw").touch()
    with pytest.raises(OSError) as raised:
        utils.load_data(name, tmp_path / root)
    assert type(raised.value) is error and root in raised.value.filename


@pytest.mark.parametrize("name", ["auto", "MNIST", "QMNIST"])
@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", b"not an idx file" * 100])
def test_undecodable_files_are_refused(tmp_path, offline, unchecked, name, content):
    folder = tmp_path / ("QMNIST" if name == "QMNIST" else "MNIST")
    write_dataset(tmp_path, folder.name)
    (file,) = (folder / "raw").glob("*train-images*")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"'{folder}' are damaged.*delete that folder"):
        utils.load_data(name, tmp_path)


@pytest.mark.parametrize("name", ["auto", "MNIST"])
def test_wrong_files_of_an_old_torchvision_are_refused(tmp_path, offline, name):
    folder = tmp_path / "MNIST" / "processed"
    folder.mkdir(parents=True)
    for file in ("training.pt", "test.pt"):  # which torchvision prefers to all others
        torch.save((torch.zeros(30, 28, 28).byte(), torch.zeros(30).long()), folder / file)
    with pytest.raises(ValueError, match=f"'{folder.parent}' are damaged.*not the published"):
        utils.load_data(name, tmp_path)


@pytest.mark.parametrize("name", ["KMNIST", "QMNIST"])
@pytest.mark.parametrize(
    "shape, classes, message",
    [
        ((30, 28, 28), 11, "labels from 0 to 10"),
        ((31, 28, 28), 10, "30 labels for images of shape (31, 28, 28)"),
        ((30, 14, 56), 10, "30 labels for images of shape (30, 14, 56)"),
    ],
)
def test_sets_without_a_digest_are_checked(tmp_path, offline, name, shape, classes, message):
    write_dataset(tmp_path, name, classes=classes)
    (images,) = (tmp_path / name / "raw").glob("*train-images*")
    write_idx(images, np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match=f"damaged.*{re.escape(message)}.*delete"):
        utils.load_data(name, tmp_path)


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


@pytest.mark.parametrize("name", ["auto", "MNIST"])
@pytest.mark.parametrize("file", ["t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_one_flipped_bit_is_noticed(published, tmp_path, offline, name, file):
    content = bytearray((published / file).read_bytes())
    content[len(content) // 2] ^= 1
    (published / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"'{published.parent}' are damaged.*delete that folder"):
        utils.load_data(name, tmp_path)


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
    again, _ = utils.load_data("digits")
    assert torch.equal(train_data.data, again.data)
    assert test_data.targets[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    for data in (train_data, test_data):
        assert data.data.dtype == torch.uint8 and data.data.shape[1:] == (28, 28)
        assert data.data.max() == 255
        box = torch.zeros(28, 28, dtype=torch.bool)
        box[4:24, 4:24] = True
        assert data.data[:, ~box].max() == 0 and data.data[:, 4:24, 4:24].amax(dim=(0, 1)).min() > 0
        shares = data.targets.bincount() / len(data)
        assert len(shares) == len(data.classes) == 10
        assert shares.min() > 0.09 and shares.max() < 0.11
    train_data.transform = ToTensor()
    images, labels = next(iter(DataLoader(train_data, 5)))
    assert images.shape == (5, 1, 28, 28) and labels.tolist() == train_data.targets[:5].tolist()


# --- BatchLoader


def numbered(count):
    """A dataset in which image i shows i as pixel values and bears i as its label."""
    dataset = TensorDataset()
    number = torch.arange(count)
    dataset.data = torch.zeros(count, 28, 28, dtype=torch.uint8)
    dataset.data[:, 0, 0], dataset.data[:, 0, 1] = number // 256, number % 256
    dataset.targets = number
    return dataset


def numbers(images):
    """The numbers that a batch of `numbered` shows."""
    pixels = (images[:, 0, 0, :2] * utils.STD + utils.MEAN) * 255
    return (pixels.round() @ torch.tensor([256.0, 1.0])).long()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count, batch_size", [(1, 1), (10, 3), (12, 4), (7, 100), (1000, 128)])
def test_each_sample_comes_once(count, batch_size, shuffle):
    dataset = numbered(count)
    loader = BatchLoader(dataset, batch_size, shuffle=shuffle)
    batches = list(loader)
    assert loader.dataset is dataset and len(loader) == len(batches)
    sizes = [len(labels) for _, labels in batches]
    assert sizes[:-1] == [batch_size] * (len(batches) - 1) and sum(sizes) == count
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert images.dtype == torch.float32 and images.shape == (count, 1, 28, 28)
    assert labels.dtype == torch.int64
    assert torch.equal(numbers(images), labels)
    assert torch.equal(labels.sort().values, torch.arange(count))
    assert torch.equal(labels, torch.arange(count)) == (not shuffle or count == 1)


@given(count=st.integers(1, 300), batch_size=st.integers(1, 350), seed=st.integers(0, 2**63))
@settings(max_examples=50, deadline=None)
def test_contract_for_any_size(count, batch_size, seed):
    loader = BatchLoader(numbered(count), batch_size, shuffle=True, seed=seed)
    labels = [labels for _, labels in loader]
    assert len(loader) == len(labels) and loader.epoch == 1
    assert {len(each) for each in labels[:-1]} <= {batch_size} and len(labels[-1]) <= batch_size
    assert sorted(torch.cat(labels).tolist()) == list(range(count))


def augmented(seed=0):
    return BatchLoader(numbered(50), 20, shuffle=True, augment=RandomAffine(30), seed=seed)


def passes(loader, count=1):
    """The images and labels of some passes, joined."""
    batches = [batch for _ in range(count) for batch in loader]
    return torch.cat(
        [torch.cat((images.flatten(1), labels[:, None]), 1) for images, labels in batches]
    )


def test_a_pass_is_a_function_of_seed_and_epoch():
    epochs = [passes(loader) for loader in [augmented()] * 3]
    assert not torch.equal(epochs[0], epochs[1])
    torch.manual_seed(1)
    resumed = augmented()
    resumed.epoch = 2
    assert torch.equal(passes(resumed), epochs[2])
    assert not torch.equal(passes(augmented(seed=1)), epochs[1])
    assert not torch.equal(passes(augmented(seed=1)), epochs[0])


def test_peeking_changes_nothing():
    peeked = augmented()
    for _ in range(3):
        next(iter(peeked))
    utils.plot_sample_data(peeked)
    for _, _ in zip(range(2), peeked, strict=False):
        pass
    assert peeked.epoch == 0
    assert torch.equal(passes(peeked, 2), passes(augmented(), 2)) and peeked.epoch == 2


def test_an_old_iterator_does_not_set_the_epoch_back():
    loader = augmented()
    old = iter(loader)
    next(old)
    passes(loader, 2)
    for _ in old:
        pass
    assert loader.epoch == 2


def test_global_generators_stay_as_they_are():
    before = torch.get_rng_state(), copy.deepcopy(np.random.get_state())
    passes(augmented())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1][1])


def test_augmentation_keeps_images_with_their_labels():
    dataset = numbered(40)
    dataset.data[:] = dataset.targets[:, None, None] * 5  # uniform images
    loader = BatchLoader(dataset, 16, shuffle=True, augment=RandomAffine(30))
    for images, labels in loader:
        centre = (images[:, 0, 14, 14] * utils.STD + utils.MEAN) * 51
        torch.testing.assert_close(centre, labels.float())


def test_subset():
    chosen = Subset(Subset(numbered(50), range(10, 50)), [0, 5, 39])
    (_, labels), *rest = BatchLoader(chosen, 10)
    assert labels.tolist() == [10, 15, 49] and not rest


def test_loader_refuses_what_it_cannot_batch():
    floats, flat = numbered(5), numbered(5)
    floats.data, flat.data = floats.data.float(), flat.data.flatten(1)
    for dataset, shape in (
        (floats, "(5, 28, 28)"),
        (flat, "(5, 784)"),
        (numbered(0), "(0, 28, 28)"),
    ):
        with pytest.raises(ValueError, match=r"uint8.*\(N, 28, 28\).*" + re.escape(shape)):
            BatchLoader(dataset, 2)
    short = numbered(5)
    short.targets = short.targets[:3]
    with pytest.raises(ValueError, match=r"each of 5 images.*\(3,\)"):
        BatchLoader(short, 2)
    for targets in (torch.eye(5), torch.arange(5.0)):
        short.targets = targets
        with pytest.raises(ValueError, match=r"integer label for each of 5.*float32.*argmax"):
            BatchLoader(short, 2)
    with pytest.raises(TypeError, match="data and .targets.*TensorDataset.*DataLoader"):
        BatchLoader(TensorDataset(torch.zeros(5, 1, 28, 28)), 2)


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
    [
        (30, None, None, None),
        (0, (0.1, 0.2), None, None),
        (0, None, (0.5, 2), None),
        (0, None, None, 20),
        (180, (0.2, 0.3), (0.7, 1.4), 40),
    ],
)
def test_affine_is_torchvisions(degrees, translate, scale, shear):
    """Parameters drawn uniformly and in this order do what they do in torchvision's `affine`."""
    count = 20
    images = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    augment = RandomAffine(degrees, translate, scale, shear)
    transformed = augment(images, augment.draw(count, torch.Generator().manual_seed(1)))

    x, y = translate or (0, 0)
    low, high = scale or (1, 1)
    limits = [(-degrees, degrees), (-x, x), (-y, y), (low, high), (-(shear or 0), shear or 0)]
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.empty(count).uniform_(*each, generator=generator).tolist() for each in limits]
    for i, (angle, right, down, factor, slant) in enumerate(zip(*drawn, strict=True)):
        shift, shear_xy = [28 * right, 28 * down], [slant, 0.0]
        expected = affine(images[i], angle, shift, factor, shear_xy, InterpolationMode.BILINEAR)
        torch.testing.assert_close(transformed[i], expected, atol=1e-4, rtol=1e-4)


def test_each_image_has_parameters_of_its_own():
    images = torch.rand(1, 1, 28, 28).expand(8, 1, 28, 28)
    turned = RandomAffine(90)(images)
    assert turned.shape == images.shape and len(turned.unique(dim=0)) == 8
    torch.testing.assert_close(RandomAffine(0)(images), images)


@pytest.mark.parametrize(
    "option, value",
    [
        ("translate", (2, 0)),
        ("translate", (0, -0.1)),
        ("translate", (0, float("nan"))),
        ("scale", (0, 0)),
        ("scale", (0, 1)),
        ("scale", (1.2, 0.8)),
        ("shear", -5),
        ("shear", 90),
    ],
)
def test_parameters_out_of_range(option, value):
    with pytest.raises(
        ValueError, match=f"expected translate=.*'{option}': {re.escape(str(value))}"
    ):
        RandomAffine(10, **{option: value})
