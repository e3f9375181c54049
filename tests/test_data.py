import gzip
import hashlib
import os
import random
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import damage, start
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.transforms import InterpolationMode, ToTensor
from torchvision.transforms.v2.functional import affine

import utils
from utils import BatchLoader, RandomAffine


def write_idx(path, array):
    """Write a uint8 array in the idx format of MNIST's files."""
    header = np.array([8 * 256 + array.ndim, *array.shape], dtype=">i4")
    path.write_bytes(header.tobytes() + array.tobytes())


def write_dataset(root, name, counts=(30, 20)):
    """Write random images in torchvision's layout, `counts` of them for training and for test."""
    folder, generator = root / name / "raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in zip(("train", "t10k"), counts, strict=True):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))


@pytest.mark.parametrize("data_dir, place", [("", "data"), ("~/there", "there")])
def test_a_set_is_read_from_disk(tmp_path, monkeypatch, data_dir, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_DIR", data_dir)
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / place, "KMNIST")
    for data, count in zip(utils.load_data("KMNIST"), (30, 20), strict=True):
        assert data.name == "KMNIST" and data.data.shape == (count, 28, 28)
        assert data.data.dtype == torch.uint8 and data.classes[:2] == ["o", "ki"]
        assert torch.equal(data.targets, torch.arange(count) % 10)
    labels = tmp_path / place / "KMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    write_idx(labels, np.full(20, 77, np.uint8))  # no class
    with pytest.raises(ValueError, match="are damaged"):
        utils.load_data("KMNIST")


@pytest.mark.parametrize("name", ["auto", "FashionMNIST"])
def test_published_files_are_accepted(mnist_root, name):
    if name != "auto" and not (mnist_root / name).exists():
        pytest.skip(f"{name} is not there")
    train_data, test_data = utils.load_data(name, mnist_root)
    assert (len(train_data), len(test_data)) == (60_000, 10_000)
    if train_data.name == "MNIST":
        assert train_data.classes == list("0123456789")
        pixels = train_data.data / 255
        assert (pixels.mean(), pixels.std()) == pytest.approx((utils.MEAN, utils.STD), abs=1e-4)


def test_without_a_network_auto_falls_back_to_digits_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="'digits' INSTEAD OF MNIST"):
        train_data, test_data = utils.load_data("auto", tmp_path)
    assert train_data.name == test_data.name == "digits"
    write_dataset(tmp_path, "KMNIST")
    (tmp_path / "KMNIST" / "raw" / "t10k-images-idx3-ubyte").unlink()
    four = r"train-images-idx3-ubyte.*raw' \(found: \['t10k-labels.*train-labels-idx1-ubyte'\]\)"
    with pytest.raises(RuntimeError, match=f"cannot download KMNIST: put.*{four}"):
        utils.load_data("KMNIST", tmp_path)
    with pytest.raises(ValueError, match="MNIST.*got 'mnist'"):
        utils.load_data("mnist")


