import asyncio
import base64
import copy
import io
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import EPOCH, ROOT, export, find_cell
from handwriting import SEVEN, sheet
from jupyter_client.manager import run_kernel
from nbclient import NotebookClient

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
    assert [line[:2] for line in lines] == [(f"{n}", f"{epochs}") for n in range(1, epochs + 1)]
    accuracy = lines[-1][-1]
    result, interval, sentence = printed.splitlines()[-3:]
    assert result == f"Final test accuracy: {accuracy} % ({dataset}, epoch {epochs})"
    assert re.fullmatch(r"95 % interval \(Wilson\): [\d.]+ to [\d.]+ %", interval)
    assert sentence == "Drawing pad: run all cells in Jupyter or Colab to draw a digit here."
    for cell in code_cells(notebook):
        others = [each for each in cell.outputs if "image/png" not in each.get("data", {})]
        assert len(cell.outputs) - len(others) == cell.source.count("plt.savefig")
        assert all(each.get("name") == "stdout" for each in others)  # no error, warning or bar
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


class StoppableClient(NotebookClient):
    """Once `armed`, it interrupts the kernel when an epoch's line is printed."""

    armed = False

    def process_message(self, message, cell, index):
        if self.armed and re.search(r"Epoch +\d", str(message["content"])):
            self.armed = False
            asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(message, cell, index)


@pytest.mark.slow
def test_a_stopped_and_resumed_run_prints_and_saves_the_same(folder, monkeypatch):
    """Train; train again in the same kernel, stop it twice, and resume in another process."""
    import papermill

    monkeypatch.setenv("HOME", str(folder))
    sheet(SEVEN, 14, 300).save("seven.png")
    small = {"DATASET": "digits", "EPOCHS": 8, "RUNS": "~/runs", "IMAGE": "~/seven.png"}
    notebook = papermill.execute_notebook("S5.ipynb", None, small, prepare_only=True)
    names = "DATASET = ", "utils.set_seed(SEED)\n", "for epoch in", "ConfusionMatrixDisplay."
    first, state, loop, confusion = (find_cell(notebook, name) for name in names)
    cells = notebook.cells
    client = StoppableClient(notebook, resources={"metadata": {"path": "."}}, allow_errors=True)
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        whole, expected = copy.deepcopy(notebook), weights()
        assert check_run(whole, "digits", 8) > 90
        assert len(list(Path("runs").glob("*.png"))) == 7
        client.execute_cell(cells[loop], loop)  # again, although the run is complete
        assert cells[loop].outputs[0].text.startswith("8 of 8 epochs already complete: test acc")
        for size in (64, 128):  # from Training on, and back
            cells[first].source = f"BATCH_SIZE = {size}"
            for index in (first, state, state + 1):
                client.execute_cell(cells[index], index)
            checkpoint = torch.load("runs/checkpoint.pt")
            assert checkpoint["hyperparameters"]["BATCH_SIZE"] == size
            assert checkpoint["scheduler"]["total_steps"] == 8 * math.ceil(1437 / size)
        for index in [*range(first, loop + 1), loop]:
            client.armed = index == loop
            client.execute_cell(cells[index], index)
            if index == loop:
                error = cells[loop].outputs[-1]
                assert error.ename == "KeyboardInterrupt" and "run this cell again" in error.evalue
                assert len("\n".join(error.traceback).splitlines()) < 15
        client.execute_cell(cells[confusion], confusion)  # shows nothing of the first run
        assert [o.evalue for o in cells[confusion].outputs] == ["name 'predictions' is not defined"]
    printed = "".join(output.get("text", "") for output in cells[loop].outputs)
    epochs, lines = EPOCH.findall(stdout(whole)), EPOCH.findall(printed)
    done = epochs.index(lines[0])
    assert done > 0 and lines == epochs[done : done + len(lines)]
    assert f"{done} of 8 epochs already complete: test accuracy" in printed
    export(**small, RESUME=True)
    resumed = subprocess.run([sys.executable, "S5.py"], capture_output=True, text=True, check=True)
    rest = EPOCH.findall(resumed.stdout)
    assert 0 < len(rest) <= 8 - done - len(lines) and rest == epochs[-len(rest) :]
    assert torch.equal(weights(), expected)


