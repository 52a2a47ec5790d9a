"""Run the benchmarks in turn, each in a process of its own, and write their rows as CSV.

    python tests/benchmarks/run_all.py [--quick] [--only step train]
    python tests/benchmarks/run_all.py --tables

Results go to tests/benchmarks/results/<name>.csv. Run nothing else on the machine meanwhile.
`--quick` checks in a few minutes that every benchmark works; its figures have few repeats. `--only`
runs the named benchmarks. `--tables` regenerates the table of the README from the CSV files.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from record import README, RESULTS, Comparison, progress, with_table

HERE = Path(__file__).parent
FULL: dict[str, list[str]] = {
    "step": [
        "bench_step.py --cases 32 32-psi --steps 5 --starts 3",
        "bench_step.py --cases 128 128-psi --variants reference compiled --steps 5",
    ],
    "parts": ["bench_step.py --parts 32-psi --steps 31"],
    "train": ["bench_train.py"],
    "evaluate": ["bench_evaluate.py"],
    "store": ["bench_store.py"],
    "shard": ["bench_shard.py", "bench_shard.py --encoding jpeg"],
    "scaling": ["bench_scaling.py"],
    "end_to_end": ["bench_end_to_end.py --against 2a755c1 --seeds 0 1 2 3 4"],
}
"""Benchmark -> commands."""
QUICK: dict[str, list[str]] = {
    "step": ["bench_step.py --cases 32 --variants reference compiled --steps 2"],
    "parts": ["bench_step.py --parts 32-psi --steps 3"],
    "train": ["bench_train.py --cases 32 --steps 3"],
    "evaluate": ["bench_evaluate.py --cases small --repeats 1 --turns 1"],
    "store": ["bench_store.py --images 400 --repeats 1 --steps 3 --step 0.2 --gib 0.25"],
    "shard": ["bench_shard.py --count 400 --repeats 1"],
    "scaling": ["bench_scaling.py --steps 6 --turns 1 --real_batch 32"],
    "end_to_end": [
        "bench_end_to_end.py --seeds 0 -- --pretrain.training.epochs 1 --distill.num_steps 10 "
        "--evaluate.training.epochs 10 --evaluate.repeats 1"
    ],
}
LARGE = ("32-psi", "128-psi")
COMPARISONS = (
    Comparison("step", "step", "reference", "compiled"),
    Comparison("step", "tensors", "reference", "compiled", cases=LARGE),
    Comparison("train", "step", "plain", "native"),
    Comparison("train", "step", "layers", "native"),
    Comparison("train", "training", "plain", "native"),
    Comparison("train", "training", "layers", "native"),
    Comparison("evaluate", "training", "plain", "pipeline"),
    Comparison("shard", "all images", "plain", "shard"),
    Comparison("store", "making it", "webdataset", "store"),
    Comparison("store", "batch", "tensor in memory", "store"),
    Comparison("scaling", "step", "one worker", "two workers"),
    Comparison("scaling", "step", "this process", "Ray Train"),
    Comparison("end_to_end", "run", "2a755c1", "this version"),
    Comparison("end_to_end", "accuracy", "2a755c1", "this version"),
)
"""The README's table."""


def run(name: str, commands: list[str], out: Path) -> int:
    """Run the commands of a benchmark; returns the first exit code that is not 0, or 0."""
    for command in commands:
        script, *options = command.split()
        progress(f"{name}: {command}")
        options = ["--out", str(out / f"{name}.csv"), *options]
        done = subprocess.run([sys.executable, str(HERE / script), *options])
        if done.returncode:
            return done.returncode
    return 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=FULL, metavar="NAME", help=", ".join(FULL))
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the CSV files")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    if args.tables:
        README.write_text(with_table(README.read_text(), COMPARISONS))
        return
    commands = QUICK if args.quick else FULL
    lines = []
    for name in args.only or commands:
        began = time.perf_counter()
        code = run(name, commands[name], args.out.absolute())
        minutes = (time.perf_counter() - began) / 60
        lines.append((name, f"{minutes:8.1f}", f"failed ({code})" if code else "done"))
    for name, minutes, state in lines:
        print(f"{name:12} {minutes} min  {state}")
    sys.exit(any(state != "done" for *_, state in lines))


if __name__ == "__main__":
    main()
