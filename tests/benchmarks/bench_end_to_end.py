"""Seconds of a whole run of the built-in preset from nothing, and of its stages.

    python tests/benchmarks/bench_end_to_end.py [--seeds 0 1 2] [--out CSV] [-- OPTION ...]

Runs `pipeline/run.py --seed N` with a new storage path for each seed; options after `--` are passed
to it. `accuracy`: of the distilled set, the mean over its networks.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import Recorder, progress

RUN = Path(__file__).parents[2] / "pipeline" / "run.py"


def run_once(seed: int, options: list[str], storage: Path) -> dict[str, float]:
    """Quantity -> value."""
    command = [sys.executable, str(RUN), "--seed", str(seed), "--storage_path", str(storage)]
    began = time.perf_counter()
    subprocess.run([*command, *options], check=True, stdout=sys.stderr)
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
    parser.add_argument("--out", type=Path, help="CSV file that gets the rows")
    parser.add_argument("--folder", type=Path, help="where the runs go")
    parser.add_argument("options", nargs="*", help="of pipeline/run.py, after --")
    args = parser.parse_args()
    recorder = Recorder("end_to_end", args.out)
    values: dict[str, list[float]] = {}
    for number, seed in enumerate(args.seeds):
        progress(f"run {number + 1} of {len(args.seeds)}")
        with tempfile.TemporaryDirectory(dir=args.folder) as storage:
            for quantity, value in run_once(seed, args.options, Path(storage)).items():
                values.setdefault(quantity, []).append(value)
    case = " ".join(["built-in preset", *args.options])
    for quantity, found in values.items():
        recorder.add(case, "this version", quantity, "%" if quantity == "accuracy" else "s", found)
    recorder.write()


if __name__ == "__main__":
    main()
