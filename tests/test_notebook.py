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
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbconvert import PythonExporter
from PIL import Image, ImageDraw
from test_data import write_dataset
from torchvision import datasets

import utils
from model import Net

EPOCH = re.compile(
    r"^Epoch +(\d+)/(\d+)  train loss ([\d.]+) accuracy +([\d.]+) %"
    r"  test loss ([\d.]+) accuracy +([\d.]+) % +[\d.]+ s$",
    re.MULTILINE,
)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def stdout(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def check_run(notebook, dataset, epochs):
    """Check the lines and the pictures of an executed notebook; return its final accuracy."""
    printed = stdout(notebook)
    lines = EPOCH.findall(printed)
    numbers = [(int(epoch), int(total)) for epoch, total, *_ in lines]
    assert numbers == [(epoch, epochs) for epoch in range(1, epochs + 1)]
    accuracy = lines[-1][-1]
    last = f"Final test accuracy: {accuracy} % ({dataset}, epoch {epochs})"
    assert printed.splitlines()[-1] == last
    for cell in code_cells(notebook):
        draws = re.search(r"^ *(plot_\w+\(|plt.figure|.*plt.subplots)", cell.source, re.MULTILINE)
        assert pictures(cell) == bool(draws)
        for output in cell.outputs:  # no error, no warning, no progress bar
            data = output.get("data", {})
            assert output.get("name") == "stdout" or "image/png" in data or "text/plain" in data
    sentence = "Drawing pad: run all cells in Jupyter or Colab to draw a digit here."
    assert cell.outputs[-1]["data"] == {"text/plain": sentence}
    return float(accuracy)


def test_runs_on_mnist(folder, mnist_root, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(mnist_root))
    notebook = papermill.execute_notebook("S5.ipynb", None, {"EPOCHS": 1}, progress_bar=False)
    assert check_run(notebook, "MNIST", 1) > 98


def weights(folder):
    state = torch.load(folder / "runs" / "model.pt")
    return torch.cat([value.flatten().double() for value in state.values()])


def two_digits(path):
    image = Image.new("L", (300, 200), "white")
    for x in (80, 220):
        ImageDraw.Draw(image).line([(x, 40), (x, 160)], "black", width=12)
    image.save(path)


def export(**parameters):
    """Export the notebook with other parameters as S5.py."""
    small = papermill.execute_notebook("S5.ipynb", None, parameters, prepare_only=True)
    Path("S5.py").write_text(PythonExporter().from_notebook_node(small)[0])


def test_stopped_or_killed_it_goes_on_as_if_nothing_had_happened(folder):
    """Once whole, once stopped in epoch 2 and its cell run again, once killed and resumed."""
    small = {"DATASET": "digits", "EPOCHS": 4}
    whole = papermill.execute_notebook("S5.ipynb", None, small, progress_bar=False)
    assert check_run(whole, "digits", 4) > 80
    pictures = ["curves", "confusion", "misclassified", "reliability", "prediction"]
    for name in (*(f"{name}.png" for name in pictures), "model.pt", "checkpoint.pt"):
        assert (folder / "runs" / name).stat().st_size > 1000
    epochs, expected = EPOCH.findall(stdout(whole)), weights(folder)
    checkpoint = (folder / "runs" / "checkpoint.pt").read_bytes()
    moved = f"The previous run's checkpoint is now {Path('runs', 'checkpoint.pt.bak')}\n"

    stopped = nbformat.read("S5.ipynb", as_version=4)
    (loop,) = [cell for cell in code_cells(stopped) if "for epoch in" in cell.source]
    (parameters,) = [cell for cell in code_cells(stopped) if is_parameters(cell)]
    parameters.source += '\nDATASET, EPOCHS, IMAGE = "digits", 4, "two_digits.png"'
    two_digits(folder / "two_digits.png")
    again = nbformat.from_dict({**loop, "id": "again"})
    stop = (
        "        if epoch == 2:\n            raise KeyboardInterrupt\n        test_metrics = test("
    )
    loop.source = loop.source.replace("        test_metrics = test(", stop)
    loop.metadata["tags"] = ["raises-exception"]
    stopped.cells.insert(stopped.cells.index(loop) + 1, again)
    NotebookClient(stopped, resources={"metadata": {"path": "."}}).execute()
    assert loop.outputs[-1]["traceback"] == ["Stopped in epoch 2: run this cell again to go on."]
    assert moved in stdout(stopped) and "Restored epoch 1 from" in stdout(stopped)
    assert "two_digits.png cannot be read: found several digits" in stdout(stopped)
    assert stopped.cells[-1].execution_count  # the drawing pad's cell is reached nevertheless
    assert (folder / "runs" / "checkpoint.pt.bak").read_bytes() == checkpoint
    assert EPOCH.findall(stdout(stopped)) == epochs and torch.equal(weights(folder), expected)

    export(**small)
    command = [sys.executable, "-u", "S5.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        printed = []
        for line in run.stdout:
            printed.append(line)
            if line.startswith("Epoch 2/4"):
                run.kill()
                break
    Path("S5.py").write_text(Path("S5.py").read_text().replace("RESUME = False", "RESUME = True"))
    resumed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert moved in printed and re.search(r"^Restored epoch [234] from", resumed.stdout, re.M)
    lines = EPOCH.findall("".join(printed)) + EPOCH.findall(resumed.stdout)
    assert lines[:2] == epochs[:2] and set(lines) <= set(epochs)
    assert torch.equal(weights(folder), expected)
    hyperparameters = utils.load_checkpoint(folder / "runs" / "checkpoint.pt")["hyperparameters"]
    del hyperparameters["AUGMENT"]
    assert hyperparameters == {
        **{"DATASET": "digits", "EPOCHS": 4, "SEED": 0},
        **{"BATCH_SIZE": 128, "LEARNING_RATE": 0.01},
    }


def test_exported_script_falls_back_to_digits(folder, capsys):
    export(EPOCHS=1, RESUME=True)
    with pytest.warns(UserWarning, match="'digits' INSTEAD OF MNIST"):
        runpy.run_path("S5.py")
    printed = capsys.readouterr().out
    assert re.search(r"Final test accuracy: [\d.]+ % \(digits, epoch 1\)$", printed.strip())
    assert f"There is no {Path('runs', 'checkpoint.pt')} yet: training starts with" in printed
    assert (folder / "runs" / "curves.png").is_file()


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST", "QMNIST"])
def test_other_datasets_run_from_top_to_bottom(folder, monkeypatch, capsys, name):
    monkeypatch.setattr(utils, "DIGESTS", {})  # the files are made here
    write_dataset(folder / "data", name, counts=(300, 100))
    export(DATASET=name, EPOCHS=1)
    plt.close("all")
    runpy.run_path("S5.py")
    classes = getattr(datasets, name).classes
    labels = [label.get_text() for label in plt.gca().get_xticklabels()]
    assert labels == (list("0123456789") if name == "QMNIST" else classes)
    printed = capsys.readouterr().out
    for label in classes:
        assert f"\n{label}: " in printed
    assert re.search(rf"accuracy: [\d.]+ % \({name}, epoch 1\)$", printed.strip())


def run_setup(folder, before="", **replace):
    """Run the notebook's set-up cell as a script in `folder`, after the code `before`."""
    notebook = nbformat.read(ROOT / "S5.ipynb", as_version=4)
    source = next(cell.source for cell in code_cells(notebook) if "REPO_URL" in cell.source)
    for name, value in replace.items():
        assert f'{name} = ""' in source
        source = source.replace(f'{name} = ""', f"{name} = {value!r}")
    source = f"{before}\n{source}\nimport model\nprint(Path.cwd().name)"
    return subprocess.run(
        [sys.executable, "-c", source], cwd=folder, capture_output=True, text=True
    )


def test_setup_without_the_helpers_says_what_to_do(tmp_path):
    run = run_setup(tmp_path)
    assert run.returncode == 1
    for part in ("FileNotFoundError", "model.py", "utils.py", "upload", "REPO_URL"):
        assert part in run.stderr


@pytest.mark.parametrize("chosen", [["model.py", "utils.py"], []])
def test_setup_on_colab_asks_for_the_files(tmp_path, chosen):
    stand_in = f"""
import shutil, sys, types
colab = sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.modules["google"] = types.ModuleType("google")
upload = lambda: [shutil.copy({str(ROOT)!r} + "/" + name, ".") for name in {chosen}]
colab.files = types.SimpleNamespace(upload=upload)"""
    run = run_setup(tmp_path, before=stand_in)
    assert run.stdout.startswith("Choose model.py and utils.py:\n")
    if chosen:
        assert run.returncode == 0 and run.stdout.splitlines()[-1] == tmp_path.name
    else:  # the dialog was closed
        assert (
            run.returncode == 1 and "FileNotFoundError: upload model.py and utils.py" in run.stderr
        )


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
        run = run_setup(colab, REPO_URL=str(origin))
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == "mnist" and (colab / "mnist" / "model.py").is_file()


# --- what is committed


def test_committed_notebook_is_one_clean_run_on_mnist():
    notebook = nbformat.read(ROOT / "S5.ipynb", as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert max(len(cell.source.splitlines()) for cell in cells) <= 30  # half a screen
    (loop,) = [cell for cell in cells if "for epoch in" in cell.source]
    assert len(loop.outputs) == 1  # the lines of all epochs, in one block
    assert "widgets" not in notebook.metadata
    parameters = {}
    (tagged,) = [cell for cell in cells if is_parameters(cell)]
    exec(tagged.source, parameters)
    accuracy = check_run(notebook, "MNIST", parameters["EPOCHS"])
    readme = (ROOT / "README.md").read_text()
    assert f"{accuracy:.2f} %" in readme and f"{parameters['EPOCHS']} epochs" in readme
    count = sum(parameter.numel() for parameter in Net().parameters())
    assert f"{count:,} parameters" in readme


def draw_seven(path):
    image = Image.new("L", (300, 300), "white")
    ImageDraw.Draw(image).line([(70, 70), (220, 65), (140, 240)], "black", width=14)
    image.save(path)


def test_the_committed_weights_are_those_of_the_committed_run(mnist_root, tmp_path):
    net = Net()
    net.load_state_dict(torch.load(ROOT / ".assets" / "model.pt", weights_only=True))
    test_data = utils.load_data("MNIST", mnist_root)[1]
    loader = utils.BatchLoader(test_data, 1000)
    accuracy = utils.test(net, "cpu", loader, torch.nn.functional.nll_loss).accuracy
    last = stdout(nbformat.read(ROOT / "S5.ipynb", as_version=4)).splitlines()[-1]
    assert last.startswith(f"Final test accuracy: {accuracy:.2f} % (MNIST, ")
    draw_seven(tmp_path / "seven.png")
    assert utils.predict_image(net, tmp_path / "seven.png")[0] == 7


def test_readme_examples_run(folder, capsys):
    readme = (ROOT / "README.md").read_text()
    with_weights, example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shutil.copytree(ROOT / ".assets", ".assets")
    draw_seven("photo.jpg")
    exec(with_weights, {})
    assert re.fullmatch(r"7 0\.\d+\n", capsys.readouterr().out)
    with warnings.catch_warnings(action="ignore"):  # digits instead of MNIST
        exec(example, {})
    printed = capsys.readouterr().out
    assert re.fullmatch(r"(Metrics\(loss=[\d.]+, accuracy=[\d.]+\)\n){2}", printed)
    assert float(re.findall(r"accuracy=([\d.]+)", printed)[-1]) > 80


def test_a_star_import_brings_what_is_documented():
    names = {}
    exec("from utils import *", names)
    del names["__builtins__"]
    assert names.keys() == set(utils.__all__)
    own = {
        name for name, value in vars(utils).items() if getattr(value, "__module__", "") == "utils"
    }
    assert names.keys() == {name for name in own if not name.startswith("_")}
    assert all(value.__doc__ for value in names.values())


def test_utils_does_not_import_model():
    code = "import sys, utils; sys.exit('model' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
