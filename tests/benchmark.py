"""Accuracy against training time: this repository's recipe beside two well-known ones.

    python tests/benchmark.py               # everything in full: hours on two cores
    python tests/benchmark.py --quick       # times one epoch of the references, and says so
    python tests/benchmark.py --ablation    # what each ingredient buys, on held-out images

Each run is a process of its own, and in each round of seeds the recipes take turns, so that all of
them meet the machine's good and bad minutes. A run of the comparison trains on all 60,000 images
and reads the test set once, at its end; the ablation never reads it. Seconds are those of feeding
and training, without imports, decoding and evaluation; memory is that of the process up to then.

After each run the results are in runs/benchmark.json (or runs/ablation.json), and a benchmark that
was cut off goes on from there. At the end it prints a Markdown table and draws runs/benchmark.png.
What the README shows is copied from there to .assets/.
"""

import argparse
import hashlib
import inspect
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
from matplotlib.ticker import LogLocator, NullFormatter
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Net  # noqa: E402
from utils import BatchLoader, RandomAffine, get_device, load_data, set_seed, test, train  # noqa: E402

EPOCHS = 15  # the notebook's default
OURS = "this repository"
EXAMPLE = "PyTorch's basic example"
CLASSIC = "the classic notebook"
KEY = ("name", "epochs", "seed", "timed_epochs")  # what tells one run from another

AUGMENT = RandomAffine(degrees=7, translate=(0.07, 0.07), scale=(0.9, 1.1), shear=5)
STRONGER = RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.85, 1.15), shear=10)
RECIPE = "the recipe"
ABLATION_EPOCHS = 4
ABLATION = {
    RECIPE: {},
    "no augmentation": {"augment": None},
    "stronger augmentation": {"augment": STRONGER},
    "no label smoothing": {"label_smoothing": 0.0},
    "no batch norm": {"batch_norm": False},
    "constant learning rate 0.001": {"learning_rate": 0.001, "one_cycle": False},
    "peak learning rate 0.02": {"learning_rate": 0.02},
    "batches of 64": {"batch_size": 64},
    "AdamW not fused": {"fused": False},
    "not channels_last": {"channels_last": False},
}


# --- recipes: model, loader, optimizer, criterion, scheduler per step and scheduler per epoch


def ours(
    data,
    device,
    seed,
    epochs,
    *,
    augment=AUGMENT,
    batch_norm=True,
    batch_size=128,
    channels_last=True,
    fused=True,
    label_smoothing=0.1,
    learning_rate=0.01,
    one_cycle=True,
):
    """The notebook's recipe, to which a test holds it, or a change of it."""
    loader = BatchLoader(data, batch_size, device=device, shuffle=True, augment=augment, seed=seed)
    model = Net()
    if not batch_norm:
        model.norm1 = model.norm2 = model.norm3 = nn.Identity()
        for conv in (model.conv1, model.conv2, model.conv3):
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    if not channels_last:
        model.to(memory_format=torch.contiguous_format)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=fused)
    per_step = None
    if one_cycle:
        per_step = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=learning_rate, total_steps=epochs * len(loader)
        )
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
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
    """The notebook of this shape that courses hand out, by its hyperparameters."""
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


REFERENCES = {EXAMPLE: (pytorch_example, 14), CLASSIC: (classic_notebook, 20)}  # epochs


# --- one run


def hold_out(data, seed):
    """Split (rest, held out): of MNIST's 60,000 images 5,000 are held out, others for each seed."""
    count = len(data) // 12
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).roll(
        -count * seed
    )
    return Subset(data, order[count:]), Subset(data, order[:count])


def run(name, epochs, seed, timed_epochs, dataset="MNIST"):
    """Train once, for `timed_epochs` of the recipe's `epochs`, and return the figures."""
    device = get_device()
    train_data, test_data = load_data(dataset)
    if name in ABLATION:
        train_data, test_data = hold_out(train_data, seed)
    set_seed(seed)
    if name in REFERENCES:
        parts = REFERENCES[name][0](train_data, device)
    else:
        parts = ours(train_data, device, seed, epochs, **ABLATION.get(name, {}))
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    accuracy = None
    if timed_epochs == epochs:
        test_loader = BatchLoader(test_data, 1000, device=device)
        accuracy = test(model, device, test_loader, criterion, progress=False).accuracy
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
        "multiply_adds": forward,  # per image
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


