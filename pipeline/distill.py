"""Stage distill: Ray Train workers share the classes and make the minmax steps together."""

import io

import torch
from PIL import Image
from upath import UPath

from ncfm.synthetic import SyntheticSet
from pipeline.checkpoint import load_checkpoint
from pipeline.directories import folder_names, replaced
from pipeline.distill_loop import DistillJob, distill_loop
from pipeline.health import FATAL, fatal_error
from pipeline.preview import preview_png
from pipeline.stage import Manifest, StageError, write_atomic
from pipeline.workers import Workers, fit

__all__ = ["DistillJob", "distill", "write_set"]

DISTILL_VERSION = 2
"""To be raised when this stage's results change; see tests/integration/test_golden.py."""


def distill(
    job: DistillJob, workers: Workers, *, storage: UPath, run_directory: UPath, provenance: Manifest
) -> Manifest:
    """Run or go on with the distillation, and write `initial/` and `distilled/` of the run
    directory.

    Raises StageError if the loss became NaN or infinite: to start the workers again would not help.
    """
    final = load_checkpoint(job.checkpoints)
    if final is None or int(final["step"]) < job.distill.num_steps:
        _run_workers(job, workers, name=run_directory.name, storage=storage)
        final = load_checkpoint(job.checkpoints)
    initial = load_checkpoint(job.checkpoints, at_most=0)
    if initial is None or final is None or int(final["step"]) != job.distill.num_steps:
        raise RuntimeError(
            f"the workers ended without a first and a final checkpoint in {job.checkpoints}"
        )
    spec = job.store.spec
    for name, state in (("initial", initial), ("distilled", final)):
        images = [state[f"class/{c}/images"].float() for c in range(spec.num_classes)]
        labels = torch.arange(spec.num_classes).repeat_interleave(job.ipc)
        result = SyntheticSet(torch.cat(images), labels, job.synthetic.factor, spec, provenance)
        write_set(run_directory / name, result)
    return {
        "steps": job.distill.num_steps,
        "workers": workers.count,
        "peak_rss_bytes": int(final["peak_rss_bytes"]),
    }


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
    folders, seen = folder_names(result.class_names), dict[int, int]()
    for image, label in zip(result.images, result.labels.tolist(), strict=True):
        number = seen[label] = seen.get(label, -1) + 1
        folder = directory / folders[label]
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        pixels = (image * 255).round().byte().permute(1, 2, 0).squeeze(-1)  # grey has two axes
        Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
        write_atomic(folder / f"{number}.png", buffer.getvalue(), durable=False)
