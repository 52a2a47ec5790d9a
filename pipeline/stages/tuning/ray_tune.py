"""Run the trials of a search under Ray Tune, with asynchronous successive halving.

Ray Tune's own files are never read back. Results are in the trials' directories, statuses follow
from these alone (see `halving`), and trials from the seed: an interrupted search resumes to the
same end. Shards and networks exist before the trials start, and a trial requests its resources at
once: no trial waits for another.
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from upath import UPath

from pipeline.errors import StageError, UsageError
from pipeline.runtime.files import Manifest
from pipeline.runtime.workers import ray_storage
from pipeline.stages.tuning.board import Board, Table
from pipeline.stages.tuning.results import pareto
from pipeline.stages.tuning.search import Sampler
from pipeline.stages.tuning.search_space import TuneConfig
from pipeline.stages.tuning.trial import SweepJob, run_trial

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trials' directories have these results
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # or Ctrl-C would return as if all trials had ended
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output draws boxes and cannot be turned off
}


class Numbers(Searcher):  # type: ignore[misc] # Ray's classes have no types
    """Ray Tune searcher: suggests the trials still to run, in order."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board, self._waiting = board, board.unended()

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial. Its values are one string: Ray Tune splits keys at dots."""
        del trial_id
        if not self._waiting:
            return str(Searcher.FINISHED)
        number = self._waiting.pop(0)
        return {"number": number, "values": json.dumps(self._board.suggest(number))}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """No-op: the scheduler records results."""

    def save(self, checkpoint_path: str) -> None:
        """No-op: nothing is read back from Ray Tune."""

    def restore(self, checkpoint_path: str) -> None:
        """No-op: nothing is read back from Ray Tune."""


class Halving(FIFOScheduler):  # type: ignore[misc]
    """Ray Tune scheduler: stops trials by `halving.verdicts`; prints a line per result."""

    def __init__(self, board: Board, table: Table) -> None:
        super().__init__()
        self._board, self._table = board, table
        self._running: dict[int, Trial] = {}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:  # noqa: ARG002
        """Keep the trial, so that another trial's result can stop it."""
        self._running[trial.config["number"]] = trial

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Record a result; stop this trial, or others whose verdict waited for this one."""
        del trial
        number = int(result["number"])
        if "failure" in result:
            self._board.failed[number] = result["failure"]
        else:
            kept = ("step", "accuracy", "accuracies", "seconds", "peak_rss_bytes")
            if self._board.record(number, {key: result[key] for key in kept}):
                self._table.tell(number)
        self._stop_others(tune_controller, number)
        stopped = self._board.verdicts()[number].status in ("stopped", "failed")
        return str(self.STOP if stopped else self.CONTINUE)

    def _stop_others(self, tune_controller: Any, number: int) -> None:
        verdicts = self._board.verdicts()
        for other, trial in self._running.items():
            live = trial.status in (Trial.RUNNING, Trial.PENDING)
            if other != number and live and verdicts[other].status == "stopped":
                tune_controller.request_stop_trial(trial)
        self._table.tell_ended(verdicts)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Log a failed attempt; record the trial as failed when no retry is left."""
        number = trial.config["number"]
        error = error_line(Path(trial.error_file).read_text(encoding="utf-8"))
        logger.warning("trial %d failed: %s", number, error)
        if not trial.should_recover():
            self._board.failed[number] = error
            self._stop_others(tune_controller, number)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """No-op: results are recorded in on_trial_result."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """No-op: results are recorded in on_trial_result."""


def error_line(text: str) -> str:
    """One-line reason of a failed trial, from Ray Tune's error file: the last line of the traceback
    that names an exception, else (the worker died) the first line.
    """
    latest = text.rpartition("Failure # ")[2].splitlines()[1:]
    lines = [" ".join(line.split()) for line in latest if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return (raised or lines[:1] or ["no reason was given"])[-1]


@dataclass(frozen=True)
class TrialResources:
    """Resources of one trial, and how many trials run at once."""

    cpus: float
    gpus: float
    concurrent: int

    @property
    def device(self) -> str:
        """The torch device type of trials."""
        return "cuda" if self.gpus else "cpu"


def trial_resources(config: TuneConfig, *, use_gpu: bool) -> TrialResources:
    """Resources per trial on the current cluster. Raises UsageError if not even one trial fits."""
    available = ray.cluster_resources()
    gpus = config.gpus_per_trial if use_gpu else 0.0
    room = int(available.get("CPU", 0) / config.cpus_per_trial + 1e-9)
    if gpus:
        room = min(room, int(available.get("GPU", 0) / gpus + 1e-9))
    if room < 1 and config.max_concurrent is None:
        raise UsageError(
            f"a trial asks for {config.cpus_per_trial:g} CPUs and {gpus:g} GPUs, more than the "
            "cluster has; if it grows on demand, set tune.max_concurrent"
        )
    return TrialResources(config.cpus_per_trial, gpus, config.max_concurrent or room)


def tune(
    sweep: SweepJob, sampler: Sampler, resources: TrialResources, *, storage: UPath
) -> Manifest:
    """Run the unfinished trials; returns {"trials": rows, "pareto": numbers}.

    Raises StageError if no trial succeeded.
    """
    board = Board(sweep, sampler)
    waiting = board.unended()
    if waiting:
        _run(board, waiting, resources, storage=storage)
    rows = board.rows()
    if not any(row["accuracy"] is not None and row["status"] != "failed" for row in rows):
        raise StageError(f"no trial succeeded; the first: {rows[0]['error'] or 'not run'}")
    peaks = [r["peak_rss_bytes"] for results in board.results.values() for r in results]
    return {"trials": rows, "pareto": pareto(rows), "peak_rss_bytes": max(peaks)}


def _run(board: Board, waiting: list[int], resources: TrialResources, *, storage: UPath) -> None:
    config = board.config
    os.environ.update(ENVIRONMENT)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(run_trial, sweep=board.sweep, device=resources.device),
        {"CPU": resources.cpus, "GPU": resources.gpus},
    )
    tuner = ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            search_alg=Numbers(board),
            scheduler=Halving(board, Table(board)),
            num_samples=len(waiting),
            max_concurrent_trials=resources.concurrent,
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']:03d}",
        ),
        run_config=ray.tune.RunConfig(
            name=f"tune-{board.sweep.name}",
            **ray_storage(storage),
            failure_config=ray.tune.FailureConfig(max_failures=config.retries),
            verbose=0,
        ),
    )
    tuner.fit()
