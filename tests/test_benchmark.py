import json
import re
import runpy
import sys
from pathlib import Path

import benchmark
import pytest
from benchmark import CLASSIC, EXAMPLE, OURS
from conftest import EPOCH, ROOT, export

from model import Net


def result(name, accuracy, seconds, **others):
    usual = {"epochs": 14, "seed": 0, "timed_epochs": 14, "parameters": 1234}
    return {"name": name, "accuracy": accuracy, "seconds": seconds, **usual, **others}


@pytest.mark.slow
@pytest.mark.parametrize("reported", [{"avx512_bf16": True}, {}])
def test_trains_what_the_notebook_trains(folder, monkeypatch, capsys, reported):
    monkeypatch.setattr(benchmark.torch.cpu, "get_capabilities", lambda: reported, raising=False)
    bfloat16 = bool(reported) and benchmark.get_device().type == "cpu"
    export(DATASET="digits", EPOCHS=2, SEED=3)
    assert f"\nEPOCHS = {benchmark.EPOCHS}  #" in Path("S5.py").read_text()
    runpy.run_path("S5.py")
    *_, loss, _, _, accuracy = EPOCH.findall(printed := capsys.readouterr().out)[-1]
    run = benchmark.run(OURS, 2, 3, 2, "digits")
    assert (f"{run['train_loss']:.4f}", f"{run['accuracy']:.2f}") == (loss, accuracy)
    assert run["bfloat16"] == bfloat16 == (", autocast to bfloat16\n" in printed)


@pytest.mark.slow
def test_interrupted_quick_benchmark_continues_and_prints_a_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "benchmark.json"
    classic = result(CLASSIC, None, 9.0, epochs=20, timed_epochs=1)
    done = [result(EXAMPLE, None, 1234.5, timed_epochs=1), classic]
    path.write_text(json.dumps({**benchmark.header("digits"), "runs": done}))
    options = ["--data", "digits", "--epochs", "1", "--runs", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", *options])
    benchmark.main()
    printed = capsys.readouterr().out
    assert printed.count(", seed 0: ") == 1
    row = rf"\n\| {OURS} \| 105,114 \| 1 \| 1 \| [\d.]+ \| [\d.]+ \| [\d,.]+ \|\n"
    assert re.search(row, printed) and f"\n| {CLASSIC} | 1,234 | 20 | 1 | – | ≈ 9 |" in printed
    assert f"\n| {EXAMPLE} | 1,234 | 14 | 1 | – | ≈ 1,234 | 1.0 |\n" in printed
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    results = json.loads(path.read_text())
    assert len(results["runs"]) == 3
    path.write_text(json.dumps({**results, "machine": "another"}))
    with pytest.raises(SystemExit, match="another machine"):
        benchmark.main()


def test_table_has_spread_and_ratio_and_accuracies_of_another_machine(tmp_path):
    runs = [result(OURS, 99.0, 1.0), result(OURS, 99.2, 3.0, seed=1)]
    runs += [result(EXAMPLE, None, 100.0, timed_epochs=1)]
    results = {"data": "MNIST", "machine": "here", "code": "this", "runs": runs}
    for data, machine, runs in (
        ("MNIST", "a GPU", [result(EXAMPLE, 98.0, 9.0), result(EXAMPLE, 98.2, 9.0, seed=1)]),
        ("FashionMNIST", "here", [result(OURS, 92.0, 9.0)]),
        ("KMNIST", "a GPU", [result(OURS, 91.0, 9.0)]),
        ("MNIST", "a GPU", [result(OURS, 50.0, 9.0)]),  # not needed: measured here
    ):
        path = tmp_path / "other.json"
        path.write_text(json.dumps({**results, "data": data, "machine": machine, "runs": runs}))
        results["runs"] += benchmark.from_elsewhere(path, results)
    rows = benchmark.summarise(results["runs"])
    _, rule, *lines = benchmark.table(rows).splitlines()
    assert rule == "|---" + 6 * "|---:" + "|" and "speedup" not in benchmark.table(rows[:1])
    assert [line.split(" | ", 3)[3] for line in lines] == [
        "2 | 99.10 ± 0.14 | 2.0 | 50 |",
        "2 | 98.10 ± 0.14 | ≈ 100 | 1.0 |",
        "1 | 92.00 | 9.0 | – |",
        "1 | 91.00 | – | – |",
    ]
    benchmark.plot(rows)
    assert len(benchmark.plt.gca().containers) == 2  # a time of another machine is not drawn


def test_readme_shows_the_committed_benchmark():
    count = len(benchmark.nn.utils.parameters_to_vector(Net().parameters()))  # can be flattened
    readme = (ROOT / "README.md").read_text()
    assert all(f"{count:,} parameters" in text for text in (readme, Net.__doc__))
    assert benchmark.NOTE in readme
    for name, claim in ("", "{:.0f} s on two cores"), ("_gpu", "{:.1f} s on an NVIDIA H200"):
        results = json.loads((ROOT / ".assets" / f"benchmark{name}.json").read_text())
        rows = benchmark.summarise(results["runs"])
        assert benchmark.table(rows) in readme and results["machine"] in readme
        ours = {row["epochs"]: row for row in rows if row["name"] == OURS}
        assert ours[1]["parameters"] == ours[benchmark.EPOCHS]["parameters"] == count
        assert claim.format(ours[benchmark.EPOCHS]["seconds"]) in readme
