"""Stage distill: Ray Train workers share the classes and make the minmax steps together."""

import io
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from upath import UPath

from ncfm.augment import AugmentConfig
from ncfm.distill import DistillConfig, Distiller
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.models import ModelConfig
from ncfm.seeding import keyed_generator
from ncfm.synthetic import SyntheticConfig, SyntheticSet, initial_images
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.config import RuntimeConfig, StreamConfig
from pipeline.pretrain import load_members, new_network
from pipeline.preview import preview_png
from pipeline.progress import Progress, append_rows, read_rows
from pipeline.stage import Manifest, peak_rss_bytes
from pipeline.stream import ClassStreams, ShardSet
from pipeline.workers import WorkerContext, Workers, current_context, fit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DistillJob:
    """What a worker needs to distil its classes."""

    shards: UPath
    shard_manifest: Manifest
    pool: UPath
    networks: int
    checkpoints: UPath
    metrics: UPath
    model: ModelConfig
    synthetic: SyntheticConfig
    distill: DistillConfig
    frequencies: FrequencyConfig
    augment: AugmentConfig
    stream: StreamConfig
    runtime: RuntimeConfig
    ipc: int
    seed: int


def distill(
    job: DistillJob, workers: Workers, *, storage: UPath, run_directory: UPath, provenance: Manifest
) -> Manifest:
    """Run or go on with the distillation, and write `initial/` and `distilled/` of the run
    directory.
    """
    state = load_checkpoint(job.checkpoints)
    if state is None or int(state["step"]) < job.distill.num_steps:
        fit(
            distill_loop,
            {"job": job},
            workers,
            name=f"distill-{run_directory.name}-{job.checkpoints.name}",
            storage=storage,
            max_failures=job.runtime.max_failures,
        )
        state = load_checkpoint(job.checkpoints)
    if state is None or int(state["step"]) != job.distill.num_steps:
        raise RuntimeError(f"the workers ended without a final checkpoint in {job.checkpoints}")
    shards = ShardSet(job.shards, job.shard_manifest)
    for name, key in (("initial", "initial"), ("distilled", "images")):
        images = [state[f"class/{c}/{key}"].float() for c in range(shards.spec.num_classes)]
        labels = torch.arange(shards.spec.num_classes).repeat_interleave(job.ipc)
        result = SyntheticSet(
            torch.cat(images), labels, job.synthetic.factor, shards.spec, provenance
        )
        write_set(run_directory / name, result)
    return {
        "steps": job.distill.num_steps,
        "workers": workers.count,
        "peak_rss_bytes": int(state["peak_rss_bytes"]),
    }


def write_set(directory: UPath, result: SyntheticSet) -> None:
    """A synthetic set with what people look at: images/<class>/<n>.png and preview.png."""
    result.save(directory)
    seen: dict[int, int] = {}
    for image, label in zip(result.images, result.labels.tolist(), strict=True):
        number = seen[label] = seen.get(label, -1) + 1
        folder = directory / "images" / result.class_names[label].replace("/", "_").strip(".")
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        to_pil_image((image * 255).round().to(torch.uint8)).save(buffer, format="PNG")
        (folder / f"{number}.png").write_bytes(buffer.getvalue())
    (directory / "preview.png").write_bytes(
        preview_png(result.images, result.labels, result.class_names)
    )


def distill_loop(arguments: dict[str, Any]) -> None:
    """The loop of one worker, under Ray Train or alone."""
    job: DistillJob = arguments["job"]
    context = current_context()
    shards = ShardSet(job.shards, job.shard_manifest)
    classes = list(range(shards.spec.num_classes))[context.rank :: context.world_size]
    budget = job.stream.memory_budget_mib * 2**20
    streams = ClassStreams(shards, classes, memory_budget_bytes=budget, seed=job.seed)
    initial = {c: _initial_images(job, streams, c) for c in classes}
    network = new_network(job.model, shards.spec, seed=0)  # its weights are the pool's
    distiller = Distiller(
        initial,
        factor=job.synthetic.factor,
        spec=shards.spec,
        pool=ExtractorPool(network, load_members(job.pool, job.networks), device=context.device),
        seed=job.seed,
        config=job.distill,
        frequencies=job.frequencies,
        augment=job.augment,
        num_classes=shards.spec.num_classes,
        device=context.device,
        all_reduce=context.all_reduce,
    )
    if (state := load_checkpoint(job.checkpoints)) is not None:
        distiller.load_state_dict(state)
    Loop(job, context, distiller, streams, initial).run()


