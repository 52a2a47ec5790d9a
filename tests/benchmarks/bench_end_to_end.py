"""Seconds of a whole run of the built-in preset from nothing, and of its stages.

    python tests/benchmarks/bench_end_to_end.py [--seeds 0 1 2] [--out CSV] [-- OPTION ...]
    python tests/benchmarks/bench_end_to_end.py --against 2a755c1 --seeds 0 1 2 3 4

Runs `pipeline/run.py --seed N` with a new storage path for each seed; options after `--` are passed
to it. `accuracy`: of the distilled set, the mean over its networks. `--against COMMIT` measures an
earlier commit in turns with this one, in a clone with an environment of its own (made with uv).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import Recorder, progress

ROOT = Path(__file__).parents[2]


def environment(checkout: Path) -> Path:
    """The interpreter of a new environment for `checkout`."""
    variables = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    variables["UV_PROJECT_ENVIRONMENT"] = str(checkout / ".venv")
    sync = ["uv", "sync", "--quiet", "--no-dev", "--compile-bytecode"]
    subprocess.run(sync, cwd=checkout, check=True, env=variables)
    return checkout / ".venv/bin/python"


def clone(commit: str, folder: Path) -> Path:
    """A clone of this repository at `commit`."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder, check=True)
    return folder


def run_once(
    python: Path, checkout: Path, seed: int, options: list[str], storage: Path
) -> dict[str, float]:
    """Quantity -> value."""
    command = [str(python), str(checkout / "pipeline/run.py"), "--seed", str(seed)]
    command += ["--storage_path", str(storage), *options]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=checkout)
    found = {"run": time.perf_counter() - began}
    (evaluation,) = storage.glob("*/evaluation.json")
    stages = json.loads((evaluation.parent / "stages.json").read_text())
    found |= {f"stage {name}": stage["seconds"] for name, stage in stages.items()}
    (row,) = (r for r in json.loads(evaluation.read_text())["rows"] if r["set"] == "distilled")
    return {**found, "accuracy": 100 * statistics.fmean(row["accuracy"])}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--against", metavar="COMMIT", help="an earlier commit, in turns")
    parser.add_argument("--out", type=Path, help="CSV file that gets the rows")
    parser.add_argument("--folder", type=Path, help="where the runs go")
    parser.add_argument("options", nargs="*", help="of pipeline/run.py, after --")
    args = parser.parse_args()
    recorder = Recorder("end_to_end", args.out)
    values: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        variants = {"this version": (Path(sys.executable), ROOT)}
        if args.against:
            progress(f"an environment for {args.against}")
            earlier = clone(args.against, Path(folder) / "earlier")
            variants = {args.against: (environment(earlier), earlier), **variants}
        for number, seed in enumerate(args.seeds):
            for variant, (python, checkout) in variants.items():
                progress(f"run {number + 1} of {len(args.seeds)}, {variant}")
                with tempfile.TemporaryDirectory(dir=args.folder) as storage:
                    found = run_once(python, checkout, seed, args.options, Path(storage))
                for quantity, value in found.items():
                    values.setdefault((variant, quantity), []).append(value)
    case = " ".join(["built-in preset", *args.options])
    for (variant, quantity), found in values.items():
        recorder.add(case, variant, quantity, "%" if quantity == "accuracy" else "s", found)
    recorder.write()


if __name__ == "__main__":
    main()