def matmul_rate(device, size=1024, repeats=20):
    """Measure float32 matrix products: multiply-adds per second, the median."""
    matrix = torch.randn(size, size, device=device)
    rates = []
    for _ in range(repeats + 5):  # the first five warm up
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        rates.append(size**3 / (time.perf_counter() - start))
    return statistics.median(rates[5:])


# --- all runs


def header(data):
    """Say what was measured, and on what: runs are kept together only where this is the same."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = next(iter(named), processor)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
    code = [(ROOT / name).read_text() for name in ("model.py", "utils.py")]
    code += [inspect.getsource(recipe) for recipe in (ours, pytorch_example, classic_notebook)]
    code += [str(vars(AUGMENT)), str(vars(STRONGER)), *ABLATION]
    return {
        "data": data,
        "machine": f"{processor}, {torch.get_num_threads()} threads{gpu}; "
        f"Python {platform.python_version()}, {packages}",
        "code": hashlib.sha256("".join(code).encode()).hexdigest()[:12],
    }


def summarise(results):
    """Return a row per recipe: medians of its figures, and the accuracies of all its runs."""
    groups = {}
    for result in results:
        key = result["name"], result["epochs"], result["timed_epochs"]
        groups.setdefault(key, []).append(result)
    rows = []
    same = ("name", "epochs", "timed_epochs", "parameters", "multiply_adds")
    for runs in groups.values():
        row = {key: runs[0][key] for key in same}
        for key in ("seconds", "images_per_second", "peak_mib", "share"):
            row[key] = statistics.median(run[key] for run in runs)
        row["runs"] = len(runs)
        row["accuracies"] = {
            run["seed"]: run["accuracy"] for run in runs if run["accuracy"] is not None
        }
        rows.append(row)
    return rows


def mean_and_deviation(values, form="{:.2f}"):
    """Return "mean ± standard deviation", or the mean alone where there is one value."""
    text = form.format(statistics.mean(values))
    return f"{text} ± {statistics.stdev(values):.2f}" if len(values) > 1 else text


def table(rows):
    """Return the comparison as a Markdown table, with the times as ratios to PyTorch's example."""
    examples = [(row["timed_epochs"], row["seconds"]) for row in rows if row["name"] == EXAMPLE]
    _, example = max(examples, default=(0, None))  # the one that was timed the longest
    lines = [
        "| recipe | parameters | epochs | runs | test accuracy (%) | training (s, median) "
        "| images/s | peak memory (MiB) | the example's time ÷ this |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracies = list(row["accuracies"].values())
        accuracy = mean_and_deviation(accuracies) if accuracies else "not measured"
        seconds = f"{row['seconds']:,.1f}"
        if row["timed_epochs"] < row["epochs"]:
            seconds += f" (from {row['timed_epochs']} of its epochs)"
        ratio = f"{example / row['seconds']:.1f}" if example else "not measured"
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['epochs']} | {row['runs']} "
            f"| {accuracy} | {seconds} | {row['images_per_second']:,.0f} "
            f"| {row['peak_mib']:,.0f} | {ratio} |"
        )
    return "\n".join(lines)


