"""The shard stage against a plain multiprocess Pillow loop on the same cores.

    python tests/benchmarks/bench_shard.py [--count 4000] [--encoding jpeg] [--out CSV]

JPEGs are generated under --work, where they stay for the next run. Both sides decode, resize and
encode all of them, in turns, `--repeats` times. `largest task`: peak resident memory of the largest
Ray task, with a quarter of the images and with all: it must not grow with their number.
"""

import argparse
import io
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import ray
from PIL import Image
from record import Recorder, progress
from upath import UPath

from pipeline.data.shards import ShardConfig
from pipeline.data.sources.folder import FolderSource
from pipeline.stages.shard import shard


def make_image(number: int, root: Path, classes: int, size: tuple[int, int]) -> None:
    """A JPEG of smooth noise, about as large in bytes as a photograph of its size."""
    path = root / f"train/{number % classes:04d}/{number:07d}.jpg"
    if not path.exists():
        noise = np.random.default_rng(number).integers(0, 256, (60, 75, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    if number < classes:
        link = root / f"val/{number:04d}/0.jpg"
        if not link.exists():
            link.hardlink_to(path)


def plain(path: str, size: int, encoding: str) -> int:
    """What anybody would write: decode, resize and cut, encode."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    short = min(image.size)
    left, upper = (image.width - short) // 2, (image.height - short) // 2
    box = (left, upper, left + short, upper + short)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    file = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if encoding == "jpeg" else {}
    image.save(file, encoding, **options)
    return len(file.getvalue())


def peaks() -> dict[int, tuple[str, int]]:
    """Name and peak resident bytes of every process below this one, and of this one (Linux)."""
    found: dict[int, dict[str, str]] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            continue
        found[int(status.parent.name)] = dict(
            line.split(":\t", 1) for line in lines if ":\t" in line
        )
    mine, grew = {multiprocessing.current_process().pid}, True
    while grew:
        below = {pid for pid, fields in found.items() if int(fields["PPid"]) in mine}
        grew = not below <= mine
        mine |= below
    return {
        pid: (found[pid]["Name"], int(found[pid]["VmHWM"].split()[0]) * 1024)
        for pid in mine
        if pid in found and "VmHWM" in found[pid]
    }


@contextmanager
def watched() -> Iterator[dict[int, tuple[str, int]]]:
    """The peaks of all processes that there are meanwhile."""
    seen: dict[int, tuple[str, int]] = {}
    ended = threading.Event()

    def watch() -> None:
        while True:
            seen.update(peaks())
            if ended.wait(0.5):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        seen.update(peaks())


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=400)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--encoding", choices=["png", "jpeg"], default="png")
    parser.add_argument("--shard-size", type=int, default=100)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench_shard")
    parser.add_argument("--out", type=Path, help="CSV file that gets the rows")
    args = parser.parse_args()
    recorder = Recorder("shard", args.out)
    size = (args.width, args.height)
    progress(f"generating {args.count} JPEGs, unless they are there")
    trees = {}
    for count in (args.count // 4, args.count):
        root = trees[count] = args.work / f"{args.width}x{args.height}-{args.classes}-{count}"
        for label in range(args.classes):
            (root / f"train/{label:04d}").mkdir(parents=True, exist_ok=True)
            (root / f"val/{label:04d}").mkdir(parents=True, exist_ok=True)
        make = partial(make_image, root=root, classes=args.classes, size=size)
        with multiprocessing.Pool(args.workers) as pool:
            pool.map(make, range(count), chunksize=64)
    config = ShardConfig(
        image_size=args.image_size, encoding=args.encoding, shard_size=args.shard_size
    )
    loop = partial(plain, size=args.image_size, encoding=args.encoding)
    target = args.work / "shards"

    def ours(count: int) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shard(FolderSource(UPath(trees[count]), 0.1), config, UPath(target))

    # Ray's workers are nice, by 15: what else the machine does would slow this side down alone.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(address="local", num_cpus=args.workers, include_dashboard=False, logging_level="ERROR")
    memory, times = {}, {"plain": [], "shard": []}
    paths = sorted(str(path) for path in trees[args.count].glob("*/*/*.jpg"))
    progress(f"sharding a quarter of {len(paths)} images")
    with watched() as small:
        ours(args.count // 4)
    memory[args.count // 4] = sorted(small.values(), key=lambda item: -item[1])
    with watched() as large, multiprocessing.Pool(args.workers) as pool:
        list(pool.imap_unordered(loop, paths[:64], chunksize=8))
        for repeat in range(args.repeats):
            times["plain"].append(
                seconds(lambda: list(pool.imap_unordered(loop, paths, chunksize=16)))
            )
            times["shard"].append(seconds(lambda: ours(args.count)))
            progress(f"repeat {repeat + 1} of {args.repeats}")
        pool.close()  # not terminated: Ray's handler of SIGTERM would print a stack trace
        pool.join()
    memory[args.count] = sorted(large.values(), key=lambda item: -item[1])
    ray.shutdown()
    case = f"{args.count} images as {args.encoding}"
    for name, taken in times.items():
        recorder.add(case, name, "all images", "s", taken)
    for count, found in memory.items():
        largest = max(size for name, size in found if "ray::" in name) / 2**20
        part = "all images" if count == args.count else "a quarter of the images"
        recorder.add(case, "shard", f"largest task, {part}", "MiB", [largest])
    recorder.write()


if __name__ == "__main__":
    main()
