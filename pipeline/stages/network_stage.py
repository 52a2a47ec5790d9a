"""Base of the stages that train fresh networks, and the tasks of these networks."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from upath import UPath

from ncfm.allocation import shared_or_each
from ncfm.models import ModelConfig
from pipeline.graph import Run, Stage
from pipeline.runtime.identity import fingerprint
from pipeline.runtime.tasks import MOST_THREADS
from pipeline.stages.curate import CURATE_VERSION, Curate
from pipeline.stages.distill import Distill
from pipeline.stages.networks import EvaluationTask, SetName, run_tasks
from pipeline.stages.pretrain import Pretrain, check_model
from pipeline.stages.shard import Shard


class NetworkStage(Stage):
    """A stage whose result is computed from those of fresh networks."""

    @property
    @abstractmethod
    def tasks(self) -> Sequence[EvaluationTask]:
        """One task per network and set."""

    @property
    def cache(self) -> UPath:
        """Cache of single networks' results, shared by all runs of a storage path."""
        return self.config.storage / "cache" / "evaluate"

    @property
    def _names(self) -> list[str]:
        return [task.result_path(self.cache).name for task in self.tasks]

    def results(self) -> list[dict[str, Any]]:
        """Results of all tasks, in order."""
        tasks = self.tasks
        workers = self.run.workers(len(tasks), threads=MOST_THREADS)
        return run_tasks(tasks, self.cache, workers, stage=self.name)


def named_model(run: Run, name: str) -> ModelConfig:
    """The network of that name, with the run's model options if it is the run's own model. Raises
    UsageError if it cannot be built for these images.
    """
    model = run.config.model.named(name)
    check_model(run, model)
    return model


def evaluation_task(
    run: Run,
    name: SetName,
    repeat: int,
    *,
    model: ModelConfig,
    classes: tuple[int, ...] | None = None,
) -> EvaluationTask:
    """The task of a network on one of this run's sets; the set is built first."""
    cfg, shards, pool = run.config, run.stage(Shard), run.stage(Pretrain)
    counts = shards.manifest["splits"]["train"]["counts"]
    ipc, training = cfg.stored(counts), cfg.evaluate.training
    if name == "whole":
        training = dataclasses.replace(cfg.pretrain.training, epochs=cfg.evaluate.whole_epochs)
    return EvaluationTask(
        set=name,
        repeat=repeat,
        identity=fingerprint(shards.fingerprint, _content(run, name, shared_or_each(ipc))),
        store=shards.store,
        distilled=run.directory / ("curated" if name == "distilled_soft" else "distilled"),
        pool=pool.pool,
        curate=cfg.curate,
        model=model,
        training=training,
        hard_epochs=round(cfg.curate.hard_fraction * training.epochs),
        best_on_test_every=cfg.evaluate.best_on_test_every if classes is None else 0,
        classes=classes,
        ipc=tuple(counts) if name == "whole" else ipc,
        factor=cfg.synthetic.factor,
        seed=cfg.seed,
    )


def _content(run: Run, name: SetName, ipc: object) -> object:
    """Everything that a set depends on besides the shards."""
    cfg, pool = run.config, run.stage(Pretrain)

    def teachers() -> tuple[object, ...]:
        return pool.fingerprint, cfg.curate, CURATE_VERSION

    of_set: dict[SetName, Callable[[], object]] = {
        "distilled": run.stage(Distill).content,
        "distilled_soft": run.stage(Curate).content,
        "distilled_soft_views": lambda: (run.stage(Distill).content(), *teachers()),
        "random": lambda: ipc,
        "random_soft": lambda: (ipc, *teachers()),
        "random_soft_views": lambda: (ipc, *teachers()),
        "random_same_factor": lambda: (ipc, cfg.synthetic.factor),
        "herding": lambda: (ipc, pool.fingerprint),
        "whole": lambda: "",
    }
    return of_set[name]()
