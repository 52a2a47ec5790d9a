"""The node's store of decoded images: making it, batches from it, waiting time and memory.

    python tests/benchmarks/bench_store.py [--images 4000] [--gib 1 8] [--out CSV]

`making it`: images/s of making the store, and of one epoch of the webdataset library's own loader
with decoding over the same shards, in turns; the start of the library's workers is not counted.
`batch`: seconds for a batch of 1024 images of 128 px by index, from the store and from a tensor in
memory. `waiting`: the share of a step of `--step` seconds that a loop over all classes spends on
its batches. `anonymous memory`: RssAnon of a fresh process that makes a store of `--gib` and then
reads an epoch and batches, minus what it has after its imports.
"""

import argparse
import itertools
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from record import Recorder, progress
from upath import UPath

from pipeline.data.batches import ClassBatches, StoredImages
from pipeline.data.shards import ShardConfig, write_shard
from pipeline.data.sources import SPLITS, Found, Sample, SampleList
from pipeline.data.store import Store
from pipeline.stages.shard import build_manifest, plan

SIZE = 128


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


def measure(args: argparse.Namespace, folder: Path, recorder: Recorder) -> None:
    """All quantities, in turns where there are two sides."""
    for encoding, suffix in (("png", "png"), ("jpeg", "jpg")):
        progress(f"{encoding}: generating {args.images} images and their shards")
        store = build(folder / encoding, encoding, args.images, args.classes)
        found: dict[str, list[float]] = {}
        for repeat in range(args.repeats):
            for variant, rate in (
                ("webdataset, no worker", lambda s=store, x=suffix: read_webdataset(s, 0, x)),
                ("webdataset", lambda s=store, x=suffix: read_webdataset(s, args.workers, x)),
                ("store", lambda s=store: make(s)),
            ):
                found.setdefault(variant, []).append(rate())
            progress(f"{encoding}: repeat {repeat + 1} of {args.repeats}")
        for variant, values in found.items():
            recorder.add(encoding, variant, "making it", "images/s", values)
    progress("batches")
    for variant, values in batches(grown(store, 0.5), args.repeats * 5).items():
        recorder.add("1024 images", variant, "batch", "s", values)
    progress(f"waiting: {args.steps} steps of {args.step} s")
    shares = waiting(store, args.classes, 128, args.step, args.steps)
    percent = [100 * share for share in shares]
    recorder.add(f"steps of {args.step:g} s", "store", "waiting", "%", percent)
    for gib in args.gib:
        progress(f"memory: a store of {gib:g} GiB")
        large = grown(store, gib)
        values = in_a_fresh_process(memory, large)
        recorder.add(f"{gib:g} GiB", "store", "anonymous memory", "MiB", values)
        shutil.rmtree(large.directory)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--step", type=float, default=1.0)
    parser.add_argument("--gib", type=float, nargs="*", default=[1.0, 8.0])
    parser.add_argument("--folder", help="where shards and stores go")
    parser.add_argument("--out", type=Path, help="CSV file that gets the rows")
    args = parser.parse_args()
    recorder = Recorder("store", args.out)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, Path(folder), recorder)
    recorder.write()


if __name__ == "__main__":
    main()