@pytest.fixture
def mirror(tmp_path):
    """The address of a server that sends the files in `tmp_path`."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


@pytest.mark.parametrize("page", ["index.html", "train-images-idx3-ubyte.gz"])  # 404, or no data
def test_an_answer_without_data_is_an_error_or_a_warning(tmp_path, monkeypatch, mirror, page):
    (tmp_path / page).write_text("Please log in")
    monkeypatch.setattr(utils.datasets.MNIST, "mirrors", [mirror])
    with pytest.raises(RuntimeError, match="cannot download MNIST: put .*t10k-labels-idx1-ubyte"):
        utils.load_data("MNIST", tmp_path)
    with pytest.warns(UserWarning, match="'digits' INSTEAD OF MNIST"):
        assert utils.load_data("auto", tmp_path)[0].name == "digits"


def test_files_under_other_names_are_named_and_digits_do_not_replace_them(tmp_path):
    write_dataset(tmp_path, "MNIST")
    for path in (tmp_path / "MNIST" / "raw").iterdir():
        path.rename(str(path).replace("-idx", ".idx"))  # as 7-Zip writes them
    for name in ("MNIST", "auto"):
        with pytest.raises(ValueError, match=r"put.*'t10k-images-idx3.*'train-labels\.idx1-ubyte'"):
            utils.load_data(name, tmp_path)


def download(root, mirror, resources):
    utils.datasets.KMNIST.mirrors, utils.datasets.KMNIST.resources = [mirror], resources
    assert len(utils.load_data("KMNIST", root)[0]) == 9000


@pytest.mark.slow
def test_processes_that_download_into_one_folder_all_get_the_data(tmp_path, mirror):
    write_dataset(tmp_path, "KMNIST", (9000, 1000))
    resources = []
    for path in (tmp_path / "KMNIST" / "raw").iterdir():
        content = gzip.compress(path.read_bytes(), 1)
        (tmp_path / f"{path.name}.gz").write_bytes(content)
        resources.append((f"{path.name}.gz", hashlib.md5(content).hexdigest()))
    processes = [start(download, tmp_path / "here", mirror, resources) for _ in range(6)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6


@pytest.mark.parametrize("name", ["MNIST", "auto"])
def test_damaged_files_are_refused_and_never_replaced(tmp_path, mnist_root, name):
    """Flip, cut out or insert bytes in MNIST's files: refused, or the same data all the same."""
    original, raw = utils.load_data("MNIST", mnist_root), tmp_path / "MNIST" / "raw"
    shutil.copytree(mnist_root / "MNIST" / "raw", raw, copy_function=shutil.copyfile)
    files, generator = sorted(raw.glob("*-ubyte")), random.Random(name)
    refused, count = 0, int(os.environ.get("FUZZ", 8)) // 2
    for number in range(count):
        file = files[number % 4]
        content = file.read_bytes()
        file.write_bytes(damage(content, generator))
        try:
            pair = utils.load_data(name, tmp_path)
        except ValueError as error:
            assert f"'{raw}' are damaged: delete them to download them again" in str(error)
            refused += 1
        else:
            for data, expected in zip(pair, original, strict=True):
                assert torch.equal(data.data, expected.data)
                assert torch.equal(data.targets, expected.targets)
        file.write_bytes(content)
    print(f"{refused} of {count} damaged copies of MNIST refused")
    assert refused > 0 and len(utils.load_data("MNIST", tmp_path)[0]) == 60_000


def test_digits_have_mnists_form_and_none_is_there_twice():
    train_data, test_data = utils.load_data("digits")
    images = torch.cat((train_data.data, test_data.data))
    assert images.shape == (1437 + 360, 28, 28) and images.dtype == torch.uint8
    assert len(images.unique(dim=0)) == 1797 and len(test_data) == 360  # none twice
    for side in images.amax(dim=0).nonzero().T:  # rows and columns: a box of 20×20
        assert (side.min(), side.max()) == (4, 23)
    assert test_data.targets[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    assert test_data.targets.bincount().min() >= 35  # of ten classes
    train_data.transform = ToTensor()
    images, labels = next(iter(DataLoader(train_data, 5)))
    assert images.shape == (5, 1, 28, 28) and labels.tolist() == train_data.targets[:5].tolist()


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


@pytest.mark.parametrize("shuffle, augment", [(True, None), (True, RandomAffine(0)), (False, None)])
@pytest.mark.parametrize("count, batch_size", [(1, 1), (30, 7), (300, 9), (300, 301), (288, 18)])
def test_a_pass_yields_each_sample_once(count, batch_size, shuffle, augment):
    dataset = numbered(count)
    loader = BatchLoader(dataset, batch_size, shuffle=shuffle, augment=augment)
    batches = list(loader)
    assert loader.dataset is dataset and len(loader) == len(batches)
    sizes = [len(labels) for _, labels in batches]
    assert set(sizes[:-1]) <= {batch_size} and 0 < sizes[-1] <= batch_size
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert images.dtype == torch.float32 and images.shape == (count, 1, 28, 28)
    assert labels.dtype == torch.int64 and torch.equal(numbers(images), labels)
    assert torch.equal(labels.sort().values, torch.arange(count))
    assert count == 1 or torch.equal(labels, torch.arange(count)) == (not shuffle)


def augmented_pass(*seed_and_epoch):
    """The images of a pass over 50 digits, after `set_seed`."""
    data = Subset(utils.load_data("digits")[1], range(50))
    loader = BatchLoader(data, 20, shuffle=True, augment=RandomAffine(30))
    utils.set_seed(*seed_and_epoch)
    return torch.cat([images for images, _ in loader])


def test_a_pass_is_a_function_of_seed_and_epoch_alone(request):
    passes = [augmented_pass(*pair) for pair in ((0, 0), (0, 1), (1, 0), (1000, 0), (0, 1000))]
    assert not any(torch.equal(*pair) for pair in combinations(passes, 2))
    assert torch.equal(augmented_pass(2**63), augmented_pass(2**63))
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):  # whose tensors hold no numbers
        images = augmented_pass(0, 1)
    assert images.dtype == torch.float32 and torch.equal(images, passes[1])


