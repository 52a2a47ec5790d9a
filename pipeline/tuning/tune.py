"""Stage tune: Ray Tune runs the trials of a search; asynchronous successive halving stops the
hopeless.

Nothing of Ray Tune's own files is read back. What has been done is in the trials' directories;
what becomes of a trial follows from that alone (see `halving`), and the trials from the seed. So a
search that was cut off at any moment goes on to the same end. Trials use shards and networks that
are there before they start, and ask for their resources at once: none waits for another.
"""

import csv
import io
import json
import logging
import os
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from upath import UPath

from pipeline.config import STAGES, Command, UsageError, changed_command
from pipeline.stage import Manifest, StageError, write_atomic
from pipeline.tuning.halving import Verdict, verdicts
from pipeline.tuning.search import Outcome, Sampler, told
from pipeline.tuning.search_space import TuneConfig, Values
from pipeline.tuning.trial import Result, SweepJob, TrialJob, run_trial
from pipeline.workers import ray_storage

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # what they log is in the trials' directories
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would return as if all trials had ended
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables are boxes, and cannot be silenced
}


class Board:
    """All trials, what they have reached, and what becomes of them."""

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
        """The values of a trial, drawn now if they were not before."""
        if number not in self.trials:
            self._add(number, self.sampler.values(number, self._outcomes()))
        return self.values[number]

    def _outcomes(self) -> list[Outcome]:
        found = []
        for number, verdict in self.verdicts().items():
            accuracy = self.accuracy(number, verdict)
            ended, size = verdict.status != "running", self.trials[number].stored_bytes
            found.append(Outcome(self.values[number], accuracy, size, ended))
        return found

    def verdicts(self) -> dict[int, Verdict]:
        """What becomes of every trial so far."""
        return verdicts(
            {n: [r["accuracy"] for r in results] for n, results in self.results.items()},
            {n: job.stored_bytes for n, job in self.trials.items()},
            frozenset(self.failed),
            rungs=len(self.config.rungs),
            reduction_factor=self.config.reduction_factor,
        )

    def accuracy(self, number: int, verdict: Verdict) -> float | None:
        """At the last rung that counts."""
        results = self.results[number][: verdict.rungs]
        return float(results[-1]["accuracy"]) if results else None

    def unended(self) -> list[int]:
        """Trials that have to run: those that nothing is decided on, and those not begun."""
        ended = {n for n, verdict in self.verdicts().items() if verdict.status != "running"}
        return [number for number in range(self.config.num_trials) if number not in ended]

    def record(self, number: int, result: Result) -> bool:
        """Note a rung's result; False if it is known."""
        known = any(found["step"] == result["step"] for found in self.results[number])
        if not known:
            self.results[number].append(result)
        return not known

    def rows(self) -> list[dict[str, Any]]:
        """One row a trial: its status, its accuracy at the last rung that counts, its values."""
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


class Numbers(Searcher):  # type: ignore[misc] # Ray's classes have no types
    """Gives Ray Tune the trials that have to run, in the order of their numbers."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board, self._waiting = board, board.unended()

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial. Its values are one text: Ray Tune splits keys at dots."""
        del trial_id
        if not self._waiting:
            return str(Searcher.FINISHED)
        number = self._waiting.pop(0)
        return {"number": number, "values": json.dumps(self._board.suggest(number))}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The scheduler has noted it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing is read back from Ray Tune."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is read back from Ray Tune."""


class Halving(FIFOScheduler):  # type: ignore[misc]
    """Stops trials as `halving.verdicts` says, and tells of every result in a line."""

    def __init__(self, board: Board, table: "Table") -> None:
        super().__init__()
        self._board, self._table = board, table
        self._running: dict[int, Trial] = {}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:  # noqa: ARG002
        """Remember the trial, to stop it when others say so."""
        self._running[trial.config["number"]] = trial

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Stop this trial, or others whose verdict waited for this one."""
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
        found = self._board.verdicts()
        for other, trial in self._running.items():
            live = trial.status in (Trial.RUNNING, Trial.PENDING)
            if other != number and live and found[other].status == "stopped":
                tune_controller.request_stop_trial(trial)
        self._table.tell_ended(found)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """One attempt failed."""
        number = trial.config["number"]
        error = error_line(Path(trial.error_file).read_text(encoding="utf-8"))
        logger.warning("trial %d failed: %s", number, error)
        if not trial.should_recover():
            self._board.failed[number] = error
            self._stop_others(tune_controller, number)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """It has told all before."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """It has told all before."""


def error_line(text: str) -> str:
    """Why a trial failed, in one line, from what Ray Tune writes down: of a traceback the last
    line that names an exception, else, if the worker died, the first.
    """
    latest = text.rpartition("Failure # ")[2].splitlines()[1:]
    lines = [" ".join(line.split()) for line in latest if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return (raised or lines[:1] or ["no reason was given"])[-1]


class Table:
    """A table that grows by a line for every result, and reads the same in a job's log."""

    def __init__(self, board: Board) -> None:
        self._board, self._began = board, time.monotonic()
        self._ended = {n for n, v in board.verdicts().items() if v.status != "running"}
        if self._ended:
            print(f"[tune] {len(self._ended)} trials are done", flush=True)  # noqa: T201
        self._line("seconds", "trial", "step", "select %", "ended", "of", "values")

    def _line(self, *cells: object) -> None:
        widths = (7, 5, 7, 8, 5, 4)
        text = "  ".join(str(cell).rjust(w) for cell, w in zip(cells, widths, strict=False))
        print(f"[tune] {text}  {cells[-1]}", flush=True)  # noqa: T201

    def tell(self, number: int) -> None:
        """Tell the newest result of a trial."""
        result = self._board.results[number][-1]
        self._line(
            f"{time.monotonic() - self._began:.0f}",
            number,
            result["step"],
            f"{100 * result['accuracy']:.1f}",
            len(self._ended),
            self._board.config.num_trials,
            told(self._board.values[number]),
        )

    def tell_ended(self, found: Mapping[int, Verdict]) -> None:
        """Tell which trials have ended since the last time."""
        for number, verdict in found.items():
            if verdict.status != "running" and number not in self._ended:
                self._ended.add(number)
                step = self._board.row(number, verdict)["step"]
                why = self._board.failed.get(number, "")
                elapsed = f"{time.monotonic() - self._began:.0f}"
                counts = (len(self._ended), self._board.config.num_trials)
                self._line(elapsed, number, step, "", *counts, f"{verdict.status} {why}".rstrip())


