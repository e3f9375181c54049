import asyncio
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import papermill
import torch
import torch.nn.functional as F
from conftest import ROOT
from nbclient import NotebookClient
from nbconvert import PythonExporter
from PIL import Image, ImageDraw
from test_data import write_dataset

import utils
from model import Net

EPOCH = re.compile(
    r"^Epoch +(\d+)/(\d+) train loss ([\d.]+) accuracy ([\d.]+) %"
    r"  test loss ([\d.]+) accuracy ([\d.]+) %  [\d.]+ s$",
    re.MULTILINE,
)


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


def test_runs_on_mnist(folder, mnist_root, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(mnist_root))
    notebook = papermill.execute_notebook("S5.ipynb", None, {"EPOCHS": 1}, progress_bar=False)
    assert check_run(notebook, "MNIST", 1) > 98


def weights():
    state = torch.load("runs/model.pt", map_location="cpu")
    return torch.cat([value.flatten().double() for value in state.values()])


def export(**parameters):
    """Export the notebook with other parameters as S5.py."""
    notebook = papermill.execute_notebook("S5.ipynb", None, parameters, prepare_only=True)
    Path("S5.py").write_text(PythonExporter().from_notebook_node(notebook)[0])


class StopOnce(NotebookClient):
    """Runs a notebook, and interrupts its kernel as soon as it prints that epoch 2 is done."""

    stopped = False

    def process_message(self, message, cell, index):
        if "Epoch  2/" in str(message["content"]) and not self.stopped:
            self.stopped = True
            asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(message, cell, index)


def test_stopped_or_killed_it_goes_on_as_if_nothing_had_happened(folder):
    """Once whole, once stopped and its cell run again, once killed, run again as a script."""
    small = {"DATASET": "digits", "EPOCHS": 12}
    whole = papermill.execute_notebook("S5.ipynb", None, small, progress_bar=False)
    assert check_run(whole, "digits", 12) > 95
    epochs, expected = EPOCH.findall(stdout(whole)), weights()
    for name in re.findall(r'savefig\(f"{RUNS}/(.*)"', "\n".join(c.source for c in whole.cells)):
        assert Path("runs", name).stat().st_size > 1000

    stopped = papermill.execute_notebook("S5.ipynb", None, small, prepare_only=True)
    client = StopOnce(stopped, resources={"metadata": {"path": "."}}, allow_errors=True)
    loop = next(i for i, cell in enumerate(stopped.cells) if "for epoch in" in cell.source)
    with client.setup_kernel():
        for index, cell in enumerate(stopped.cells):
            client.execute_cell(cell, index)
            if index == loop:
                assert cell.outputs[-1].ename == "KeyboardInterrupt"
                first = EPOCH.findall(stdout(stopped))
                client.execute_cell(cell, index)
    resumed = EPOCH.findall(stdout(stopped))
    done = len(epochs) - len(resumed)
    assert (
        2 <= done <= len(first) + 1 and first == epochs[: len(first)] and resumed == epochs[done:]
    )
    assert f"Resumed after epoch {done}: test accuracy {epochs[done - 1][-1]} %" in stdout(stopped)
    assert torch.equal(weights(), expected)

    export(**small)
    command = [sys.executable, "-u", "S5.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("Epoch  2/12"):
                run.kill()
                break
    export(**small, RESUME=True)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = EPOCH.findall(again.stdout)
    assert 0 < len(lines) <= 10 and lines == epochs[-len(lines) :]
    assert torch.equal(weights(), expected)
    export(**small, RESUME=True, LEARNING_RATE=0.02)
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 1 and "{'LEARNING_RATE': (0.01, 0.02)}" in other.stderr


def test_another_dataset_runs_from_top_to_bottom(folder, capsys):
    write_dataset(folder / "data", "KMNIST", counts=(300, 100))
    export(DATASET="KMNIST", EPOCHS=1)
    plt.close("all")
    runpy.run_path("S5.py")
    names = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
    assert [label.get_text() for label in plt.gca().get_yticklabels()] == names
    printed = capsys.readouterr().out
    assert all(f"\n{name}: " in printed for name in names)
    assert re.search(r"accuracy: [\d.]+ % \(KMNIST, epoch 1\)$", printed, re.MULTILINE)


def run_setup(folder, before="", repository=""):
    """Run the notebook's set-up cell in `folder`, after the code `before`, as a script."""
    notebook = nbformat.read(ROOT / "S5.ipynb", as_version=4)
    source = code_cells(notebook)[0].source.replace('REPO_URL = ""', f"REPO_URL = {repository!r}")
    source = f"{before}\n{source}\nimport model\nprint(os.path.basename(os.getcwd()))"
    run = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


def test_setup_on_colab_asks_for_the_files(tmp_path):
    stand_in = f"""
import shutil, sys, types
colab = sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.modules["google"] = types.ModuleType("google")
upload = lambda: [shutil.copy(f"{ROOT}/{{name}}.py", ".") for name in ("model", "utils")]
colab.files = types.SimpleNamespace(upload=upload)"""
    assert run_setup(tmp_path, before=stand_in) == tmp_path.name


def test_setup_clones_the_repository(tmp_path):
    origin, colab = tmp_path / "origin", tmp_path / "colab"
    colab.mkdir()
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "init", "-q", origin], check=True)
    for name in ("model.py", "utils.py"):
        shutil.copy(ROOT / name, origin)
    subprocess.run(["git", "-C", origin, "add", "."], check=True)
    subprocess.run(["git", "-C", origin, *identity, "commit", "-qm", "helpers"], check=True)
    for _ in range(2):  # the second time as after a restart of the kernel
        assert run_setup(colab, repository=str(origin)) == "mnist"


# --- what is committed


def test_committed_notebook_is_one_clean_run_on_mnist():
    notebook = nbformat.read(ROOT / "S5.ipynb", as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    (loop,) = [cell for cell in cells if "for epoch in" in cell.source]
    assert len(loop.outputs) == 1  # the lines of all epochs, in one block
    parameters = {}
    (tagged,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    exec(tagged.source, parameters)
    accuracy = check_run(notebook, "MNIST", parameters["EPOCHS"])
    readme = (ROOT / "README.md").read_text()
    assert f"{accuracy:.2f} %" in readme and f"{parameters['EPOCHS']} epochs" in readme
    count = sum(parameter.numel() for parameter in Net().parameters())
    assert f"{count:,} parameters" in readme


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
    photo = Image.new("L", (300, 300), "white")
    ImageDraw.Draw(photo).line([(70, 70), (220, 65), (140, 240)], "black", width=14)
    photo.save("photo.jpg")
    exec(with_weights, {})
    assert re.fullmatch(r"7 0\.\d+\n", capsys.readouterr().out)
    with warnings.catch_warnings(action="ignore"):  # digits instead of MNIST
        exec(example, {})
    printed = capsys.readouterr().out
    assert re.fullmatch(r"train: loss .* %\ntest: loss .*, accuracy ([89]\d|100)\.\d+ %\n", printed)


def test_utils_does_not_import_model():
    code = "import sys, utils; sys.exit('model' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