def _initial_images(job: DistillJob, streams: ClassStreams, class_index: int) -> Tensor:
    needed = job.synthetic.real_images_needed(job.ipc)
    real = streams.batch(class_index, 0, needed, purpose="init")
    return initial_images(
        real, job.ipc, job.synthetic, keyed_generator(job.seed, "init_noise", class_index)
    )


class Loop:
    """Steps, rows of metrics, and checkpoints."""

    def __init__(
        self,
        job: DistillJob,
        context: WorkerContext,
        distiller: Distiller,
        streams: ClassStreams,
        initial: dict[int, Tensor],
    ) -> None:
        self.job, self.context, self.distiller, self.streams, self.initial = (
            job,
            context,
            distiller,
            streams,
            initial,
        )
        self.progress = Progress(
            "distill", job.distill.num_steps, unit="steps", done=distiller.step
        )
        self.saved_at = self.logged_at = time.monotonic()
        self.logged_step = distiller.step
        self.sums: dict[str, Tensor] = {}
        if context.rank == 0:  # rows beyond the checkpoint will be written again
            kept = [row for row in read_rows(job.metrics) if row.get("step", 0) <= distiller.step]
            append_rows(job.metrics, kept, fresh=True)

    def run(self) -> None:
        """Step until the end; the last checkpoint holds the result."""
        job, distiller = self.job, self.distiller
        while distiller.step < job.distill.num_steps:
            size, step = job.distill.real_batch, distiller.step
            real = {c: self.streams.batch(c, step, size) for c in distiller.images}
            for name, value in distiller.update(real).items():
                self.sums[name] = self.sums.get(name, 0) + value
            last = distiller.step == job.distill.num_steps
            if last or distiller.step % job.runtime.log_every == 0:
                self._log(last)

    def _log(self, last: bool) -> None:
        """Add up the metrics of all workers; with them rank 0 says whether it is time for a
        checkpoint.
        """
        job, now = self.job, time.monotonic()
        due = self.context.rank == 0 and (
            last or now - self.saved_at >= job.runtime.checkpoint_every_s
        )
        sums = torch.stack(
            [*self.sums.values(), torch.tensor(float(due), device=self.context.device)]
        )
        *totals, due_anywhere = self.context.all_reduce(
            sums.double().to(self.context.device)
        ).tolist()
        steps = self.distiller.step - self.logged_step
        means = {
            name: total / steps / self.distiller.num_classes
            for name, total in zip(self.sums, totals, strict=True)
        }
        if self.context.rank == 0:
            rate = (
                steps * job.distill.real_batch * self.distiller.num_classes / (now - self.logged_at)
            )
            values = {**means, "images_per_s": rate, "step_s": (now - self.logged_at) / steps}
            row = {"stage": "distill", "step": self.distiller.step, "time": time.time()}
            append_rows(
                job.metrics,
                [{**row, **{f"distill/{name}": value for name, value in values.items()}}],
            )
            self.progress.update(self.distiller.step, **means, **{"images/s": rate})
        self.sums, self.logged_at, self.logged_step = {}, now, self.distiller.step
        if due_anywhere:
            self._save()

    def _save(self) -> None:
        state = self.distiller.state_dict()
        state |= {f"class/{c}/initial": images for c, images in self.initial.items()}
        peak = max(self.context.gather(peak_rss_bytes()))
        if self.context.rank:  # psi and the step are the same everywhere: rank 0 writes them
            state = {key: value for key, value in state.items() if key.startswith("class/")}
        else:
            state["peak_rss_bytes"] = torch.tensor(peak)
        save_checkpoint(
            self.job.checkpoints,
            self.distiller.step,
            state,
            self.context,
            keep=self.job.runtime.checkpoints_kept,
        )
        self.saved_at = time.monotonic()
