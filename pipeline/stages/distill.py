"""Stage distill: Ray Train workers share the classes and make the minmax steps together."""

import dataclasses
import io
import json
import math
import os
import shlex
import sys
import tempfile
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from upath import UPath

from ncfm.synthetic import SyntheticSet
from pipeline.errors import StageError, StorageError
from pipeline.graph import Stage
from pipeline.observe.preview import preview_png
from pipeline.observe.progress import append_rows, read_rows
from pipeline.observe.tracking import TrackedRun
from pipeline.runtime.assignment import most_workers
from pipeline.runtime.checkpoint import checkpoint_tensors, newest_whole_step
from pipeline.runtime.directories import folder_names, replaced
from pipeline.runtime.files import Manifest, read_json, write_atomic
from pipeline.runtime.health import FATAL, fatal_error
from pipeline.runtime.identity import canonical_json, code_versions, dotted, fingerprint
from pipeline.runtime.workers import Workers, fit
from pipeline.stages.distill_loop import DistillJob, distill_loop
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.shard import Shard

PNG_CLASSES, PNG_IMAGES = 100, 10
"""Of so many classes, so many images each are written as PNG."""
DISTILL_VERSION = 2
"""To be raised when this stage's results change; see tests/integration/test_golden.py."""


class Distill(Stage):
    """The synthetic set, in the run's own directory."""

    name = "distill"

    @cached_property
    def job(self) -> DistillJob:
        """What the workers are given."""
        cfg, shards, pool = self.config, self.run.stage(Shard), self.run.stage(Pretrain)
        matters = (cfg.synthetic, cfg.distill, cfg.frequencies, cfg.augment, cfg.ipc, cfg.seed)
        identity = fingerprint(
            "distill", DISTILL_VERSION, shards.fingerprint, pool.fingerprint, *matters
        )
        directory = self.run.directory
        return DistillJob(
            store=shards.store,
            pool=pool.directory,
            networks=cfg.pretrain.networks,
            snapshot_epochs=cfg.pretrain.snapshot_epochs,
            checkpoints=directory / "checkpoints" / identity,
            metrics=directory / "metrics.jsonl",
            model=cfg.model,
            synthetic=cfg.synthetic,
            distill=cfg.distill,
            frequencies=cfg.frequencies,
            augment=cfg.augment,
            runtime=cfg.runtime,
            ipc=cfg.ipc,
            seed=cfg.seed,
            tracked=TrackedRun(
                config=cfg.tracking,
                name=directory.name,
                identity=identity,
                tensorboard=directory / "tensorboard" / "distill",
                directory=directory,
                options=dotted(dataclasses.asdict(cfg)),
            ),
        )

    def identity(self) -> str:
        """See Stage."""
        return self.job.checkpoints.name

    def build(self) -> Manifest:
        """See Stage."""
        cfg, job, pool = self.config, self.job, self.run.stage(Pretrain).directory
        # By default workers share a class only if each gets enough of it.
        workers = self.run.workers(max(cfg.num_workers or 1, most_workers(job.costs())))
        mine = [row for row in read_rows(job.metrics) if row["stage"] == "distill"]
        of_pool = [row for path in sorted(pool.glob("metrics-*.jsonl")) for row in read_rows(path)]
        append_rows(job.metrics, [*of_pool, *mine], fresh=True)
        return distill(
            job,
            workers,
            storage=cfg.ray_storage,
            run_directory=self.run.directory,
            provenance=self._provenance(),
        )

    def _provenance(self) -> Manifest:
        cfg = self.config
        return {
            "command": shlex.join(["python", "pipeline/run.py", *sys.argv[1:]]),
            "config": json.loads(json.dumps(dataclasses.asdict(cfg))),
            "seed": cfg.seed,
            "method": cfg.method,
            "method_changes": cfg.method_changes(),
            "versions": code_versions(),
            "inputs": {
                "shards": self.run.stage(Shard).fingerprint,
                "pool": self.run.stage(Pretrain).fingerprint,
            },
        }

    def content(self) -> str:
        """What the set counts by in the identity of what follows from it: its files' SHA-256."""
        _ = self.manifest
        return set_content(self.run.directory / "distilled")


