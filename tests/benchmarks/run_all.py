"""All benchmarks, one after the other, each in a process of its own.

    python tests/benchmarks/run_all.py --out runs/bench [--only step evaluate]

Of each, <out>/<name>.txt has what it prints and <out>/<name>.json its numbers; all.json has the
seconds and exit codes, and the table that is printed in the end. Nothing else should run beside it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RUN = HERE.parents[1] / "pipeline" / "run.py"


def commands(out: Path) -> dict[str, list[str]]:
    """Name -> command; `end_to_end` is the built-in preset from nothing."""

    def bench(name: str, *options: str) -> list[str]:
        return [sys.executable, str(HERE / f"bench_{name}.py"), *options]

    end_to_end = ["--storage_path", str(out / f"runs-{time.time_ns()}")]
    return {
        "step": bench("step", "--out", str(out)),
        "evaluate": bench("evaluate", "--out", str(out)),
        "store": bench("store", "--out", str(out / "store.csv")),
        "shard": bench("shard", "--out", str(out / "shard.json")),
        "scaling": bench("scaling", "--out", str(out / "scaling")),
        "end_to_end": [sys.executable, str(RUN), *end_to_end],
    }


def run(name: str, command: list[str], out: Path) -> dict[str, object]:
    """Run one; what it prints goes to its file."""
    began = time.perf_counter()
    with (out / f"{name}.txt").open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    row = {"name": name, "seconds": time.perf_counter() - began, "exit_code": code}
    return {**row, "command": " ".join(command)}


def main() -> None:
    """Run them and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=commands(Path()))
    args = parser.parse_args()
    out: Path = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    chosen = {k: v for k, v in commands(out).items() if args.only is None or k in args.only}
    rows = []
    for name, command in chosen.items():
        rows.append(run(name, command, out))
        print(f"--- {name}\n{(out / f'{name}.txt').read_text()}", flush=True)
        (out / "all.json").write_text(json.dumps(rows, indent=1))
    print(f"{'benchmark':12} {'seconds':>8} exit code")
    for row in rows:
        print(f"{row['name']:12} {row['seconds']:8.1f} {row['exit_code']}")
    sys.exit(any(row["exit_code"] for row in rows))


if __name__ == "__main__":
    main()
