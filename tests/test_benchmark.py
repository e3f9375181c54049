import json
import re
import subprocess
import sys

import benchmark
import papermill
import pytest
from conftest import ROOT
from test_notebook import EPOCH, code_cells, stdout


def result(name, accuracy, seconds, seed=0, epochs=14, timed_epochs=14):
    return {
        **{"name": name, "accuracy": accuracy, "seconds": seconds, "seed": seed},
        **{"epochs": epochs, "timed_epochs": timed_epochs, "images_per_second": 1000.0},
        **{"peak_mib": 600.0, "parameters": 1234, "share": 0.5},
    }


def test_trains_what_the_notebook_trains(folder):
    notebook = papermill.execute_notebook(
        "S5.ipynb", None, {"DATASET": "digits", "EPOCHS": 2, "SEED": 3}, progress_bar=False
    )
    (tagged,) = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", [])]
    assert re.search(rf"^EPOCHS = {benchmark.EPOCHS}\b", tagged.source, re.MULTILINE)
    *_, loss, _, _, accuracy = EPOCH.findall(stdout(notebook))[-1]
    run = benchmark.run("ours", 2, 3, 2, "digits")
    assert (f"{run['train_loss']:.4f}", f"{run['accuracy']:.2f}") == (loss, accuracy)


def test_references_are_of_the_published_size():
    data, _ = benchmark.load_data("digits")
    sizes = {benchmark.pytorch_example: 1_199_882, benchmark.classic_notebook: 593_200}
    for make, size in sizes.items():
        model, loader, *_ = make(data, "cpu")
        assert sum(parameter.numel() for parameter in model.parameters()) == size
        images, _ = next(iter(loader))
        assert images.shape[1:] == (1, 28, 28) and model(images).shape == (len(images), 10)


def test_quick_benchmark_prints_a_table_and_goes_on_where_it_stopped(tmp_path):
    options = ["--quick", "--data", "digits", "--epochs", "1", "--folder", str(tmp_path)]
    command = [sys.executable, ROOT / "tests" / "benchmark.py", *options]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    for name, accuracy in (
        ("this repository, 1 epoch", r"[\d.]+ \| 1"),
        (benchmark.EXAMPLE, "not measured | 0"),
        (benchmark.CLASSIC, "not measured | 0"),
    ):
        assert re.search(rf"^\| {name} \|.*\| {accuracy} \|", first.stdout, re.MULTILINE)
    assert "(from 1 of its epochs)" in first.stdout
    assert (tmp_path / "benchmark.png").stat().st_size > 1000

    path = tmp_path / "benchmark.json"
    results = json.loads(path.read_text())
    assert len(results["runs"]) == 3
    del results["runs"][0]
    path.write_text(json.dumps(results))
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count(", seed 0: ") == 1

    path.write_text(json.dumps({**results, "machine": "another"}))
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode != 0 and "another" in other.stderr


def test_table_has_spread_and_ratio():
    results = [
        result("ours", 99.0, 1.0),
        result("ours", 99.2, 3.0, seed=1),
        result(benchmark.EXAMPLE, None, 100.0, timed_epochs=1),
    ]
    ours, example = benchmark.table(benchmark.summarise(results)).splitlines()[2:]
    assert "| 99.10 ± 0.14 | 2 | 2.0 |" in ours and "| 50.0 × |" in ours
    assert "| not measured | 0 | 100.0 (from 1 of its epochs) |" in example


def test_readme_shows_the_committed_benchmark():
    results = json.loads((ROOT / ".assets" / "benchmark.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert benchmark.table(benchmark.summarise(results["runs"])) in readme
    assert results["machine"] in readme


def test_matmul_rate_and_multiply_adds():
    assert benchmark.matmul_rate("cpu", size=64, repeats=3) > 0
    model = benchmark.nn.Linear(20, 10)
    batch = benchmark.torch.randn(8, 20), benchmark.torch.arange(8)
    forward, step = benchmark.multiply_adds(model, [batch], benchmark.F.cross_entropy, "cpu")
    assert forward == 200 and step == pytest.approx(400)  # the input needs no gradient
