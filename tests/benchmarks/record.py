"""Benchmark results as CSV rows, and the README's tables generated from them.

A row is one quantity of one variant of one case, measured on one machine. Writing a row replaces
the earlier row of the same (benchmark, case, variant, quantity, machine).
"""

import csv
import dataclasses
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
README, RESULTS = HERE / "README.md", HERE / "results"
PATH_OPTIONS = ("--out", "--work", "--folder")
"""Options whose values are paths of one machine: no part of the command that a row names."""
_STARTED = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured quantity. `low` and `high` are the extremes of the runs; None if not known."""

    benchmark: str
    case: str
    variant: str
    quantity: str
    unit: str
    median: float
    low: float | None
    high: float | None
    runs: int | None
    machine: str
    date: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows the same measurement."""
        return (self.benchmark, self.case, self.variant, self.quantity, self.machine)


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
NUMBERS = {"median": float, "low": float, "high": float, "runs": int}


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        Row(**{k: (NUMBERS[k](v) if v else None) if k in NUMBERS else v for k, v in line.items()})
        for line in lines
    ]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, in place of earlier rows with the same key."""
    merged = {row.key: row for row in [*read_rows(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(dataclasses.astuple(row) for row in merged.values())


class Recorder:
    """Collects the rows of one benchmark, prints them, and writes them to `out` if there is one."""

    def __init__(self, benchmark: str, out: Path | None, device: str = "cpu") -> None:
        self.benchmark, self.out = benchmark, out
        self.machine, self.rows = machine(device), list[Row]()

    def add(
        self, case: str, variant: str, quantity: str, unit: str, values: Sequence[float]
    ) -> None:
        """The median and the spread of some runs."""
        middle, low, high = (
            float(f"{function(values):.4g}") for function in (statistics.median, min, max)
        )
        row = Row(
            benchmark=self.benchmark, case=case, variant=variant, quantity=quantity, unit=unit,
            median=middle, low=low, high=high, runs=len(values), machine=self.machine,
            date=f"{datetime.now(UTC):%Y-%m-%d}", commit=commit(), command=command(sys.argv),
        )  # fmt: skip
        self.rows.append(row)
        print(f"{case:36} {variant:20} {quantity:36} {spread(row)} {unit}", flush=True)

    def write(self) -> None:
        """Write the rows to the CSV file."""
        if self.out is not None:
            write_rows(self.out, self.rows)


def progress(text: str) -> None:
    """A line on stderr, with the minutes since the start."""
    elapsed = time.perf_counter() - _STARTED
    print(f"[{elapsed / 60:5.1f} min] {text}", file=sys.stderr, flush=True)


def command(arguments: Sequence[str]) -> str:
    """The command line that a row names: without the paths of this machine."""
    kept, rest = list[str](), iter(arguments[1:])
    for argument in rest:
        if argument in PATH_OPTIONS:
            next(rest, None)
        elif not argument.startswith(tuple(f"{option}=" for option in PATH_OPTIONS)):
            kept.append(argument)
    threads = os.environ.get("OMP_NUM_THREADS")  # otherwise PyTorch uses all cores
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return prefix + shlex.join(["python", f"tests/benchmarks/{Path(arguments[0]).name}", *kept])


@cache
def commit() -> str:
    """The commit that is checked out; `-dirty` if tracked files other than results differ."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip()

    ours = (":(exclude)tests/benchmarks/results", ":(exclude)tests/benchmarks/README.md")
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *ours)
    return (git("rev-parse", "--short=9", "HEAD") or "unknown") + "-dirty" * bool(dirty)


def machine(device: str = "cpu") -> str:
    """For example `2 cores of an AMD EPYC (Zen 4)`, or the name of a GPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in (cpu.read_text().splitlines() if cpu.exists() else [])
        if ":" in line
    )
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count} cores of an {processor(fields)}"


def processor(fields: dict[str, str]) -> str:
    """The processor that the fields of /proc/cpuinfo describe, and its generation if known."""
    name = fields.get("model name") or platform.processor() or platform.machine()
    family, model = (int(fields.get(k, -1)) for k in ("cpu family", "model"))
    generation = ""
    if fields.get("vendor_id") == "AuthenticAMD" and family in (25, 26):
        zen4 = 0x10 <= model <= 0x1F or 0x60 <= model <= 0xAF
        generation = "Zen 5" if family == 26 else "Zen 4" if zen4 else "Zen 3"
    elif "avx512f" in fields.get("flags", "").split():
        generation = "AVX-512"
    return f"{name} ({generation})" if generation else name


# ---------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Comparison:
    """Lines of a table: a quantity of one variant beside that of another, the baseline."""

    benchmark: str
    quantity: str
    baseline: str
    variant: str
    cases: tuple[str, ...] = ()  # of the benchmark; all that have the variant if empty


BEGIN = "<!-- table: made by tests/benchmarks/run_all.py --tables -->"
END = "<!-- end of table -->"
RATES = ("images/s", "GFLOP/s")
"""Units of quantities of which more is better."""


def spread(row: Row) -> str:
    """`median (low to high)`, or the median alone where the spread is not known."""
    if row.low is None or row.high is None or row.low == row.high:
        return f"{row.median:.4g}"
    return f"{row.median:.4g} ({row.low:.4g} to {row.high:.4g})"


HEADER = ("benchmark", "case", "quantity", "baseline", "compared", "ratio", "machine", "date",
    "commit")  # fmt: skip


def lines_of(comparison: Comparison, rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A line for each case, of the machine where it was measured last."""
    cases: dict[str, dict[str, dict[str, Row]]] = {}  # case -> machine -> variant
    for row in rows:
        if row.quantity == comparison.quantity and row.case in (comparison.cases or (row.case,)):
            machines = cases.setdefault(row.case, {})
            machines.setdefault(row.machine, {})[row.variant] = row
    lines = []
    for case, machines in cases.items():
        both = [
            (v[comparison.baseline], v[comparison.variant])
            for v in machines.values()
            if {comparison.baseline, comparison.variant} <= v.keys()
        ]
        if both:
            baseline, compared = max(both, key=lambda pair: pair[1].date)
            lines.append((
                comparison.benchmark, case, f"{comparison.quantity}, {compared.unit}",
                f"{comparison.baseline}: {spread(baseline)}",
                f"{comparison.variant}: {spread(compared)}", ratio(baseline, compared),
                compared.machine, compared.date, compared.commit,
            ))  # fmt: skip
    return lines


def ratio(baseline: Row, compared: Row) -> str:
    """How many times better than the baseline: faster, or smaller. Empty for accuracies, and unless
    both are of one day, since the speed of a shared machine varies from day to day.
    """
    if baseline.date != compared.date or compared.unit == "%":
        return ""
    better = compared.median / baseline.median
    return f"{better if baseline.unit in RATES else 1 / better:.2f}"


def markdown(comparisons: Iterable[Comparison], results: Path) -> str:
    """A table of all comparisons that have rows."""
    lines: list[tuple[str, ...]] = [HEADER, ("---",) * len(HEADER)]
    for comparison in comparisons:
        lines += lines_of(comparison, read_rows(results / f"{comparison.benchmark}.csv"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(readme: str, comparisons: Iterable[Comparison], results: Path = RESULTS) -> str:
    """The README with its table replaced. Raises ValueError if the markers are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{markdown(comparisons, results)}\n{END}{rest.split(END)[1]}"
