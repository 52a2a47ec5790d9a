"""Deterministic asynchronous successive halving (ASHA; Li et al., 2020).

A trial is stopped at a rung if it is not among the best 1/eta of the trials that reached the rung
before it. "Before" is by trial number, not by time, so verdicts follow from the results alone: they
are the same for any number of workers and after any interruption. A trial whose verdict waits for
an earlier trial keeps running; if it is then stopped, its results beyond the rung do not count.
Trials are compared only within their group (sets of the same size).

Ray Tune's own ASHAScheduler decides in the order in which results arrive and keeps its state in
memory: on another number of workers, or after a restart, it stops different trials (a test shows
it). Here Ray Tune only places and runs the trials.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Verdict:
    """The status of a trial."""

    status: Status
    rungs: int  # decided rungs: only the results of these count


def verdicts(
    results: Mapping[int, Sequence[float]],
    groups: Mapping[int, object],
    failed: frozenset[int] = frozenset(),
    *,
    rungs: int,
    reduction_factor: float,
) -> dict[int, Verdict]:
    """The verdict on every trial of `groups`.

    Args:
        results: trial -> its accuracies by rung, so far.
        groups: trial -> key that two trials must share to be compared.
        failed: trials that will not continue.
        rungs: number of rungs; no trial is stopped at the last.
        reduction_factor: eta.
    """
    decided: dict[int, Verdict] = {}
    for trial in sorted(groups):
        accuracies = results.get(trial, ())
        verdict = Verdict("running", 0)
        for rung in range(rungs):
            if len(accuracies) <= rung:
                verdict = Verdict("failed" if trial in failed else "running", rung)
                break
            if rung == rungs - 1:
                verdict = Verdict("finished", rungs)
                break
            earlier = [m for m in decided if groups[m] == groups[trial]]
            if any(decided[m].status == "running" and decided[m].rungs <= rung for m in earlier):
                verdict = Verdict("running", rung)
                break
            rivals = [results[m][rung] for m in earlier if decided[m].rungs > rung]
            threshold = 100 * (1 - 1 / reduction_factor)
            if rivals and accuracies[rung] < np.percentile(rivals, threshold):
                verdict = Verdict("stopped", rung + 1)
                break
        decided[trial] = verdict
    return decided
