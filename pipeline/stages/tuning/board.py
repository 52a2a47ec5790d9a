"""State of a search: its trials, their results and statuses."""

import time
from collections.abc import Mapping
from typing import Any

from pipeline.observe.progress import values_text
from pipeline.stages.tuning.halving import Verdict, verdicts
from pipeline.stages.tuning.search import Outcome, Sampler
from pipeline.stages.tuning.search_space import Values
from pipeline.stages.tuning.trial import Result, SweepJob, TrialJob


class Board:
    """All trials of a search, with their results and statuses."""

    def __init__(self, sweep: SweepJob, sampler: Sampler) -> None:
        self.sweep, self.config, self.sampler = sweep, sweep.config.tune, sampler
        self.trials: dict[int, TrialJob] = {}
        self.values: dict[int, Values] = {}
        self.results: dict[int, list[Result]] = {}
        self.failed: dict[int, str] = {}
        for number, values in sorted(sampler.known().items()):
            self._add(number, values)

    def _add(self, number: int, values: Values) -> None:
        job = self.sweep.trial(number, values)
        self.values[number], self.trials[number] = values, job
        self.results[number] = job.results()

    def suggest(self, number: int) -> Values:
        """The values of a trial, drawn on first use."""
        if number not in self.trials:
            self._add(number, self.sampler.values(number, self._outcomes()))
        return self.values[number]

    def _outcomes(self) -> list[Outcome]:
        outcomes = []
        for number, verdict in self.verdicts().items():
            accuracy = self.accuracy(number, verdict)
            ended, size = verdict.status != "running", self.trials[number].stored_bytes
            outcomes.append(Outcome(self.values[number], accuracy, size, ended))
        return outcomes

    def verdicts(self) -> dict[int, Verdict]:
        """The current status of every trial."""
        return verdicts(
            {n: [r["accuracy"] for r in results] for n, results in self.results.items()},
            {n: job.stored_bytes for n, job in self.trials.items()},
            frozenset(self.failed),
            rungs=len(self.config.rungs),
            reduction_factor=self.config.reduction_factor,
        )

    def accuracy(self, number: int, verdict: Verdict) -> float | None:
        """Accuracy at the trial's last decided rung."""
        results = self.results[number][: verdict.rungs]
        return float(results[-1]["accuracy"]) if results else None

    def unended(self) -> list[int]:
        """Trials still to run: undecided or not started."""
        ended = {n for n, verdict in self.verdicts().items() if verdict.status != "running"}
        return [number for number in range(self.config.num_trials) if number not in ended]

    def record(self, number: int, result: Result) -> bool:
        """Record a rung's result; False if it was recorded before."""
        known = any(earlier["step"] == result["step"] for earlier in self.results[number])
        if not known:
            self.results[number].append(result)
        return not known

    def rows(self) -> list[dict[str, Any]]:
        """One row per trial: status, accuracy at the last decided rung, values."""
        return [self.row(number, verdict) for number, verdict in self.verdicts().items()]

    def row(self, number: int, verdict: Verdict) -> dict[str, Any]:
        """The row of one trial."""
        results = self.results[number][: verdict.rungs]
        return {
            "trial": number,
            "status": verdict.status,
            "step": results[-1]["step"] if results else 0,
            "accuracy": self.accuracy(number, verdict),
            "accuracies": results[-1]["accuracies"] if results else [],
            "stored_bytes": self.trials[number].stored_bytes,
            "seconds": round(sum(result["seconds"] for result in results), 1),
            "rungs": [[result["step"], result["accuracy"]] for result in results],
            "error": self.failed.get(number, ""),
            "values": self.values[number],
        }


class Table:
    """Prints one line per result, without terminal escapes."""

    def __init__(self, board: Board) -> None:
        self._board, self._began = board, time.monotonic()
        self._ended = {n for n, v in board.verdicts().items() if v.status != "running"}
        if self._ended:
            print(f"[tune] {len(self._ended)} trials have ended", flush=True)  # noqa: T201
        self._line("seconds", "trial", "step", "select %", "ended", "of", "values")

    def _line(self, *cells: object) -> None:
        widths = (7, 5, 7, 8, 5, 4)
        text = "  ".join(str(cell).rjust(w) for cell, w in zip(cells, widths, strict=False))
        print(f"[tune] {text}  {cells[-1]}", flush=True)  # noqa: T201

    def tell(self, number: int) -> None:
        """Print the latest result of a trial."""
        result = self._board.results[number][-1]
        self._line(
            f"{time.monotonic() - self._began:.0f}",
            number,
            result["step"],
            f"{100 * result['accuracy']:.1f}",
            len(self._ended),
            self._board.config.num_trials,
            values_text(self._board.values[number]),
        )

    def tell_ended(self, verdicts: Mapping[int, Verdict]) -> None:
        """Print the trials that have ended since the last call."""
        for number, verdict in verdicts.items():
            if verdict.status != "running" and number not in self._ended:
                self._ended.add(number)
                step = self._board.row(number, verdict)["step"]
                error = self._board.failed.get(number, "")
                elapsed = f"{time.monotonic() - self._began:.0f}"
                counts = (len(self._ended), self._board.config.num_trials)
                self._line(elapsed, number, step, "", *counts, f"{verdict.status} {error}".rstrip())
