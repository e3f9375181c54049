"""Accuracy against training time: this repository's recipe beside two well-known ones.

    python tests/benchmark.py               # everything in full: hours on two cores
    python tests/benchmark.py --quick       # trains one epoch of the references, to estimate times

Each run is a process of its own, and the recipes take turns, so that a slow minute hits all alike.
A run trains on all 60,000 images and reads the test set once, at its end. Seconds are those of the
training loop, on a GPU with CUDA's start-up, without imports, copying the data, and evaluation.

Results are saved after each run, in runs/benchmark.json; start an interrupted benchmark again and
it continues from there. --add takes other such files: of another dataset, for rows of their own, or
of another machine, for the accuracies of recipes that are only timed here. At the end it prints a
Markdown table and draws runs/benchmark.png. The README's come from copies in .assets/.
"""

import argparse
import hashlib
import json
import platform
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from matplotlib.ticker import LogLocator
from torch.utils.data import DataLoader
from torchvision import transforms as T

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Net  # noqa: E402
from utils import BatchLoader, RandomAffine, get_device, load_data, set_seed, test, train  # noqa: E402

EPOCHS = 15  # the notebook's default
OURS = "this repository"
EXAMPLE = "PyTorch's basic example"
CLASSIC = "the classic notebook"
# The references load fastest so: of 0, 1 and 4 on an H200 with 16 cores, of 0 and 1 on two cores.
WORKERS = {"num_workers": 4, "pin_memory": True} if torch.cuda.is_available() else {}
NOTE = (  # on how to read the table
    "Accuracy is the mean ± standard deviation of the runs, training time their median. "
    "≈ is the time of one epoch times the number of epochs; – is not measured. "
    "The speedup is the time of PyTorch's basic example divided by that of the recipe."
)
NORMALIZE = T.Normalize(0.1307, 0.3081)  # MNIST's mean and standard deviation


def ours(data, device, epochs):
    """The notebook's recipe, whose scheduler steps after each batch."""
    augment = RandomAffine(degrees=7, translate=(0.07, 0.07), scale=(0.9, 1.1), shear=5)
    loader = BatchLoader(data, 128, device=device, shuffle=True, augment=augment)
    model = Net().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs * len(loader))
    return model, loader, optimizer, nn.CrossEntropyLoss(label_smoothing=0.1), scheduler


def pytorch_example(data, device, _):
    """The basic MNIST example of github.com/pytorch/examples, by its hyperparameters."""
    layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU()]
    layers += [nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(1)]
    model = nn.Sequential(*layers).to(device)
    data.transform = T.Compose([T.ToTensor(), NORMALIZE])
    loader = DataLoader(data, 64, shuffle=True, **WORKERS)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    return model, loader, optimizer, F.nll_loss, scheduler


def classic_notebook(data, device, _):
    """The notebook of this shape that courses hand out, by its hyperparameters."""
    layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 256, 3), nn.MaxPool2d(2)]
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(4096, 50), nn.ReLU(), nn.Linear(50, 10)]
    model = nn.Sequential(*layers).to(device)
    crop = T.RandomApply([T.CenterCrop(22)], p=0.1)
    rotation = T.RandomRotation((-15.0, 15.0), fill=0)
    data.transform = T.Compose([crop, T.Resize((28, 28)), rotation, T.ToTensor(), NORMALIZE])
    loader = DataLoader(data, 512, shuffle=True, **WORKERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.1)
    return model, loader, optimizer, F.cross_entropy, scheduler


# Each returns a model, loader, optimizer, criterion and scheduler.
RECIPES = {OURS: ours, EXAMPLE: pytorch_example, CLASSIC: classic_notebook}
REFERENCES = {EXAMPLE: 14, CLASSIC: 20}  # epochs; their schedulers step after each epoch


