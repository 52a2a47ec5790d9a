"""Stage distill: run the minmax distillation on Ray Train workers that share the classes."""

import dataclasses
import io
import itertools
import json
import math
import shlex
import sys
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from upath import UPath

from ncfm.allocation import shared_or_each
from ncfm.synthetic import SyntheticSet
from ncfm.tensor_files import BLOCK_BYTES
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
"""Classes, and images per class, that are written as PNG."""
DISTILL_VERSION = 2
"""Raise when this stage's results change; see tests/integration/test_golden.py."""


class Distill(Stage):
    """The synthetic set, in the run's directory."""

    name = "distill"

    @cached_property
    def job(self) -> DistillJob:
        """The workers' job."""
        cfg, shards, pool = self.config, self.run.stage(Shard), self.run.stage(Pretrain)
        ipc = cfg.stored(shards.store.counts("train"))
        options = (cfg.synthetic, cfg.distill, cfg.frequencies, cfg.augment, shared_or_each(ipc))
        identity = fingerprint(
            "distill", DISTILL_VERSION, shards.fingerprint, pool.fingerprint, *options, cfg.seed
        )
        directory = self.run.directory
        return DistillJob(
            store=shards.store,
            pool=pool.pool,
            snapshot_epochs=cfg.pretrain.snapshot_epochs,
            checkpoints=directory / "checkpoints" / identity,
            metrics=directory / "metrics.jsonl",
            synthetic=cfg.synthetic,
            distill=cfg.distill,
            frequencies=cfg.frequencies,
            augment=cfg.augment,
            runtime=cfg.runtime,
            ipc=ipc,
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
        # By default, workers share a class only if each gets at least FEWEST_IMAGES of it.
        workers = self.run.workers(max(cfg.num_workers or 1, most_workers(job.costs())))
        own_rows = [row for row in read_rows(job.metrics) if row["stage"] == "distill"]
        pool_rows = [r for path in sorted(pool.glob("metrics-*.jsonl")) for r in read_rows(path)]
        append_rows(job.metrics, [*pool_rows, *own_rows], fresh=True)
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
        """SHA-256 of the set's files, for the identity of stages that depend on it."""
        _ = self.manifest
        return set_content(self.run.directory / "distilled")


def set_content(directory: UPath) -> str:
    """SHA-256 of the files of a synthetic set, as one string."""
    return canonical_json(read_json(directory / "manifest.json")["sha256"])


def distill(
    job: DistillJob, workers: Workers, *, storage: UPath, run_directory: UPath, provenance: Manifest
) -> Manifest:
    """Run or resume the distillation, and write `initial/` and `distilled/` of the run directory.

    Raises StageError if the loss became NaN or infinite, which a restart would only repeat.
    """
    steps = job.distill.num_steps
    if newest_whole_step(job.checkpoints) != steps:
        _run_workers(job, workers, name=run_directory.name, storage=storage)
        if newest_whole_step(job.checkpoints) != steps:
            raise RuntimeError(f"the workers ended without a final checkpoint in {job.checkpoints}")
    if newest_whole_step(job.checkpoints, at_most=0) != 0:
        raise RuntimeError(f"no undamaged initial checkpoint in {job.checkpoints}")
    peak, local = 0, run_directory if isinstance(run_directory, Path) else None
    for name, step in (("initial", 0), ("distilled", steps)):
        images, peak = images_of(job, step, local)
        labels = torch.arange(len(job.ipc)).repeat_interleave(torch.tensor(job.ipc))
        stored = (images, labels, job.synthetic.factor, job.store.spec, provenance)
        write_set(run_directory / name, SyntheticSet(*stored))
    return {"steps": steps, "workers": workers.count, "peak_rss_bytes": peak}


def images_of(job: DistillJob, step: int, directory: Path | None) -> tuple[Tensor, int]:
    """The images (N, C, H, W) of a checkpoint, by class, as a memory map of a scratch file in
    `directory`, and the workers' peak memory if the checkpoint has it. Neither the images
    nor the optimiser's state are ever in memory as a whole.
    """
    spec, peak = job.store.spec, 0
    ends = list(itertools.accumulate(job.ipc))
    images = _mapped(directory, (ends[-1], spec.channels, spec.image_size, spec.image_size))
    for name, tensor in checkpoint_tensors(job.checkpoints, step):
        match name.split("/"):
            case ["class", c, "images"]:
                images[ends[int(c)] - job.ipc[int(c)] : ends[int(c)]] = tensor
            case ["peak_rss_bytes"]:
                peak = int(tensor)
    return images, peak


def _mapped(directory: Path | None, shape: tuple[int, ...]) -> Tensor:
    """Memory-map a new float32 file without a name, which the system removes however the process
    ends. Raises StorageError if the disk is full; otherwise a later write would kill the process.
    """
    size = 4 * math.prod(shape)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            for start in range(0, size, BLOCK_BYTES):
                file.write(bytes(min(BLOCK_BYTES, size - start)))
            file.flush()
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
    except OSError as error:
        place = directory or tempfile.gettempdir()
        raise StorageError(
            f"cannot write {size:,} bytes in {place}: {error.strerror or error}"
        ) from error


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
    """Write a synthetic set with images/<class>/<n>.png and preview.png, replacing the directory's
    contents.
    """
    with replaced(directory, last="manifest.json") as new:
        _write_images(new / "images", result)
        preview = preview_png(result.images, result.labels, result.class_names)
        write_atomic(new / "preview.png", preview, durable=False)
        result.save(new)


def _write_images(directory: UPath, result: SyntheticSet) -> None:
    """Write the first images of the first classes as PNG; `export` writes all."""
    folders, last = folder_names(result.class_names), dict[int, int]()
    for index, label in enumerate(result.labels.tolist()):
        number = last[label] = last.get(label, -1) + 1
        if label >= PNG_CLASSES or number >= PNG_IMAGES:
            continue
        image = result.images[index]
        folder = directory / folders[label]
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        pixels = (image * 255).round().byte().permute(1, 2, 0).squeeze(-1)  # greyscale: (H, W)
        Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
        write_atomic(folder / f"{number}.png", buffer.getvalue(), durable=False)
