"""Training loop of a distillation worker: minmax steps, metric rows, checkpoints.

It runs under Ray Train, under plain torch.distributed, or in a single process: see
`current_context`.
"""

import logging
import platform
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from upath import UPath

from ncfm.augment import AugmentConfig
from ncfm.distill import DistillConfig, Distiller, NonFiniteLossError
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.selection import easy_count
from ncfm.synthetic import SyntheticConfig
from pipeline.data.batches import ClassBatches, warn_of_small_classes
from pipeline.data.pool import Pool, load_trajectory, new_network
from pipeline.data.selection import Selection
from pipeline.data.store import Store
from pipeline.observe.progress import Progress, append_rows, read_rows
from pipeline.observe.snapshots import snapshot_steps, write_snapshot
from pipeline.observe.tracking import TrackedRun, Trackers
from pipeline.runtime.assignment import ClassCost, assign, step_costs
from pipeline.runtime.checkpoint import CheckpointWriter, load_checkpoint
from pipeline.runtime.collectives import Collectives
from pipeline.runtime.config import RuntimeConfig
from pipeline.runtime.health import fatal_error, record_fatal, stragglers
from pipeline.runtime.identity import peak_rss_bytes
from pipeline.runtime.workers import current_context

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DistillJob:
    """Inputs of a distillation worker."""

    store: Store
    pool: Pool
    snapshot_epochs: tuple[int, ...]
    checkpoints: UPath
    metrics: UPath
    synthetic: SyntheticConfig
    distill: DistillConfig
    frequencies: FrequencyConfig
    augment: AugmentConfig
    runtime: RuntimeConfig
    ipc: tuple[int, ...]  # stored images of each class
    seed: int
    tracked: TrackedRun | None = None

    @property
    def snapshots(self) -> UPath:
        """Directory of the image snapshots."""
        return self.metrics.parent / "snapshots" / self.checkpoints.name

    def matched_counts(self) -> list[int]:
        """Number of real images of each class that are matched: its easy fraction."""
        counts = self.store.counts("train")
        return [easy_count(n, self.distill.easy_fraction) for n in counts]

    def costs(self) -> list[ClassCost]:
        """Cost of each class in a step."""
        train = self.store.counts("train")
        return step_costs(self.distill, self.synthetic.factor, self.ipc, train)


def distill_loop(arguments: dict[str, Any]) -> None:
    """Run one worker's loop; its results are the checkpoints and the metric rows."""
    job: DistillJob = arguments["job"]
    if fatal_error(job.checkpoints) is not None:
        return  # restarted after a permanent error: the driver reports it
    loop = Loop(job, arguments["device"], arguments.get("preempted"))
    try:
        loop.run()
    except NonFiniteLossError as error:
        record_fatal(job.checkpoints, error, loop.class_names)
        raise