def run(name, epochs, seed, timed_epochs, dataset="MNIST"):
    """Train and test, or only estimate the seconds of all `epochs` from those of `timed_epochs`."""
    device = get_device()
    train_data, test_data = load_data(dataset)
    set_seed(seed)
    model, loader, optimizer, criterion, scheduler = RECIPES[name](train_data, device, epochs)
    options = {} if name in REFERENCES else {"scheduler": scheduler, "cuda_graph": True}
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # none from older PyTorch
    bfloat16 = name == OURS and device.type == "cpu" and capabilities.get("avx512_bf16", False)
    seconds, accuracy = 0.0, None
    for epoch in range(timed_epochs):
        set_seed(seed, epoch)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, _ = train(model, device, loader, optimizer, criterion, verbose=False, **options)
        seconds += time.perf_counter() - start
        if name in REFERENCES:
            scheduler.step()
    if timed_epochs == epochs:
        test_loader = BatchLoader(test_data, 1000, device=device)
        _, accuracy = test(model, device, test_loader, criterion, verbose=False)
    job = {"name": name, "epochs": epochs, "seed": seed, "timed_epochs": timed_epochs}
    job["bfloat16"] = bfloat16
    figures = {"train_loss": loss, "accuracy": accuracy, "seconds": seconds * epochs / timed_epochs}
    return {**job, **figures, "parameters": sum(weight.numel() for weight in model.parameters())}


def header(data):
    """Describe the data, the machine and the code: only runs that share these are compared."""
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    processor = found[1] if found else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    versions = f"Python {platform.python_version()}, {versions}"
    machine = f"{processor}, {torch.get_num_threads()} threads{gpu}; {versions}"
    code = [path.read_bytes() for path in (ROOT / "model.py", ROOT / "utils.py", Path(__file__))]
    digest = hashlib.sha256(b"".join(code)).hexdigest()[:12]
    return {"data": data, "machine": machine, "code": digest}


def summarise(results):
    """Return a row per recipe and number of epochs: median seconds, mean accuracy ± deviation."""
    groups = {}
    for result in results:
        groups.setdefault((result["name"], result["epochs"]), []).append(result)
    rows = []
    for runs in groups.values():
        timed_epochs = max(run["timed_epochs"] for run in runs)  # 0: on another machine
        timed = [run["seconds"] for run in runs if run["timed_epochs"] == timed_epochs]
        tested = [run["accuracy"] for run in runs if run["accuracy"] is not None]
        row = {key: runs[0][key] for key in ("name", "epochs", "parameters")}
        row |= {"timed_epochs": timed_epochs, "seconds": statistics.median(timed)}
        row["runs"] = len(tested or timed)
        row["accuracy"] = statistics.mean(tested) if tested else None
        row["deviation"] = statistics.stdev(tested) if len(tested) > 1 else None
        rows.append(row)
    return rows


def from_elsewhere(path, results):
    """Return the runs of another dataset or machine whose accuracies `results` does not have."""
    other = json.loads(path.read_text())
    suffix = "" if other["data"] == results["data"] else f" on {other['data']}"
    known = {(run["name"], run["epochs"]) for run in results["runs"] if run["accuracy"] is not None}
    is_here = all(other[key] == results[key] for key in ("machine", "code"))
    changes = {} if is_here else {"machine": other["machine"], "timed_epochs": 0}
    runs = [{**run, "name": run["name"] + suffix, **changes} for run in other["runs"]]
    return [run for run in runs if (run["name"], run["epochs"]) not in known]


def table(rows):
    """Return the comparison as a Markdown table, without a column of which nothing is known."""
    names = "recipe, parameters, epochs, runs, test accuracy (%), training (s), speedup".split(", ")
    lines = [names]
    example = [row["seconds"] for row in rows if row["name"] == EXAMPLE and row["timed_epochs"]]
    for row in rows:
        accuracy = "–" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
        accuracy += "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        seconds, speedup = f"{row['seconds']:,.1f}" if row["timed_epochs"] else "–", "–"
        if 0 < row["timed_epochs"] < row["epochs"]:
            seconds = f"≈ {row['seconds']:,.0f}"
        if example and row["timed_epochs"] > 0 and row["name"] in RECIPES:
            ratio = example[0] / row["seconds"]
            speedup = f"{ratio:.{1 if ratio < 10 else 0}f}"
        sizes = f"{row['parameters']:,}", str(row["epochs"]), str(row["runs"])
        lines.append([row["name"], *sizes, accuracy, seconds, speedup])
    columns = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"–"}]
    lines = [f"| {' | '.join(line)} |" for line in zip(*columns, strict=True)]
    lines.insert(1, "|---" + "|---:" * (len(columns) - 1) + "|")  # numbers to the right
    return "\n".join(lines)


