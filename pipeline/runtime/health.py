"""What goes wrong in a long run, said so that a reader knows what to do."""

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
"""In the checkpoints' directory: an error that to start the workers again would only repeat."""


def record_fatal(checkpoints: UPath, error: NonFiniteLossError, class_names: Sequence[str]) -> None:
    """Write down why the run must not be started again, for the driver to read."""
    names = ", ".join(class_names[c] for c in error.classes)
    last = newest_step(checkpoints)
    good = f"the last good checkpoint is {last[1]}" if last else "there is no checkpoint yet"
    write_atomic(checkpoints / FATAL, json.dumps({"error": f"{error} ({names}); {good}"}))


def fatal_error(checkpoints: UPath) -> str | None:
    """What `record_fatal` wrote, if it did."""
    found = read_json(checkpoints / FATAL)
    return None if found is None else str(found["error"])


def stragglers(
    seconds: Sequence[float], costs: Sequence[float], factor: float
) -> list[tuple[int, float]]:
    """The workers that are slow for their work: (rank, times the median of the others).

    Args:
        seconds: busy seconds of each worker, without waiting for others.
        costs: the work it was given, in any unit.
        factor: from which ratio on a worker is named.
    """
    speeds = [second / cost for second, cost in zip(seconds, costs, strict=True)]
    slow = []
    for rank, speed in enumerate(speeds):
        others = speeds[:rank] + speeds[rank + 1 :]
        usual = statistics.median(others) if others else speed
        if speed > factor * usual:
            slow.append((rank, speed / max(usual, 1e-9)))
    return slow
