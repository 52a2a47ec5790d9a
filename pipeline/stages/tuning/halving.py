"""Which trials of a search go on: asynchronous successive halving (ASHA; Li et al., 2020).

At a rung a trial is stopped if it lies below the best 1/eta of those that have come there before.
Here "before" is the order of the trials' numbers, not that of the clock: so what becomes of a trial
follows from the trials' results alone, on any number of workers, and after any interruption. A
trial whose verdict has to wait for an earlier one runs on meanwhile; if it is then stopped, what it
did beyond the rung does not count. Trials are compared with those of the same group alone: sets of
different size are no rivals.

Ray Tune's own ASHAScheduler decides in the order in which results arrive, and keeps what it has
seen in memory: on another number of workers, or after a restart, it stops other trials (a test
shows it). So Ray Tune places and runs the trials here, and asks this module which of them go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Verdict:
    """What is known of a trial."""

    status: Status
    rungs: int  # decided ones: the results that count are the first so many


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
        results: trial -> its accuracies, by rung, as far as it has come.
        groups: trial -> what must be equal for two trials to be compared.
        failed: trials that will not go on.
        rungs: how many there are; at the last nobody is stopped.
        reduction_factor: eta.
    """
    found: dict[int, Verdict] = {}
    for trial in sorted(groups):
        mine = results.get(trial, ())
        verdict = Verdict("running", 0)
        for rung in range(rungs):
            if len(mine) <= rung:
                verdict = Verdict("failed" if trial in failed else "running", rung)
                break
            if rung == rungs - 1:
                verdict = Verdict("finished", rungs)
                break
            earlier = [m for m in found if groups[m] == groups[trial]]
            if any(found[m].status == "running" and found[m].rungs <= rung for m in earlier):
                verdict = Verdict("running", rung)
                break
            rivals = [results[m][rung] for m in earlier if found[m].rungs > rung]
            if rivals and mine[rung] < np.percentile(rivals, 100 * (1 - 1 / reduction_factor)):
                verdict = Verdict("stopped", rung + 1)
                break
        found[trial] = verdict
    return found