class Loop:
    """One worker's training loop over its classes."""

    def __init__(
        self, job: DistillJob, device: str, preempted: Callable[[], bool] | None = None
    ) -> None:
        self.preempted, self.saved_for_reclaim = preempted or (lambda: False), False
        self.job, self.context, self.costs = job, current_context(device), job.costs()
        self.until = job.distill.num_steps
        spec = job.store.spec
        self.class_names = spec.class_names
        self.groups = assign(self.costs, self.context.world_size)
        self.collectives = Collectives(
            self.context, self.groups, timeout_s=job.runtime.collective_timeout_s
        )
        self.group = next(group for group in self.groups if self.context.rank in group.ranks)
        self.real = ClassBatches(
            job.store, self.group.classes, job.seed, device=self.context.device
        )
        if self.context.rank == 0:
            warn_of_small_classes(job.matched_counts(), job.distill.real_batch, spec.class_names)
        workers = self.collectives.gather((uuid.uuid4().hex[:8], platform.node()))
        self.hosts = [host for _, host in workers]
        self.writer = self._checkpoint_writer(attempt=workers[0][0])
        state = self._restore()
        pool = self._load_pool()
        selection = Selection(
            batches=self.real,
            pool=pool,
            spec=spec,
            synthetic=job.synthetic,
            distill=job.distill,
            ipc=job.ipc,
            seed=job.seed,
            communicator=self.collectives,
            device=self.context.device,
        )
        images = {}
        for c in self.group.classes:
            selection.restrict(c)
            images[c] = selection.initial_images(c) if state is None else state[f"class/{c}/images"]
        self.distiller = Distiller(
            images,
            factor=job.synthetic.factor,
            spec=spec,
            pool=pool,
            seed=job.seed,
            config=job.distill,
            frequencies=job.frequencies,
            augment=job.augment,
            num_classes=spec.num_classes,
            device=self.context.device,
            communicator=self.collectives,
        )
        if state is None:
            self._save()  # step 0: the initial images
            self.writer.wait()
            self.collectives.gather(None)  # barrier: the checkpoint exists once rank 0 is here
        else:
            self.distiller.load_state_dict(state)

    def _checkpoint_writer(self, attempt: str) -> CheckpointWriter:
        return CheckpointWriter(
            self.job.checkpoints,
            rank=self.context.rank,
            writers=[group.ranks[0] for group in self.groups],
            attempt=attempt,
            keep=self.job.runtime.checkpoints_kept,
            share=self.job.runtime.checkpoint_share,
            timeout_s=self.job.runtime.collective_timeout_s,
        )

    def _load_pool(self) -> ExtractorPool:
        job, pool = self.job, self.job.pool
        models = [new_network(model, job.store.spec, seed=0) for model in pool.models]
        epochs = job.snapshot_epochs
        if job.distill.extractor == "blend":
            epochs = epochs[:1] + epochs[-1:]
        trajectories = [load_trajectory(pool.directory, i, epochs) for i in range(pool.networks)]
        return ExtractorPool(models, trajectories, epochs=epochs, device=self.context.device)

    def _restore(self) -> dict[str, Tensor] | None:
        """The newest checkpoint that all workers can read; each reads only its classes."""
        at_most: int | None = None
        while True:
            state = load_checkpoint(
                self.job.checkpoints, classes=self.group.classes, at_most=at_most
            )
            steps = self.collectives.gather(-1 if state is None else int(state["step"]))
            if len(set(steps)) == 1:
                return state
            at_most = min(steps)  # a part that only some workers read is damaged

    def run(self, progress: Progress | None = None, until: int | None = None) -> None:
        """Run the remaining steps, those before `until`; the last checkpoint holds the result."""
        job, distiller = self.job, self.distiller
        self.until = until or self.until
        self.progress = progress or Progress(
            "distill", job.distill.num_steps, unit="steps", done=distiller.step
        )
        self.trackers = Trackers(job.tracked if self.context.rank == 0 else None, distiller.step)
        if self.context.rank == 0:  # drop rows after the checkpoint: they are written again
            kept = [row for row in read_rows(job.metrics) if row.get("step", 0) <= distiller.step]
            append_rows(job.metrics, kept, fresh=True)
        shown = snapshot_steps(job.distill.num_steps)
        if distiller.step == 0:
            self._snapshot()
        self._start_interval()
        while distiller.step < self.until:
            real = self.real.step(distiller.step, job.distill.real_batch)
            for name, value in distiller.update(real).items():
                self.sums[name] = self.sums.get(name, 0) + value
            if distiller.step in shown:
                self._snapshot()
            if self._is_last() or distiller.step % job.runtime.log_every == 0:
                self._log()
        self.trackers.close()

    def _start_interval(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.began, self.first_step = time.monotonic(), self.distiller.step
        self.sent_before, self.waited_before = self.collectives.bytes_sent, self.collectives.seconds

    def _log(self) -> None:
        """All-reduce the metrics and rank 0's decision to save a checkpoint."""
        waited = self.collectives.seconds - self.waited_before  # first: it synchronises the GPU
        now, rank = time.monotonic(), self.context.rank
        steps, last = self.distiller.step - self.first_step, self._is_last()
        reclaimed = self.preempted()
        every_s = 0 if reclaimed else self.job.runtime.checkpoint_every_s
        due = last or self.writer.due(every_s) or (reclaimed and not self.saved_for_reclaim)
        own = torch.zeros(2 + self.context.world_size, dtype=torch.float64)
        own[0] = self.collectives.bytes_sent - self.sent_before
        own[1] = float(rank == 0 and due and (last or not self.writer.busy))
        own[2 + rank] = now - self.began - waited
        sums = torch.cat([torch.stack([*self.sums.values()]).double(), own.to(self.context.device)])
        totals = self.collectives.sum_all(sums).tolist()
        values, (sent, save, *seconds) = totals[: len(self.sums)], totals[len(self.sums) :]
        means = {
            name: total / steps / self.distiller.num_classes
            for name, total in zip(self.sums, values, strict=True)
        }
        if rank == 0:
            self._report(means, sent / steps, (now - self.began) / steps, seconds)
        if save:
            if reclaimed and not self.saved_for_reclaim and rank == 0:
                logger.warning(
                    "a node is about to be reclaimed: checkpoint of step %d", self.distiller.step
                )
            self.saved_for_reclaim = reclaimed
            self._save()
            if last:
                self.writer.wait()
        self._start_interval()

    def _snapshot(self) -> None:
        """Write the current images of the group's classes as small PNGs, for the report."""
        if self.context.rank == self.group.ranks[0]:
            write_snapshot(self.job.snapshots, self.distiller.step, self.distiller.images)

    def _is_last(self) -> bool:
        return self.distiller.step == self.until

    def _report(
        self, means: dict[str, float], sent: float, step_s: float, seconds: list[float]
    ) -> None:
        step, rate = self.distiller.step, sum(cost.shared for cost in self.costs) / step_s
        values = {**means, "images_per_s": rate, "step_s": step_s, "bytes_per_step": sent}
        values["imbalance"] = max(seconds) * len(seconds) / sum(seconds)
        row = {"stage": "distill", "step": step, "time": time.time()}
        row |= {f"distill/{name}": value for name, value in values.items()}
        append_rows(self.job.metrics, [row])
        self.trackers.log(row)
        self.progress.update(step, **means, **{"images/s": rate})
        costs = [group.cost(self.costs) for group in self.groups for _ in group.ranks]
        factor = self.job.runtime.straggler_factor
        for slow, ratio in stragglers(seconds, costs, factor):
            logger.warning(
                "step %d: worker %d on %s is %.1f times slower than the others",
                step, slow, self.hosts[slow], ratio,
            )  # fmt: skip

    def _warn(self, drifted: dict[str, list[int]]) -> None:
        if self.context.rank == 0:
            ranks = sorted({rank for holders in drifted.values() for rank in holders})
            logger.warning(
                "step %d: workers %s on %s computed different values of %s than the first worker "
                "that holds them, whose values are used from here on. Different processors or "
                "software versions cause this, and GPU kernels that add in no fixed order",
                self.distiller.step,
                ", ".join(map(str, ranks)),
                ", ".join(dict.fromkeys(self.hosts[rank] for rank in ranks)),
                ", ".join(sorted(drifted)),
            )

    def _save(self) -> None:
        """Start a checkpoint, written in the background. Workers that share classes first agree on
        the state (`Collectives.agree`), which removes any drift between them.
        """
        began = time.monotonic()
        state, drifted = self.collectives.agree(self.distiller.state_dict())
        if drifted:
            self.distiller.load_state_dict(state)
            self._warn(drifted)
        if self._is_last():
            peaks = self.collectives.gather(peak_rss_bytes())
            state["peak_rss_bytes"] = torch.tensor(max(peaks))
        if self.context.rank:  # psi and the step are the same everywhere: rank 0 writes them
            state = {key: value for key, value in state.items() if key.startswith("class/")}
        self.writer.save(self.distiller.step, state, began=began)
