"""How training speeds up with processes on one machine, of one thread or one GPU each.

    python tests/scaling.py --processes 1 2

Trains on 20,000 images of MNIST with the notebook's recipe and global batch size, the numbers of
processes in turns, and one process with all threads beside them; once more in each run without
exchanging gradients, to see what that costs. Prints medians as a Markdown table.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import AUGMENT

from model import Net
from utils import BatchLoader, init_distributed, load_data, train


def worker(count, batch_size):
    """Print images/s, with and without exchanging gradients."""
    device, rank, world_size = init_distributed()
    share = {"rank": rank, "world_size": world_size, "device": device}
    data = load_data("MNIST")[0]
    warm_up, loader = (
        BatchLoader(Subset(data, range(size)), batch_size, shuffle=True, augment=AUGMENT, **share)
        for size in (count // 10, count)
    )
    model = Net().to(device)
    if world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, fused=True)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    speeds = {}
    for name in ("exchanging", "alone"):
        alone = name == "alone" and world_size > 1
        with model.no_sync() if alone else contextlib.nullcontext():
            train(model, device, warm_up, optimizer, criterion, progress=False)
            start = time.perf_counter()
            train(model, device, loader, optimizer, criterion, progress=False)
            speeds[name] = count / (time.perf_counter() - start)
    print(json.dumps(speeds))
    if world_size > 1:
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3, help="of each number of processes")
    parser.add_argument("--count", type=int, default=20_000, help="training images")
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        return worker(args.count, args.batch_size)
    cores = torch.get_num_threads()
    jobs = [(number, 1) for number in args.processes] + [(1, cores)]
    speeds = {job: {"exchanging": [], "alone": []} for job in jobs}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--count", str(args.count), "--batch-size", str(args.batch_size)]
    for _ in range(args.runs):
        for number, threads in jobs:
            env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            command = [*torchrun, f"--nproc-per-node={number}", __file__, *options]
            run = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            for name, speed in json.loads(run.stdout.splitlines()[-1]).items():
                speeds[number, threads][name].append(speed)
    print("| processes | threads each | images/s | ratio | without exchanging gradients |")
    print("|---|---|---|---|---|")
    first = statistics.median(speeds[jobs[0]]["exchanging"])
    for (number, threads), each in speeds.items():
        speed, alone = (statistics.median(each[name]) for name in ("exchanging", "alone"))
        print(f"| {number} | {threads} | {speed:,.0f} | {speed / first:.2f} | {alone:,.0f} |")


if __name__ == "__main__":
    main()
