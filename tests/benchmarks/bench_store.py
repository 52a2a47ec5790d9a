"""The node's store: making it, batches from it, and memory.

    python tests/benchmarks/bench_store.py --out store.csv

`make`: images/s of making the store, and of one epoch of the webdataset library's own loader with
decoding over the same shards, by turns; the library's workers are given their start for nothing.
`batch`: seconds for a batch of 1024 images of 128 px by index, from the store and from a tensor in
memory. `wait`: the part of a step of `--step` seconds that a loop over all classes spends in its
batches. `anonymous`: RssAnon of a fresh process that makes a store of `--gib` and then reads an
epoch and batches, minus what it has after its imports.

Rows are appended to the CSV: medians, the least and the largest of the repeats.
"""

import argparse
import csv
import itertools
import multiprocessing
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from upath import UPath

from pipeline.data.batches import ClassBatches, StoredImages
from pipeline.data.shards import ShardConfig, write_shard
from pipeline.data.sources import SPLITS, Found, Sample, SampleList
from pipeline.data.store import Store
from pipeline.stages.shard import build_manifest, plan

SIZE = 128
COLUMNS = ("date", "commit", "machine", "what", "variant", "median", "least", "largest", "repeats",
    "unit")  # fmt: skip


class NoiseSource(SampleList):
    """Smooth noise, made from the key."""

    def __init__(self, count: int, classes: int) -> None:
        train = [Sample(f"{k}", k % classes, f"{k}") for k in range(count)]
        val = [Sample(f"val/{k}", k, f"{k}") for k in range(classes)]
        names = [f"{label}" for label in range(classes)]
        super().__init__(Found(names, train, val, [count, classes]), val_fraction=0.1)

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        noise = np.random.default_rng(list(sample.uri.encode())).integers(0, 256, (12, 12, 3))
        small = Image.fromarray(noise.astype(np.uint8))
        return small.resize((2 * SIZE, 2 * SIZE), Image.Resampling.BICUBIC)


def build(directory: Path, encoding: Any, count: int, classes: int) -> Store:
    """The shards, written in this process."""
    source = NoiseSource(count, classes)
    config = ShardConfig(image_size=SIZE, encoding=encoding)
    for split in SPLITS:
        (directory / split).mkdir(parents=True, exist_ok=True)
    results = [
        (task, write_shard(task, read=source.read, config=config, directory=directory, identity=""))
        for task in plan(source, config.samples_per_shard)
    ]
    return Store(UPath(directory), build_manifest(source, config, results))


def grown(store: Store, gib: float) -> Store:
    """The same shards again and again in a manifest, up to so many decoded bytes."""
    train = store.manifest["splits"]["train"]
    wanted, shards = int(gib * 2**30) // (3 * SIZE**2), list[dict[str, Any]]()
    counts = [0] * len(train["counts"])
    for entry in itertools.cycle(train["shards"]):
        if sum(counts) >= wanted:
            break
        shards.append(entry)
        counts[entry["class"]] += entry["count"]
    splits = {**store.manifest["splits"], "train": {"counts": counts, "shards": shards}}
    return Store(store.shards, {**store.manifest, "splits": splits})


def make(store: Store) -> float:
    """Images/s of making the train split's store from nothing."""
    shutil.rmtree(store.directory, ignore_errors=True)
    started = time.perf_counter()
    store.images("train")
    return sum(store.counts("train")) / (time.perf_counter() - started)


def read_webdataset(store: Store, workers: int, suffix: str) -> float:
    """Images/s of an epoch of the library's loader, from its first batch on."""
    paths = [str(store.shards / e["path"]) for e in store.manifest["splits"]["train"]["shards"]]
    dataset = (
        webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
        .decode("torchrgb8")
        .to_tuple(suffix, "cls")
        .batched(64)
    )
    loader = iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))
    next(loader)
    started, count = time.perf_counter(), 0
    for images, _ in loader:
        count += len(images)
    return count / (time.perf_counter() - started)