class Series(list):
    """Indices or labels as pandas keeps them: looked up by their names, not by their places."""

    def __getitem__(self, index):
        raise KeyError(index)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array, Series])
def test_a_subset_of_a_subset_yields_the_chosen_samples(kind):
    data = numbered(50)
    own_arrays = SimpleNamespace(data=data.data.numpy(), targets=kind(range(50)))
    for dataset in (own_arrays, TensorDataset(data.data, data.targets)):
        chosen = Subset(Subset(dataset, range(10, 50)), kind([0, 5, 39]))
        [(images, labels)] = BatchLoader(chosen, 10)
        assert labels.tolist() == numbers(images).tolist() == [10, 15, 49]
    assert list(BatchLoader(Subset(numbered(5), kind([])), 2)) == []


@pytest.mark.parametrize(
    "name, value",
    [("transform", ToTensor()), ("target_transform", int), ("data", torch.zeros(5, 28, 28))]
    + [("data", numbered(5).data[:, None]), ("targets", range(4)), ("targets", torch.zeros(5, 1))]
    + [("targets", torch.full((5,), 0.5))],
)
def test_what_would_be_left_out_or_normalised_twice_is_refused(name, value):
    dataset = numbered(5)
    setattr(dataset, name, value)
    for data in (dataset, Subset(dataset, [0, 1])):
        with pytest.raises(ValueError, match="expected uint8 images|without a transform"):
            BatchLoader(data, 2)


def test_wrong_arguments_fail_where_they_are_given():
    for batch_size in (0, -1, 12.0, 12.5):
        with pytest.raises(ValueError, match=f"cannot split batches of {batch_size} "):
            BatchLoader(numbered(5), batch_size)
    wrong = [True, False, True], [0.0, 2.0], [[0], [2]]  # the last: as mask.nonzero() gives
    for kind, indices in product((list, np.array, torch.tensor), wrong):
        with pytest.raises(ValueError, match=r"indices.*nonzero\(\).flatten\(\), got tensor\("):
            BatchLoader(Subset(numbered(3), kind(indices)), 2)
    forms = RandomAffine(5, shear=3), RandomAffine((-5, 5), (0, 0), (1, 1), (-3, 3))
    assert torch.equal(*((torch.manual_seed(0), form.sample(9))[1] for form in forms))


@pytest.mark.parametrize("limits", [(30, (0, 0), (1, 1), 0), (180, (0.2, 0.3), (0.7, 1.4), 40)])
def test_affine_is_torchvisions(limits):
    """Each image's parameters, drawn in this order, do what they do in torchvision's `affine`."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8))
    data, augment = SimpleNamespace(data=images, targets=range(20)), RandomAffine(*limits)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):  # which moves no pixel
        [(transformed, _)] = BatchLoader(data, 20, augment=augment)
    degrees, (x, y), scale, shear = limits
    ranges = (-degrees, degrees), (-x, x), (-y, y), scale, (-shear, shear)
    torch.manual_seed(1)
    drawn = [torch.empty(20).uniform_(*pair).tolist() for pair in ranges]
    for i, (angle, right, down, factor, slant) in enumerate(zip(*drawn, strict=True)):
        parameters = angle, [28 * right, 28 * down], factor, [slant, 0.0]
        expected = affine(images[i, None] / 255, *parameters, InterpolationMode.BILINEAR)
        actual = transformed[i] * utils.STD + utils.MEAN
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
