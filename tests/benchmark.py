"""Accuracy against training time: this repository's recipe beside the two most often cloned ones.

    python tests/benchmark.py            # everything in full: hours on two cores
    python tests/benchmark.py --quick    # times one epoch of each reference, and says so

Each run is a process of its own, and the recipes take turns, so that all of them meet the machine's
good and bad minutes. A run trains on all 60,000 images and reads the test set once, at its end.
Seconds are those of feeding and training, without imports, decoding and evaluation. After each run
the results are in runs/benchmark.json; a benchmark that was cut off goes on from there. At the end
come a Markdown table on the screen and runs/benchmark.png.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Net  # noqa: E402
from utils import BatchLoader, RandomAffine, get_device, load_data, set_seed, test, train  # noqa: E402

EPOCHS = 15  # the notebook's default
EXAMPLE, CLASSIC = "PyTorch's basic example", "the classic notebook"
REFERENCES = {EXAMPLE: 14, CLASSIC: 20}  # epochs
KEY = ("name", "epochs", "seed", "timed_epochs")  # what tells one run from another


def ours(data, device, seed, epochs):
    """The notebook's recipe; a test holds the two together."""
    augment = RandomAffine(degrees=7, translate=(0.07, 0.07), scale=(0.9, 1.1), shear=5)
    loader = BatchLoader(data, 128, device=device, shuffle=True, augment=augment, seed=seed)
    model = Net(len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    per_step = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.01, total_steps=epochs * len(loader)
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    return model, loader, optimizer, criterion, per_step, None


def pytorch_example(data, device):
    """The basic MNIST example of github.com/pytorch/examples, by its hyperparameters."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(1)),
    ).to(device)
    data.transform = T.Compose([T.ToTensor(), T.Normalize(0.1307, 0.3081)])
    loader = DataLoader(data, 64, shuffle=True)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    per_epoch = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    return model, loader, optimizer, F.nll_loss, None, per_epoch


def classic_notebook(data, device):
    """The notebook of this name and shape that courses hand out, by its hyperparameters."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 256, 3), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4096, 50), nn.ReLU(), nn.Linear(50, 10)),
    ).to(device)
    data.transform = T.Compose(
        [
            T.RandomApply([T.CenterCrop(22)], p=0.1),
            *(T.Resize((28, 28)), T.RandomRotation((-15.0, 15.0), fill=0)),
            *(T.ToTensor(), T.Normalize(0.1307, 0.3081)),
        ]
    )
    loader = DataLoader(data, 512, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    per_epoch = torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.1)
    return model, loader, optimizer, F.cross_entropy, None, per_epoch


def run(name, epochs, seed, timed_epochs, dataset="MNIST"):
    """Train once, for `timed_epochs` of the recipe's `epochs`, and return the figures."""
    device = get_device()
    train_data, test_data = load_data(dataset)
    set_seed(seed)
    if name == EXAMPLE:
        parts = pytorch_example(train_data, device)
    elif name == CLASSIC:
        parts = classic_notebook(train_data, device)
    else:
        parts = ours(train_data, device, seed, epochs)
    model, loader, optimizer, criterion, per_step, per_epoch = parts
    seconds = 0.0
    for _ in range(timed_epochs):
        start = time.perf_counter()
        trained = train(
            model, device, loader, optimizer, criterion, scheduler=per_step, progress=False
        )
        seconds += time.perf_counter() - start
        if per_epoch:
            per_epoch.step()
    accuracy = None
    if timed_epochs == epochs:
        test_loader = BatchLoader(test_data, 1000, device=device)
        accuracy = test(model, device, test_loader, criterion, progress=False).accuracy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward, step = multiply_adds(model, loader, criterion, device)
    speed = timed_epochs * len(train_data) / seconds
    return {
        "name": name,
        "epochs": epochs,
        "seed": seed,
        "timed_epochs": timed_epochs,
        "train_loss": trained.loss,
        "accuracy": accuracy,
        "seconds": seconds * epochs / timed_epochs,
        "images_per_second": speed,
        "peak_mib": peak / 2**20 if sys.platform == "darwin" else peak / 2**10,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds_per_image": forward,
        "share": step * speed / matmul_rate(device),  # of the machine's float32 matrix rate
    }


def multiply_adds(model, loader, criterion, device):
    """Count the multiply-adds per image, of the forward pass and of a whole training step."""
    images, labels = (tensor.to(device) for tensor in next(iter(loader)))
    with FlopCounterMode(display=False) as forward:
        loss = criterion(model(images), labels)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counts = forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
    return [round(flops / 2 / len(images)) for flops in counts]


def matmul_rate(device, size=2048, repeats=10):
    """Measure float32 matrix products: multiply-adds per second, the median."""
    matrix = torch.randn(size, size, device=device)
    rates = []
    for _ in range(repeats + 3):  # the first three warm up
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        rates.append(size**3 / (time.perf_counter() - start))
    return statistics.median(rates[3:])


