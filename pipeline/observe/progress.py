"""Progress lines for terminals and job logs, and metric rows as JSON lines."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from upath import UPath

from pipeline.runtime.files import write_atomic

NETWORK_PROGRESS_S = 30.0
"""Between progress lines of one network in training: many are trained at once."""


class Progress:
    """Prints progress, rate and time left, at most every `interval` seconds and at the end.

    With `quiet`, nothing until `interval` seconds have passed, nor at the end: for short work, of
    which there is much.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        unit: str,
        done: int = 0,
        interval: float = 5.0,
        quiet: bool = False,
    ) -> None:
        self.stage, self.total, self.unit, self.interval = stage, total, unit, interval
        self.started, self.first, self.quiet = time.monotonic(), done, quiet
        self.printed = self.started if quiet else -interval

    @property
    def elapsed(self) -> float:
        """Seconds since the start, positive."""
        return max(time.monotonic() - self.started, 1e-9)

    def update(self, done: float, **values: float) -> None:
        """Report progress, with some values to print."""
        now = time.monotonic()
        if now - self.printed < self.interval and (done < self.total or self.quiet):
            return
        self.printed = now
        rate = (done - self.first) / self.elapsed
        left = (self.total - done) / rate if rate > 0 else float("inf")
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(  # noqa: T201
            f"[{self.stage}] {done}/{self.total} {self.unit}  {rate:.3g} {self.unit}/s  "
            f"{_clock(left)} left  {text}".rstrip(),
            flush=True,
        )


def values_text(values: Mapping[str, object]) -> str:
    """Format named values for display."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def append_rows(path: UPath, rows: Iterable[Mapping[str, Any]], *, fresh: bool = False) -> None:
    """Append rows to a JSON lines file; `fresh` replaces it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if fresh or not path.exists():
        write_atomic(path, text)
    elif isinstance(path, Path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:  # objects cannot be appended to
        write_atomic(path, path.read_text(encoding="utf-8") + text)


def read_rows(path: UPath) -> list[dict[str, Any]]:
    """All rows of a JSON lines file, without a truncated last line; empty if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