def test_resume_as_a_word_is_refused(folder):
    export(DATASET="digits", RESUME="no")  # as papermill passes it
    with pytest.raises(ValueError, match="RESUME is True or False, not 'no'"):
        runpy.run_path("S5.py")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_setup_clones_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = code_cells(nbformat.read(ROOT / "S5.ipynb", as_version=4))[0].source
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert run.returncode > 0 and "start in the folder of model.py and utils.py" in run.stderr
    source = source.replace('REPO_URL = ""', f'REPO_URL = "{ROOT}"')
    for _ in range(2):  # the second time as after a restart of the kernel
        subprocess.run([sys.executable, "-c", source], check=True)
    assert (tmp_path / "mnist" / "S5.ipynb").exists()


def test_committed_notebook_is_one_clean_run_on_mnist():
    notebook = nbformat.read(ROOT / "S5.ipynb", as_version=4)
    cells, loop = code_cells(notebook), notebook.cells[find_cell(notebook, "for epoch in")]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
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


@pytest.mark.filterwarnings("ignore:USING THE SMALL SET 'digits'")
def test_readme_examples_run(folder, capsys):
    readme = (ROOT / "README.md").read_text()
    with_weights, example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shutil.copytree(ROOT / ".assets", ".assets")
    sheet(SEVEN, 14, 300).save("photo.jpg")
    exec(with_weights, {})
    assert re.fullmatch(r"7 0\.\d+\n", capsys.readouterr().out)
    exec(example, {})
    printed = capsys.readouterr().out
    assert printed.count("train: ") == 2 and re.search(r"accuracy ([89]\d|100)\.\d+ %\n$", printed)


def test_utils_does_not_import_model():
    assert not re.search(r"(?m)^ *(import|from) model\b", (ROOT / "utils.py").read_text())


def draw(strokes):
    """Return code that sets the pad's drawing as a browser does: to a PNG, as a data URL."""
    buffer = io.BytesIO()
    sheet(strokes, 7, 320).convert("RGBA").save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    return f"pad.children[0].drawing = 'data:image/png;base64,{png}'"


@pytest.mark.slow
def test_the_pad_answers_with_a_picture_or_says_why_it_does_not():
    set_up = "import utils", "from model import Net", "model = Net().train()"
    show_pad = "pad = utils.drawing_pad(model, list('0123456789'))", "pad"
    drawings = draw(SEVEN), draw([]), "pad.children[0].drawing = ''"  # as *Clear* does
    messages, shown, texts, waits, captured_by = [], [], [], [], ""
    options = {"allow_stdin": True, "timeout": 120, "output_hook": messages.append}  # as if open
    with run_kernel(cwd=ROOT) as client:  # nbclient sometimes waits forever for a widget's output
        for code in (*set_up, *show_pad, *drawings, "assert model.training"):
            assert client.execute_interactive(code, **options)["content"]["status"] == "ok"
    for content in (message["content"] for message in messages):
        data = content.get("data", {})
        captured_by = data.get("state", {}).get("msg_id", captured_by)
        texts += [data["content"]] if data.get("method") == "custom" else []  # drawing and answer
        waits += [content["wait"]] if "wait" in content else []  # False: cleared at once
        shown += [captured_by != "" for kind in data if "image/png" in kind or "view+json" in kind]
    assert shown == [False, True]  # the widget and, captured to appear below it, the picture
    assert all(f"'{url}'" in code for (url, _), code in zip(texts, drawings, strict=True))
    (_, digit), (_, refusal), (_, nothing) = texts
    assert re.fullmatch(r"\d, \d+ %", digit) and refusal.startswith("found no digit")
    assert nothing == "" and waits == [True, True, False, True, False]