def timed(call: Callable[[int], object], repeats: int) -> list[float]:
    """Seconds of each call but the first."""
    seconds = []
    for number in range(repeats + 1):
        started = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def batches(store: Store, repeats: int) -> dict[str, list[float]]:
    """Seconds of a batch of 1024 images, by turns from the store and from memory."""
    stored, resident = ClassBatches(store, [0], 0), ClassBatches(store, [0], 0)
    resident._images = {0: store.images("train", [0])[0].clone()}
    stored._images[0].sum()  # in the page cache, as after the first steps
    found: dict[str, list[float]] = {"store": [], "tensor in memory": []}
    for number in range(repeats):
        for name, source in (("store", stored), ("tensor in memory", resident)):
            found[name] += timed(lambda n, s=source, k=number: s.batch(0, 2 * k + n, 1024), 1)  # type: ignore[misc]
    return found


def waiting(store: Store, classes: int, batch: int, step_s: float, steps: int) -> list[float]:
    """The part of each step that its batches take."""
    source, found = ClassBatches(store, range(classes), 0), []
    for step in range(steps):
        started = time.perf_counter()
        for images in source.step(step, batch).values():
            assert len(images)
        spent = time.perf_counter() - started
        time.sleep(step_s)
        found.append(spent / (spent + step_s))
    return found


def anonymous() -> int:
    """RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def memory(store: Store) -> list[float]:
    """MiB of RssAnon that making and reading adds: at the end of each part."""
    from torchvision.io import decode_image  # noqa: F401  # what it takes is the library's

    before, found = anonymous(), []
    store.images("train")
    found.append(anonymous())
    for number, (images, _) in enumerate(
        StoredImages(store, "train").epoch(128, torch.Generator().manual_seed(0))
    ):
        if number % 100 == 0:
            found.append(anonymous())
        del images
    source = ClassBatches(store, range(store.spec.num_classes), 0)
    for step in range(3):
        for images in source.step(step, 1024).values():
            del images
        found.append(anonymous())
    return [(value - before) / 2**20 for value in found]


def in_a_fresh_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(call, *arguments).result()


def measure(args: argparse.Namespace, folder: Path) -> dict[tuple[str, str, str], list[float]]:
    """(what, variant, unit) -> values."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for encoding, suffix in (("png", "png"), ("jpeg", "jpg")):
        store = build(folder / encoding, encoding, args.images, args.classes)
        for _ in range(args.repeats):
            for variant, rate in (
                ("store", lambda s=store: make(s)),
                (
                    "webdataset, workers",
                    lambda s=store, x=suffix: read_webdataset(s, args.workers, x),
                ),
                ("webdataset, none", lambda s=store, x=suffix: read_webdataset(s, 0, x)),
            ):
                found.setdefault((f"make {encoding}", variant, "images/s"), []).append(rate())
    for variant, values in batches(grown(store, 0.5), args.repeats * 5).items():
        found["batch of 1024", variant, "s"] = values
    found["wait", f"step {args.step} s", "part"] = waiting(
        store, args.classes, 128, args.step, args.steps
    )
    for gib in args.gib:
        large = grown(store, gib)
        found["anonymous", f"{gib:g} GiB", "MiB"] = in_a_fresh_process(memory, large)
        shutil.rmtree(large.directory)
    return found


def main() -> None:
    """Measure, print, and append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step", type=float, default=1.0)
    parser.add_argument("--gib", type=float, nargs="*", default=[1.0, 8.0])
    parser.add_argument("--folder", help="where shards and stores go")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args, Path(folder))
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    same = [f"{datetime.now(UTC):%Y-%m-%d}", commit, f"{multiprocessing.cpu_count()} x {cpu}"]
    rows = [
        [*same, what, variant, *(f"{f(values):.4g}" for f in (statistics.median, min, max)),
         len(values), unit]
        for (what, variant, unit), values in found.items()
    ]  # fmt: skip
    for row in rows:
        print(*row[3:], sep="\t")
    if args.out:
        new = not args.out.exists()
        with args.out.open("a", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows] if new else rows)


if __name__ == "__main__":
    main()
