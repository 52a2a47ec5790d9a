"""Experiment tracking: send metric rows to TensorBoard, MLflow, Weights & Biases, Prometheus.

Rank 0 sends the rows that it writes to metrics.jsonl, which remains the record: tracking never
changes a run's result.
"""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from upath import UPath

from pipeline.errors import UsageError, missing_package

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Destinations of metric rows, besides the run's own metrics.jsonl."""

    tensorboard: bool = True
    """Write <run>/tensorboard/ (not in an object store)."""
    mlflow: str | None = None
    """URI of an MLflow tracking server (http://...), or, if sqlalchemy is installed, of a database
    (sqlite:///...); needs the extra `mlflow`."""
    wandb: str | None = None
    """Weights & Biases project; needs the extra `wandb`."""


GAUGES = {
    "step": ("ncfm_step", "Distillation step"),
    "distill/ncfd": ("ncfm_ncfd", "Discrepancy (NCFD) of synthetic and real features"),
    "distill/mmd": ("ncfm_mmd", "Linear MMD of synthetic and real features"),
    "distill/mmd_raw": ("ncfm_mmd_raw", "Linear MMD of synthetic and real raw features"),
    "distill/images_per_s": ("ncfm_images_per_second", "Real images per second, all workers"),
    "distill/step_s": ("ncfm_step_seconds", "Seconds per distillation step"),
    "distill/imbalance": ("ncfm_worker_imbalance", "Work of the slowest worker over the mean"),
    "distill/bytes_per_step": ("ncfm_bytes_per_step", "Bytes that all workers send in a step"),
}
"""Key of a row -> name and description of a Prometheus gauge. Ray adds the prefix ray_."""


class Tracker(Protocol):
    """Destination of metric rows."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one row; its "step" is the step of all its values."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """Description of a run for trackers."""

    config: TrackingConfig
    name: str
    identity: str  # identifies a resumed run
    tensorboard: UPath  # directory of its event files
    directory: UPath  # of the run
    options: Mapping[str, Any]  # by dotted name

    def open(self, step: int) -> list[Tracker]:
        """Open the configured trackers; rows up to `step` have been sent before."""
        trackers: list[Tracker] = [Gauges(self.name)] if _in_ray() else []
        if self.config.tensorboard and isinstance(self.tensorboard, Path):
            trackers.append(TensorBoard(self.tensorboard, purge_step=step + 1))
        if self.config.mlflow is not None:
            trackers.append(MLflow(self.config.mlflow, self))
        if self.config.wandb is not None:
            trackers.append(WandB(self.config.wandb, self))
        return trackers


def check_tracking(config: TrackingConfig) -> None:
    """Raise UsageError if a package is missing, before anything starts."""
    for package, wanted in (("mlflow", config.mlflow), ("wandb", config.wandb)):
        if wanted is not None and find_spec(package) is None:
            raise missing_package(f"tracking.{package}", package)
    if config.mlflow is not None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            MlflowClient(config.mlflow)  # does not connect yet
        except (MlflowException, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"tracking.mlflow {config.mlflow} cannot be used: {reason}") from error


def _in_ray() -> bool:
    """Whether this process belongs to a Ray cluster, without importing ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if "/" in key}


class Gauges:
    """Prometheus gauges, exported by Ray on every node."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._gauges: dict[str, Any] = {}
        for key, (name, description) in GAUGES.items():
            self._gauges[key] = Gauge(name, description=description, tag_keys=("run",))
            self._gauges[key].set_default_tags({"run": run})

    def log(self, row: Mapping[str, Any]) -> None:
        """Set the gauges of the row's values."""
        for key, gauge in self._gauges.items():
            if key in row:
                gauge.set(float(row[key]))

    def close(self) -> None:
        """No-op."""


class TensorBoard:
    """TensorBoard event files."""

    def __init__(self, directory: Path, *, purge_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write every value under its key."""
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, row["step"], walltime=row.get("time"))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """A run of the experiment `ncfm` on an MLflow tracking server."""

    def __init__(self, uri: str, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        known = self._client.get_experiment_by_name("ncfm")
        experiment = known.experiment_id if known else self._client.create_experiment("ncfm")
        runs = self._client.search_runs([experiment], f"tags.ncfm_identity = '{run.identity}'")
        if runs:
            self._run = runs[0].info.run_id
            return
        tags = {"mlflow.runName": run.name, "ncfm_identity": run.identity}
        self._run = self._client.create_run(experiment, tags=tags).info.run_id
        for key, value in run.options.items():
            self._client.log_param(self._run, key, value)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log every value under its key."""
        from mlflow.entities import Metric

        now = int(1000 * row.get("time", 0))
        metrics = [Metric(key, value, now, row["step"]) for key, value in _numbers(row).items()]
        self._client.log_batch(self._run, metrics)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


class WandB:
    """A run of a Weights & Biases project; the login comes from wandb's environment variables."""

    def __init__(self, project: str, run: TrackedRun) -> None:
        import wandb

        directory, local = run.directory, isinstance(run.directory, Path)
        self._run = wandb.init(
            project=project,
            id=run.identity,
            name=run.name,
            config=dict(run.options),
            # A worker's own directory is deleted with its session, and with it an offline run.
            dir=os.environ.get("WANDB_DIR") or (str(directory) if local else None),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, row: Mapping[str, Any]) -> None:
        """Log every value under its key."""
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Upload the remaining rows."""
        self._run.finish()


class Trackers:
    """Fan-out to several trackers.

    A tracker that cannot be opened is an error; one that fails later is dropped with a warning: a
    failing tracker must not stop a run.
    """

    def __init__(self, run: TrackedRun | None, step: int) -> None:
        self._trackers: list[Tracker] = run.open(step) if run is not None else []

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row to all."""
        for tracker in list(self._trackers):
            try:
                tracker.log(row)
            except Exception as error:
                self._trackers.remove(tracker)
                logger.warning("no more rows to %s: %r", type(tracker).__name__, error)

    def close(self) -> None:
        """Close all."""
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                logger.warning("%s was not closed: %r", type(tracker).__name__, error)