@dataclass(frozen=True)
class TrialResources:
    """What every trial asks for, and how many fit."""

    cpus: float
    gpus: float
    concurrent: int

    @property
    def device(self) -> str:
        """Where trials compute, as torch calls it."""
        return "cuda" if self.gpus else "cpu"


def trial_resources(config: TuneConfig, *, use_gpu: bool) -> TrialResources:
    """From the cluster as it is now. Raises UsageError if there is no room for one trial."""
    found = ray.cluster_resources()
    gpus = config.gpus_per_trial if use_gpu else 0.0
    room = int(found.get("CPU", 0) / config.cpus_per_trial + 1e-9)
    if gpus:
        room = min(room, int(found.get("GPU", 0) / gpus + 1e-9))
    if room < 1 and config.max_concurrent is None:
        raise UsageError(
            f"a trial asks for {config.cpus_per_trial:g} CPUs and {gpus:g} GPUs, more than the "
            "cluster has; if it grows on demand, set tune.max_concurrent"
        )
    return TrialResources(config.cpus_per_trial, gpus, config.max_concurrent or room)


def tune(
    sweep: SweepJob, sampler: Sampler, resources: TrialResources, *, storage: UPath
) -> Manifest:
    """Run the trials that have not ended; returns {"trials": rows, "pareto": numbers}.

    Raises StageError if no trial succeeded.
    """
    board = Board(sweep, sampler)
    waiting = board.unended()
    if waiting:
        _run(board, waiting, resources, storage=storage)
    rows = board.rows()
    if not any(row["accuracy"] is not None and row["status"] != "failed" for row in rows):
        raise StageError(f"no trial succeeded; the first: {rows[0]['error'] or 'not run'}")
    peaks = [result["peak_rss_bytes"] for found in board.results.values() for result in found]
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


def pareto(rows: list[dict[str, Any]]) -> list[int]:
    """Finished trials that no other beats in accuracy without storing more, the smallest first."""
    finished = [row for row in rows if row["status"] == "finished"]
    finished.sort(key=lambda row: (row["stored_bytes"], -row["accuracy"], row["trial"]))
    front: list[dict[str, Any]] = []
    for row in finished:
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return [row["trial"] for row in front]


def write_results(
    directory: UPath, manifest: Manifest, config: TuneConfig, command: Command
) -> None:
    """results.json and .csv, and as presets best.toml and one a trial of the Pareto front."""
    rows, front = manifest["trials"], manifest["pareto"]
    best = (
        front[-1]
        if front
        else max(
            (row for row in rows if row["accuracy"] is not None),
            key=lambda row: (row["step"], row["accuracy"]),
        )["trial"]
    )
    content = {"trials": rows, "pareto": front, "best": best, "space": list(config.space)}
    write_atomic(directory / "results.json", json.dumps(content, indent=1))
    names = [name for name in rows[0] if name not in ("values", "accuracies", "rungs")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, *config.space])
    for row in rows:
        writer.writerow([row[name] for name in names] + [row["values"][k] for k in config.space])
    write_atomic(directory / "results.csv", buffer.getvalue())
    by_number = {row["trial"]: row for row in rows}
    files = {number: f"trial-{number:03d}.toml" for number in front} | {best: "best.toml"}
    for number, name in files.items():
        write_atomic(directory / name, preset(by_number[number], command))


def preset(row: Mapping[str, Any], command: Command) -> str:
    """The configuration of a trial as a preset for the whole pipeline, with a name of its own."""
    name = f"{command.config.run_directory.name}-trial-{row['trial']:03d}"
    changed = changed_command(command.toml, {**row["values"], "name": name, "tune": {}})
    about = (
        f"# Trial {row['trial']} of the search in {command.config.run_directory.name}: "
        f"{100 * row['accuracy']:.1f} % on images held out of train, "
        f"after {row['step']} steps.\n# {told(row['values'])}\n"
    )
    assert changed.stages == STAGES
    return about + changed.toml


def summary(manifest: Manifest) -> str:
    """How the trials ended, and the Pareto front, as text."""
    rows = manifest["trials"]
    counts = {s: sum(r["status"] == s for r in rows) for s in ("finished", "stopped", "failed")}
    lines = [f"[tune] {', '.join(f'{count} {status}' for status, count in counts.items())}"]
    lines += [f"[tune] trial {r['trial']} failed: {r['error']}" for r in rows if r["error"]]
    lines.append(f"[tune] {'trial':>5}  {'bytes':>9}  {'select %':>8}  values (the Pareto front)")
    for row in rows:
        if row["trial"] in manifest["pareto"]:
            spread = row["accuracies"]
            shown = f"{100 * statistics.fmean(spread):.1f}"
            lines.append(
                f"[tune] {row['trial']:>5}  {row['stored_bytes']:>9}  {shown:>8}  "
                f"{told(row['values'])}"
            )
    return "\n".join(lines)
