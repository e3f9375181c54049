import asyncio
import copy
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import EPOCH, ROOT, export
from handwriting import SEVEN, sheet

import utils
from model import Net


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stdout(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def check_run(notebook, dataset, epochs):
    """Check the lines and the pictures of an executed notebook; return its final accuracy."""
    printed = stdout(notebook)
    lines = EPOCH.findall(printed)
    numbers = [(int(epoch), int(total)) for epoch, total, *_ in lines]
    assert numbers == [(epoch, epochs) for epoch in range(1, epochs + 1)]
    accuracy = lines[-1][-1]
    result, sentence = printed.splitlines()[-2:]
    assert result == f"Final test accuracy: {accuracy} % ({dataset}, epoch {epochs})"
    assert sentence == "Drawing pad: run all cells in Jupyter or Colab to draw a digit here."
    for cell in code_cells(notebook):
        pictures = ["image/png" in output.get("data", {}) for output in cell.outputs]
        assert sum(pictures) == cell.source.count("plt.savefig")
        for output, is_picture in zip(cell.outputs, pictures, strict=True):
            assert is_picture or output.get("name") == "stdout"  # no error, no warning, no bar
    assert "widgets" not in notebook.metadata
    return float(accuracy)


@pytest.mark.slow
def test_one_epoch_on_mnist_reaches_98_percent(folder, mnist_root, monkeypatch, capsys):
    monkeypatch.setenv("DATA_DIR", str(mnist_root))
    export(EPOCHS=1)
    runpy.run_path("S5.py")
    final = re.search(r"Final test accuracy: (.*) % \(MNIST, epoch 1\)", capsys.readouterr().out)
    assert float(final[1]) > 98


def weights():
    state = torch.load("runs/model.pt", map_location="cpu")
    return torch.cat([value.flatten().double() for value in state.values()])


def stoppable_client(notebook):
    """Return a client that, once `armed`, interrupts the kernel when an epoch's line is printed."""
    from nbclient import NotebookClient

    class Client(NotebookClient):
        armed = False

        def process_message(self, message, cell, index):
            if self.armed and re.search(r"Epoch +\d", str(message["content"])):
                self.armed = False
                asyncio.ensure_future(self.km.interrupt_kernel())
            return super().process_message(message, cell, index)

    return Client(notebook, resources={"metadata": {"path": "."}}, allow_errors=True)


@pytest.mark.slow
def test_a_stopped_and_resumed_run_prints_and_saves_the_same(folder):
    """Train; train again in the same kernel, stop it twice, and resume in another process."""
    import papermill

    small = {"DATASET": "digits", "EPOCHS": 8}
    notebook = papermill.execute_notebook("S5.ipynb", None, small, prepare_only=True)
    sources = [cell.source for cell in notebook.cells]
    first = sources.index(next(source for source in sources if source.startswith("DATASET = ")))
    loop = sources.index(next(source for source in sources if "for epoch in" in source))
    client = stoppable_client(notebook)
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        whole, expected = copy.deepcopy(notebook), weights()
        assert check_run(whole, "digits", 8) > 90
        assert len(list(Path("runs").glob("*.png"))) == 7

        for index in [*range(first, loop + 1), loop]:
            client.armed = index == loop
            client.execute_cell(notebook.cells[index], index)
            assert index < loop or notebook.cells[loop].outputs[-1].ename == "KeyboardInterrupt"
    epochs = EPOCH.findall(stdout(whole))
    printed = "".join(output.get("text", "") for output in notebook.cells[loop].outputs)
    lines = EPOCH.findall(printed)
    done = epochs.index(lines[0])
    assert done > 0 and lines == epochs[done : done + len(lines)]
    assert f"Resumed after epoch {done}: test accuracy" in printed

    export(**small, RESUME=True)
    resumed = subprocess.run([sys.executable, "S5.py"], capture_output=True, text=True, check=True)
    rest = EPOCH.findall(resumed.stdout)
    assert 0 < len(rest) <= 8 - done - len(lines) and rest == epochs[-len(rest) :]
    assert torch.equal(weights(), expected)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_setup_clones_the_repository(tmp_path):
    source = code_cells(nbformat.read(ROOT / "S5.ipynb", as_version=4))[0].source
    source = source.replace('REPO_URL = ""', f'REPO_URL = "{ROOT}"')
    for _ in range(2):  # the second time as after a restart of the kernel
        subprocess.run([sys.executable, "-c", source], cwd=tmp_path, check=True)
    assert (tmp_path / "mnist" / "S5.ipynb").exists()


def test_committed_notebook_is_one_clean_run_on_mnist():
    notebook = nbformat.read(ROOT / "S5.ipynb", as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    (loop,) = [cell for cell in cells if "for epoch in" in cell.source]
    assert len(loop.outputs) == 1  # the lines of all epochs, in one block
    (tagged,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    exec(tagged.source, parameters := {})
    accuracy = check_run(notebook, "MNIST", parameters["EPOCHS"])
    readme = (ROOT / "README.md").read_text()
    assert f"{accuracy:.2f} %" in readme and f"{parameters['EPOCHS']} epochs" in readme
    assert set(EPOCH.findall(readme)) < set(EPOCH.findall(stdout(notebook)))  # what a run prints


@pytest.mark.slow
def test_committed_weights_are_as_good_as_the_readme_says(mnist_root):
    net = Net()
    net.load_state_dict(torch.load(ROOT / ".assets" / "model.pt", weights_only=True))
    test_data = utils.load_data("MNIST", mnist_root)[1]
    _, accuracy = utils.test(net, "cpu", utils.BatchLoader(test_data, 1000), F.nll_loss)
    assert f"{accuracy:.2f} %" in (ROOT / "README.md").read_text()


def test_readme_examples_run(folder, capsys):
    readme = (ROOT / "README.md").read_text()
    with_weights, example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shutil.copytree(ROOT / ".assets", ".assets")
    sheet(SEVEN, 14, 300).save("photo.jpg")
    exec(with_weights, {})
    assert re.fullmatch(r"7 0\.\d+\n", capsys.readouterr().out)
    with warnings.catch_warnings(action="ignore"):  # digits instead of MNIST
        exec(example, {})
    printed = capsys.readouterr().out
    assert printed.count("train: ") == 2 and re.search(r"accuracy ([89]\d|100)\.\d+ %\n$", printed)


def test_utils_does_not_import_model():
    source = (ROOT / "utils.py").read_text()
    assert not re.search(r"^ *(import|from) model\b", source, re.MULTILINE)