def set_content(directory: UPath) -> str:
    """The SHA-256 of the files of a synthetic set, as one text."""
    return canonical_json(read_json(directory / "manifest.json")["sha256"])


def distill(
    job: DistillJob, workers: Workers, *, storage: UPath, run_directory: UPath, provenance: Manifest
) -> Manifest:
    """Run or go on with the distillation, and write `initial/` and `distilled/` of the run
    directory.

    Raises StageError if the loss became NaN or infinite: to start the workers again would not help.
    """
    steps = job.distill.num_steps
    if newest_whole_step(job.checkpoints) != steps:
        _run_workers(job, workers, name=run_directory.name, storage=storage)
    peak, local = 0, run_directory if isinstance(run_directory, Path) else None
    for name, step in (("initial", 0), ("distilled", steps)):
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=local) as scratch:
            images, peak = images_of(job, step, Path(scratch) / "images.f32")
            labels = torch.arange(job.store.spec.num_classes).repeat_interleave(job.ipc)
            stored = (images, labels, job.synthetic.factor, job.store.spec, provenance)
            write_set(run_directory / name, SyntheticSet(*stored))
    return {"steps": steps, "workers": workers.count, "peak_rss_bytes": peak}


def images_of(job: DistillJob, step: int, scratch: Path) -> tuple[Tensor, int]:
    """The images (classes * ipc, C, H, W) of a checkpoint, class by class, as a memory map of the
    file `scratch`: neither they nor the optimiser's state are ever in memory as a whole. And the
    peak memory of a worker that its last step tells.
    """
    spec, peak = job.store.spec, 0
    shape = (spec.num_classes * job.ipc, spec.channels, spec.image_size, spec.image_size)
    images = _mapped(scratch, math.prod(shape)).view(shape)
    for name, tensor in checkpoint_tensors(job.checkpoints, step):
        match name.split("/"):
            case ["class", c, "images"]:
                images[int(c) * job.ipc : (int(c) + 1) * job.ipc] = tensor
            case ["peak_rss_bytes"]:
                peak = int(tensor)
    return images, peak


def _mapped(path: Path, size: int) -> Tensor:
    """A memory map of a new file of so many float32. Raises StorageError if the disk has no room:
    without it a later write would kill the process.
    """
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * size)
            else:
                for _ in range(size):
                    file.write(bytes(4))
    except OSError as error:
        raise StorageError(
            f"cannot write {path}, {4 * size:,} bytes: {error.strerror or error}"
        ) from error
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32)


def _run_workers(job: DistillJob, workers: Workers, *, name: str, storage: UPath) -> None:
    (job.checkpoints / FATAL).unlink(missing_ok=True)
    try:
        fit(
            distill_loop,
            {"job": job},
            workers,
            name=f"distill-{name}-{job.checkpoints.name}",
            storage=storage,
            max_failures=job.runtime.max_failures,
            min_workers=job.runtime.min_workers,
            timeout_s=job.runtime.collective_timeout_s,
        )
    finally:
        if (fatal := fatal_error(job.checkpoints)) is not None:
            raise StageError(fatal) from None


def write_set(directory: UPath, result: SyntheticSet) -> None:
    """A synthetic set with what people look at, images/<class>/<n>.png and preview.png, in the
    place of all that the directory holds.
    """
    with replaced(directory, last="manifest.json") as new:
        _write_images(new / "images", result)
        preview = preview_png(result.images, result.labels, result.class_names)
        write_atomic(new / "preview.png", preview, durable=False)
        result.save(new)


def _write_images(directory: UPath, result: SyntheticSet) -> None:
    """The first images of the first classes; `export` writes all."""
    folders, seen = folder_names(result.class_names), dict[int, int]()
    for index, label in enumerate(result.labels.tolist()):
        number = seen[label] = seen.get(label, -1) + 1
        if label >= PNG_CLASSES or number >= PNG_IMAGES:
            continue
        image = result.images[index]
        folder = directory / folders[label]
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        pixels = (image * 255).round().byte().permute(1, 2, 0).squeeze(-1)  # grey has two axes
        Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
        write_atomic(folder / f"{number}.png", buffer.getvalue(), durable=False)