def ablation_table(rows):
    """Return the errors on held-out images as a Markdown table, beside those of the recipe.

    The differences are taken seed by seed, since both then saw and held out the same images.
    """
    recipe = next(row for row in rows if row["name"] == RECIPE)
    lines = [
        f"| {ABLATION_EPOCHS} epochs | validation error (%) | difference | runs | training time |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        errors = [100 - accuracy for accuracy in row["accuracies"].values()]
        differences = [
            recipe["accuracies"][seed] - accuracy
            for seed, accuracy in row["accuracies"].items()
            if seed in recipe["accuracies"]
        ]
        lines.append(
            f"| {row['name']} | {mean_and_deviation(errors)} "
            f"| {'' if row is recipe else mean_and_deviation(differences, '{:+.2f}')} "
            f"| {row['runs']} | {row['seconds'] / recipe['seconds']:.2f} × |"
        )
    return "\n".join(lines)


def plot(rows):
    """Plot test error against training time, both logarithmic, and return the `Figure`."""
    fig, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, style in ((OURS, "o-"), (EXAMPLE, "s"), (CLASSIC, "^")):
        chosen = [row for row in rows if row["name"] == label and row["accuracies"]]
        chosen.sort(key=lambda row: row["seconds"])
        seconds = [row["seconds"] for row in chosen]
        accuracies = [list(row["accuracies"].values()) for row in chosen]
        errors = [100 - statistics.mean(values) for values in accuracies]
        bars = [statistics.stdev(values) if len(values) > 1 else 0 for values in accuracies]
        if chosen:
            axes.errorbar(seconds, errors, bars, fmt=style, capsize=3, label=label)
        for row, x, y in zip(chosen, seconds, errors, strict=True):
            text = f"{row['epochs']} epoch{'s' * (row['epochs'] > 1)}"
            axes.annotate(text, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="training time (s)", ylabel="test error (%)")
    axes.margins(x=0.12)  # room for the last label
    for axis, subs in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, range(1, 10))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    plt.close(fig)
    return fig


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="time one epoch of the references")
    mode.add_argument("--ablation", action="store_true", help="instead of the comparison")
    mode.add_argument("--run", nargs=4, help=argparse.SUPPRESS)  # one run, in its own process
    parser.add_argument("--runs", type=positive, default=5, help="seeds of our recipes")
    parser.add_argument("--reference-runs", type=int, default=1, help="seeds of the references")
    parser.add_argument(
        "--epochs", type=positive, nargs="+", default=[1, EPOCHS], help="budgets of our recipe"
    )
    parser.add_argument("--data", default="MNIST", choices=("MNIST", "FashionMNIST", "digits"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs", help="for what it writes")
    args = parser.parse_args()
    if args.run:
        name, *numbers = args.run
        print(json.dumps(run(name, *map(int, numbers), args.data)))
        return

    jobs = []
    if args.ablation:
        seeds = range(args.runs)
        jobs = [(name, ABLATION_EPOCHS, s, ABLATION_EPOCHS) for s in seeds for name in ABLATION]
    else:
        for seed in range(max(args.runs, args.reference_runs)):
            if seed < args.runs:
                jobs += [(OURS, epochs, seed, epochs) for epochs in args.epochs]
            if seed < args.reference_runs:
                for name, (_, epochs) in REFERENCES.items():
                    jobs.append((name, epochs, seed, 1 if args.quick else epochs))

    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / ("ablation.json" if args.ablation else "benchmark.json")
    results = header(args.data) | {"runs": []}
    if path.exists():
        results = json.loads(path.read_text())
        for key, here in header(args.data).items():
            if results.get(key) != here:
                sys.exit(f"{path} has {key} '{results.get(key)}', this is '{here}': move it away")
    done = {tuple(result[key] for key in KEY) for result in results["runs"]}
    for job in jobs:
        if job in done:
            continue
        command = [sys.executable, __file__, "--data", args.data, "--run", *map(str, job)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if answer.returncode:
            sys.exit(f"this run failed, see above: {job}; the others are in {path}")
        result = json.loads(answer.stdout)
        results["runs"].append(result)
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(unfinished, path)
        reached = "" if result["accuracy"] is None else f"{result['accuracy']:.2f} %, "
        print(f"{job[0]}, {job[1]} epochs, seed {job[2]}: {reached}{result['seconds']:.1f} s")

    rows = summarise(results["runs"])
    print("\n" + (ablation_table(rows) if args.ablation else table(rows)))
    print(f"\n{args.data}, on {results['machine']}.\n")
    if not args.ablation:
        plot(rows).savefig(path.with_suffix(".png"))
        for row in rows:
            print(
                f"{row['name']}, {row['epochs']} epochs: {row['multiply_adds']:,} multiply-adds "
                f"per image, training at {100 * row['share']:.0f} % of the float32 matrix rate"
            )


if __name__ == "__main__":
    main()
