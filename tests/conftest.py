import os
import re
import shutil
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests run at a time; before torch is imported
os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"  # refuses: offline
os.environ["no_proxy"] = "127.0.0.1"  # except from a test's own server

import pytest  # torch is imported below: the process that only starts the others needs none

ROOT = Path(__file__).parent.parent
CONTEXT = get_context("forkserver")  # its processes start quickly, with these imported
CONTEXT.set_forkserver_preload(["utils", "sklearn.datasets"])
EPOCH = re.compile(  # a line that the notebook prints
    r"(?m)^Epoch +(\d+)/(\d+) train loss ([\d.]+) accuracy ([\d.]+) %"
    r"  test loss ([\d.]+) accuracy ([\d.]+) %  [\d.]+ s$"
)


def pytest_collection_modifyitems(items):
    """Begin with the longest tests, so that no process is left alone with them."""
    items.sort(key=lambda item: item.path.name != "test_notebook.py")


@pytest.fixture(scope="session")
def mnist_root():
    """The folder with MNIST's files; without them a test skips, or fails under REQUIRE_MNIST."""
    root = Path(os.environ.get("DATA_DIR") or ROOT / "data").resolve()
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        give_up = pytest.fail if os.environ.get("REQUIRE_MNIST") else pytest.skip
        give_up("MNIST is neither in $DATA_DIR nor in data/; running the notebook downloads it")
    return root


@pytest.fixture
def linear():
    """A small model without batch norm: its outputs do not depend on the batch."""
    from torch import manual_seed, nn

    manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10), nn.LogSoftmax(dim=1))


@pytest.fixture
def samples():
    """250 images as they enter a model, with labels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(250, 1, 28, 28, generator=generator)
    return torch.utils.data.TensorDataset(images, torch.arange(250) % 10)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the notebook, model.py and utils.py and nothing more, to run in."""
    for name in ("S5.ipynb", "model.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(function, *arguments):
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def damage(content, generator):
    """Return other bytes than `content`: some replaced, put in or left out, or the end cut off."""
    start, count = generator.randrange(len(content)), generator.choice((1, 1, 8, 100, 10_000))
    noise = generator.randbytes(count)
    kinds = (noise, count), (noise, 0), (b"", count), (b"", len(content))
    put_in, left_out = generator.choice(kinds)
    return content[:start] + put_in + content[start + left_out :]


def find_cell(notebook, text):
    """Return the index of the first cell with `text`."""
    return next(i for i, cell in enumerate(notebook.cells) if text in cell.source)


def export(**parameters):
    """Export the notebook with other parameters as S5.py, up to the final accuracy."""
    import papermill  # takes seconds, and the processes of test_checkpoint import this file
    from nbconvert import PythonExporter

    notebook = papermill.execute_notebook("S5.ipynb", None, parameters, prepare_only=True)
    del notebook.cells[find_cell(notebook, "Final test") + 1 :]
    Path("S5.py").write_text(PythonExporter().from_notebook_node(notebook)[0])