def machine():
    """Say on what the benchmark ran."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = next(iter(named), processor)
    device = get_device()
    gpu = f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
    return (
        f"{processor}, {torch.get_num_threads()} threads{gpu}; "
        f"Python {platform.python_version()}, {packages}"
    )


def summarise(results):
    """Return a row per recipe: figures as medians, and the accuracies of all its runs."""
    groups = {}
    for result in results:
        groups.setdefault((result["name"], result["timed_epochs"]), []).append(result)
    rows = []
    for runs in groups.values():

        def median(key, runs=runs):
            return statistics.median(run[key] for run in runs)

        row = {key: median(key) for key in ("seconds", "images_per_second", "peak_mib", "share")}
        row |= {key: runs[0][key] for key in ("name", "epochs", "timed_epochs", "parameters")}
        row["accuracies"] = [run["accuracy"] for run in runs if run["accuracy"] is not None]
        rows.append(row)
    return rows


def spread(values):
    """Return mean and standard deviation; of one value, the latter is 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(rows):
    """Return the rows as a Markdown table, with the times as ratios to PyTorch's example."""
    examples = [(row["timed_epochs"], row["seconds"]) for row in rows if row["name"] == EXAMPLE]
    _, example = max(examples, default=(0, None))  # the one that was timed the longest
    lines = [
        "| recipe | parameters | epochs | test accuracy (%) | runs | training (s) | images/s "
        "| peak memory (MiB) | faster than the example |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = "not measured"
        if row["accuracies"]:
            mean, deviation = spread(row["accuracies"])
            accuracy = f"{mean:.2f}"
            if len(row["accuracies"]) > 1:
                accuracy += f" ± {deviation:.2f}"
        seconds = f"{row['seconds']:.1f}"
        if row["timed_epochs"] < row["epochs"]:
            seconds += f" (from {row['timed_epochs']} of its epochs)"
        ratio = f"{example / row['seconds']:.1f} ×" if example else "not measured"
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['epochs']} | {accuracy} "
            f"| {len(row['accuracies'])} | {seconds} | {row['images_per_second']:,.0f} "
            f"| {row['peak_mib']:,.0f} | {ratio} |"
        )
    return "\n".join(lines)


def plot(rows):
    """Plot test error against training time, both logarithmic, and return the `Figure`."""
    fig, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rows = [row for row in rows if row["accuracies"]]
    for label, style, chosen in (
        ("this repository", "o-", [row for row in rows if row["name"] not in REFERENCES]),
        *((name, "s", [row for row in rows if row["name"] == name]) for name in REFERENCES),
    ):
        chosen = sorted(chosen, key=lambda row: row["seconds"])
        if not chosen:
            continue
        seconds = [row["seconds"] for row in chosen]
        means, deviations = zip(*(spread(row["accuracies"]) for row in chosen), strict=True)
        errors = [100 - mean for mean in means]
        axes.errorbar(seconds, errors, deviations, fmt=style, capsize=3, label=label)
        for row, x, y in zip(chosen, seconds, errors, strict=True):
            text = f"{row['epochs']} epoch{'s' * (row['epochs'] > 1)}"
            axes.annotate(text, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="training time (s)", ylabel="test error (%)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    plt.close(fig)
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="time one epoch of each reference")
    parser.add_argument("--runs", type=int, default=5, help="seeds of each of our recipes")
    parser.add_argument("--reference-runs", type=int, default=1, help="seeds of each reference")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, EPOCHS], help="our budgets")
    parser.add_argument("--data", default="MNIST", help="another dataset, to try the benchmark")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs", help="for what it writes")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)  # one run, in its own process
    args = parser.parse_args()
    if args.run:
        name, *numbers = args.run
        print(json.dumps(run(name, *map(int, numbers), args.data)))
        return

    args.folder.mkdir(exist_ok=True)
    path = args.folder / "benchmark.json"
    results = {"machine": machine(), "data": args.data, "runs": []}
    if path.exists():
        here, results = results, json.loads(path.read_text())
        if any(results[key] != here[key] for key in ("machine", "data")):
            sys.exit(f"{path} holds other runs ({results['machine']}; {results['data']}): move it")
    jobs = []
    for seed in range(max(args.runs, args.reference_runs)):
        if seed < args.runs:
            plural = {n: "epochs" if n > 1 else "epoch" for n in args.epochs}
            jobs += [(f"this repository, {n} {plural[n]}", n, seed, n) for n in args.epochs]
        if seed < args.reference_runs:
            jobs += [(name, n, seed, 1 if args.quick else n) for name, n in REFERENCES.items()]
    for job in jobs:
        if any(job == tuple(run[key] for key in KEY) for run in results["runs"]):
            continue
        command = [sys.executable, __file__, "--data", args.data, "--run", *map(str, job)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(answer.stdout)
        results["runs"].append(result)
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(unfinished, path)
        reached = "" if result["accuracy"] is None else f"{result['accuracy']:.2f} %, "
        print(f"{result['name']}, seed {result['seed']}: {reached}{result['seconds']:.1f} s")

    rows = summarise(results["runs"])
    print(f"\n{table(rows)}\n\n{args.data}, on {results['machine']}.")
    for row in rows:
        print(f"{row['name']}: {100 * row['share']:.0f} % of the machine's float32 matrix rate")
    plot(rows).savefig(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