def plot(rows):
    """Draw test error against training time, on a logarithmic axis, as pyplot's current figure."""
    _, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rows = [row for row in rows if row["accuracy"] is not None and row["timed_epochs"] > 0]
    for name in RECIPES:
        points = []
        for row in [each for each in rows if each["name"] == name]:
            points.append((row["seconds"], 100 - row["accuracy"], row["deviation"] or 0))
            text = f"{row['epochs']} epoch{'s' * (row['epochs'] > 1)}"
            axes.annotate(text, points[-1][:2], (5, 8), textcoords="offset points", size=8)
        if points:
            seconds, errors, deviations = zip(*sorted(points), strict=True)
            axes.errorbar(seconds, errors, deviations, fmt="o-", capsize=3, label=name)
    axes.set(xscale="log", xlabel="training time (s)", ylabel="test error (%)", ylim=(0, None))
    axes.set_title("Test error against training time: mean ± standard deviation of the runs")
    axes.margins(0.2)  # room for the labels
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def measure(jobs, data, path):
    """Do the jobs (the first four arguments of `run`) that the file at `path` has no result of."""
    results = {**header(data), "runs": []}
    if path.exists():
        results = json.loads(path.read_text())
        if results | header(data) != results:
            sys.exit(f"{path} is of other data, other code or another machine: move it away")
    keys = ("name", "epochs", "seed", "timed_epochs")
    done = {tuple(result[key] for key in keys) for result in results["runs"]}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for job in (job for job in jobs if job not in done):
            result = pool.submit(run, *job, data).result()
            results["runs"].append(result)
            path.write_text(json.dumps(results, indent=1) + "\n")
            reached = "" if result["accuracy"] is None else f"{result['accuracy']:.2f} %, "
            reached += f"{result['seconds']:.1f} s{' in bfloat16' if result['bfloat16'] else ''}"
            print(f"{job[0]}, {job[1]} epochs, seed {job[2]}: {reached}")
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one epoch of each reference")
    parser.add_argument("--runs", type=int, default=5, help="runs of our recipe")
    parser.add_argument("--reference-runs", type=int, default=1, help="runs of each reference")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, EPOCHS], help="of our recipe")
    parser.add_argument("--data", default="MNIST", choices=("MNIST", "FashionMNIST", "digits"))
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="benchmark.json, see above")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs", help="for the results")
    args = parser.parse_args()
    jobs = [(OURS, epochs, seed, epochs) for seed in range(args.runs) for epochs in args.epochs]
    for name, epochs in REFERENCES.items():
        timed_epochs = 1 if args.quick else epochs
        jobs += [(name, epochs, seed, timed_epochs) for seed in range(args.reference_runs)]
    jobs.sort(key=lambda job: job[2])  # by seed, so that the recipes take turns
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "benchmark.json"
    results = measure(jobs, args.data, path)
    for other in args.add:
        results["runs"] += from_elsewhere(other, results)
    path.write_text(json.dumps(results, indent=1) + "\n")
    rows = summarise(results["runs"])
    print(f"\n{table(rows)}\n\n{NOTE}\n\n{args.data}, on {results['machine']}.")
    for machine in {run["machine"] for run in results["runs"] if "machine" in run}:
        print(f"Accuracies without a time, or with an estimated one, are from {machine}.")
    plot(rows)
    plt.savefig(path.with_suffix(".png"), dpi=200)


if __name__ == "__main__":
    main()
