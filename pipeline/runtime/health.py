"""Fatal errors and stragglers of a long run."""

import json
import logging
import statistics
from collections.abc import Sequence

from upath import UPath

from ncfm.distill import NonFiniteLossError
from pipeline.runtime.checkpoint import newest_step
from pipeline.runtime.files import read_json, write_atomic

logger = logging.getLogger(__name__)

FATAL = "fatal.json"
"""File in the checkpoint directory: an error that a restart would only repeat."""


def record_fatal(checkpoints: UPath, error: NonFiniteLossError, class_names: Sequence[str]) -> None:
    """Record an error that must not be retried, for the driver to raise."""
    names = ", ".join(class_names[c] for c in error.classes)
    last = newest_step(checkpoints)
    good = f"the last good checkpoint is {last[1]}" if last else "there is no checkpoint yet"
    write_atomic(checkpoints / FATAL, json.dumps({"error": f"{error} ({names}); {good}"}))


def fatal_error(checkpoints: UPath) -> str | None:
    """The error recorded by `record_fatal`; None if there is none."""
    record = read_json(checkpoints / FATAL)
    return None if record is None else str(record["error"])


def stragglers(
    seconds: Sequence[float], costs: Sequence[float], factor: float
) -> list[tuple[int, float]]:
    """Workers that are slow relative to their work: (rank, ratio to the median of the others).

    Args:
        seconds: busy seconds of each worker, without waiting for others.
        costs: assigned work of each worker, in any unit.
        factor: ratio above which a worker is reported.
    """
    speeds = [second / cost for second, cost in zip(seconds, costs, strict=True)]
    slow = []
    for rank, speed in enumerate(speeds):
        others = speeds[:rank] + speeds[rank + 1 :]
        usual = statistics.median(others) if others else speed
        if speed > factor * usual:
            slow.append((rank, speed / max(usual, 1e-9)))
    return slow
