"""Streams: reading against the webdataset library's loader, waiting, and memory.

    python tests/benchmarks/bench_stream.py --images 2000 --classes 10 --out stream.json

The shards are made on the spot. Reading is one epoch of all images, by turns, medians of
`--repeats`; the library's workers are given their start for nothing. Waiting is the share of a step
of `--step` seconds, in which a device would compute, that the loop spends in `batch`: with all
classes resident and with a tenth of that budget. Memory is the growth of a fresh process.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from pipeline.shard_writer import write_shard
from pipeline.stream import ClassStreams, ShardSet, StreamedImages
from upath import UPath

from ncfm.seeding import keyed_generator
from pipeline.shard import ShardConfig, build_manifest, plan
from pipeline.sources import SPLITS, Found, Sample, SampleList


class NoiseSource(SampleList):
    """Smooth noise, made from the key."""

    def __init__(self, count: int, classes: int) -> None:
        train = [Sample(f"{k}", k % classes, f"{k}") for k in range(count)]
        val = [Sample(f"val/{k}", k, f"{k}") for k in range(classes)]
        names = [f"{label}" for label in range(classes)]
        super().__init__(Found(names, train, val, [count, classes]), val_fraction=0.1)

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        noise = np.random.default_rng(int(sample.uri)).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC)


def build(args: argparse.Namespace, directory: Path) -> ShardSet:
    """The shards, written in this process."""
    source = NoiseSource(args.images, args.classes)
    config = ShardConfig(
        image_size=args.image_size, encoding=args.encoding, shard_size=args.shard_size
    )
    for split in SPLITS:
        (directory / split).mkdir(parents=True, exist_ok=True)
    results = [
        (task, write_shard(task, read=source.read, config=config, directory=directory, identity=""))
        for task in plan(source, config.samples_per_shard)
    ]
    return ShardSet(UPath(directory), build_manifest(source, config, results))


def read_ours(shards: ShardSet, batch: int) -> float:
    """Images a second of an epoch under a budget of a tenth."""
    budget = shards.image_bytes * sum(shards.counts("train")) // 10
    source = StreamedImages(shards, "train", budget)
    started, count = time.perf_counter(), 0
    for images, _ in source.epoch(batch, torch.Generator().manual_seed(0)):
        count += len(images)
    return count / (time.perf_counter() - started)


def read_webdataset(shards: ShardSet, batch: int, workers: int, suffix: str) -> float:
    """Images a second of an epoch of the library, from its first batch on."""
    paths = [
        str(shards.directory / e["path"]) for e in shards.manifest["splits"]["train"]["shards"]
    ]
    dataset = (
        webdataset.WebDataset(paths, shardshuffle=len(paths), empty_check=False)
        .shuffle(1000)
        .decode("torchrgb8")
        .to_tuple(suffix, "cls")
        .batched(batch)
    )
    loader = iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))
    next(loader)
    started, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    return count / (time.perf_counter() - started)


def wait(shards: ShardSet, budget: int, args: argparse.Namespace) -> dict[str, float]:
    """The share of the time that a loop over all classes waits, and what its process grows by."""
    before = _rss()
    classes = range(shards.spec.num_classes)
    streams = ClassStreams(shards, classes, budget, 0)
    waits, largest = [], 0
    for step in range(args.steps + 1):
        started = time.perf_counter()
        for label in classes:
            streams.batch(label, step, args.batch)
        waits.append(time.perf_counter() - started)
        largest = max(largest, _rss())
        time.sleep(args.step)
    steady = waits[1:]  # the first step fills the pool
    return {
        "first_s": waits[0],
        "wait_fraction": sum(steady) / (sum(steady) + args.step * len(steady)),
        "worst_s": max(steady),
        "budget_mib": budget / 2**20,
        "growth_mib": (largest - before) / 2**20,
        "beyond_budget_mib": (largest - before - budget) / 2**20,
    }


def _rss() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def wait_in_a_fresh_process(
    directory: str, manifest: Any, share: float, args: argparse.Namespace
) -> dict[str, float]:
    """`wait` with a budget of some share of all train images."""
    shards = ShardSet(UPath(directory), manifest)
    keyed_generator(0, "warm")  # torch allocates at its first use
    shards.load("val")
    budget = int(share * shards.image_bytes * sum(shards.counts("train")))
    return wait(shards, budget, args)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--encoding", choices=["png", "jpeg"], default="png")
    parser.add_argument("--shard-size", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = build(args, Path(folder))
        suffix = {"png": "png", "jpeg": "jpg"}[args.encoding]
        read: dict[str, list[float]] = {"ours": [], "webdataset": [], "webdataset, no workers": []}
        for _ in range(args.repeats):
            read["ours"].append(read_ours(shards, 256))
            read["webdataset"].append(read_webdataset(shards, 256, args.workers, suffix))
            read["webdataset, no workers"].append(read_webdataset(shards, 256, 0, suffix))
        rates = {name: statistics.median(values) for name, values in read.items()}
        waits = {}
        for name, share in (("resident", 1.0), ("a tenth", 0.1)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                job = process.submit(wait_in_a_fresh_process, folder, shards.manifest, share, args)
                waits[name] = job.result()
    best = max(rate for name, rate in rates.items() if name != "ours")
    result = {
        "options": {key: str(value) for key, value in vars(args).items()},
        "images_per_s": read,
        "ratio": rates["ours"] / best,
        "wait": waits,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    for name, rate in rates.items():
        print(f"reading, {name:24} {rate:9.1f} images/s")
    print(f"ratio to the better one {result['ratio']:20.3f}")
    for name, entry in waits.items():
        print(f"{name:9}", "  ".join(f"{key} {value:.4g}" for key, value in entry.items()))


if __name__ == "__main__":
    main()
