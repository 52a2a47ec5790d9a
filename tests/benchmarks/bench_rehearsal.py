"""A thousand classes from nothing to the report, in small: memory, and the step's time.

    python tests/benchmarks/bench_rehearsal.py --images DIR --work DIR [--kill] [--out CSV]

DIR has real images of any kind, which are shrunk and dealt out to the classes, each several times,
cropped elsewhere: what is measured depends on numbers and sizes alone. For IPC 10 and 50, at 64 px
and width 16 and with few steps, it samples the memory of all processes of the run: `anonymous` is
what is not a file's page, `resident` all of it; the driver's, and the largest of any worker.
`--kill` starts the first IPC again in another storage, kills all its processes once in each stage,
and says whether the images came out the same.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image
from record import Recorder, progress
from upath import UPath

from pipeline.observe.progress import read_rows

ROOT = Path(__file__).parents[2]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
STAGES = ("shard", "pretrain", "distill", "evaluate")
OPTIONS = {
    "source.kind": "folder",
    "shard.image_size": "64",
    "model.width": "16",
    "pretrain.networks": "2",
    "pretrain.training.epochs": "1",
    "distill.num_steps": "2",
    "distill.real_batch": "32",
    "runtime.log_every": "1",
    "evaluate.sets": '["distilled"]',
    "evaluate.repeats": "1",
    "evaluate.training.epochs": "1",
    "num_workers": "2",
}


def write_class(files: list[Path], root: Path, train: int, val: int, label: int) -> None:
    """The images of one class: its share of the files, in turn, each time another 64 px of them."""
    for number in range(train + val):
        index = label * (train + val) + number
        with Image.open(files[index % len(files)]) as image:
            small = image.convert("RGB").resize((72, 72))
        x, y = (index // len(files)) % 9, (index // len(files) // 9) % 9
        path = root / ("train" if number < train else "val") / f"c{label:04d}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.crop((x, y, x + 64, y + 64)).save(path, quality=85)


def write_images(source: Path, root: Path, classes: int, train: int, val: int) -> None:
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"{source} has no image")
    with ProcessPoolExecutor() as pool:
        write = partial(write_class, files, root, train, val)
        for done, _ in enumerate(pool.map(write, range(classes), chunksize=10), start=1):
            if done % 100 == 0:
                progress(f"images of {done} of {classes} classes")


@dataclass
class Memory:
    """Largest memory seen, in MiB: (anonymous, resident) of the driver and of any other process."""

    driver: list[float] = field(default_factory=lambda: [0.0, 0.0])
    workers: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def sample(self, driver: int) -> None:
        """Look at all processes of the driver's session."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                pid, session = int(entry.name), os.getsid(int(entry.name))
                name = (entry / "cmdline").read_bytes()
                status = (entry / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            kinds = [self.driver] if pid == driver else []
            if name.startswith(b"ray::") and session == driver:
                kinds = [self.workers]
            for kind in kinds:
                for place, key in enumerate(("RssAnon:", "VmRSS:")):
                    found = [line for line in status.splitlines() if line.startswith(key)]
                    mib = int(found[0].split()[1]) / 1024 if found else 0.0
                    kind[place] = max(kind[place], mib)


def run(storage: Path, data: Path, ipc: int, kill_in: str | None = None) -> Memory | None:
    """A run to its end, or until some seconds after a stage has begun; None if it was killed."""
    options = OPTIONS | {"source.path": str(data), "ipc": str(ipc), "name": f"ipc{ipc}"}
    options |= {"storage_path": str(storage)}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    memory, ended = Memory(), threading.Event()
    process = subprocess.Popen(
        [sys.executable, "pipeline/run.py", *words],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip

    def watch() -> None:
        while not ended.wait(0.5):
            memory.sample(process.pid)

    threading.Thread(target=watch, daemon=True).start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if kill_in is not None and line.startswith(f"[{kill_in}] /"):
            time.sleep(20)  # in the midst of it
            os.killpg(process.pid, signal.SIGKILL)
    ended.set()
    code = process.wait()
    if kill_in is None and code != 0:
        raise SystemExit(f"IPC {ipc} ended with {code}")
    return memory if kill_in is None else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--train", type=int, default=200, help="images per class")
    parser.add_argument("--val", type=int, default=5, help="images per class")
    parser.add_argument("--ipc", type=int, nargs="+", default=[10, 50])
    parser.add_argument(
        "--kill", action="store_true", help="also the first IPC with kills, compared"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    data, recorder = work / "data", Recorder("rehearsal", arguments.out)
    if not data.exists():
        write_images(arguments.images, data, arguments.classes, arguments.train, arguments.val)
    case = f"{arguments.classes} classes of {arguments.train} images"
    for ipc in arguments.ipc:
        memory = run(work / "runs", data, ipc)
        assert memory is not None
        for who, values in (("driver", memory.driver), ("worker", memory.workers)):
            for quantity, value in zip(("anonymous", "resident"), values, strict=True):
                recorder.add(case, f"ipc {ipc}", f"{who}, {quantity}", "MiB", [value])
        rows = read_rows(UPath(work / "runs" / f"ipc{ipc}" / "metrics.jsonl"))
        steps = [row["distill/step_s"] for row in rows if row["stage"] == "distill"]
        recorder.add(case, f"ipc {ipc}", "step", "s", steps)
        recorder.write()
    if arguments.kill:
        first = arguments.ipc[0]
        for stage in STAGES:
            progress(f"killed in {stage}")
            run(work / "killed", data, first, kill_in=stage)
        run(work / "killed", data, first)
        sets = [
            work / p / f"ipc{first}/distilled/synthetic.safetensors" for p in ("runs", "killed")
        ]
        same = float(sets[0].read_bytes() == sets[1].read_bytes())
        recorder.add(case, f"ipc {first}, killed in each stage", "same images", "of 1", [same])
        recorder.write()


if __name__ == "__main__":
    main()
