"""The method on arrays, in one process: `ncfm.distill` and `ncfm.evaluate`.

`pipeline/` does the same on shards and a cluster, and keeps checkpoints.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ncfm.allocation import Allocation, allocate
from ncfm.arrays import Images, as_arrays, spec_of
from ncfm.augment import AugmentConfig
from ncfm.distill import DistillConfig, Distiller
from ncfm.evaluate import train_and_test
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.images import ImageSpec, InMemoryImages
from ncfm.models import Classifier, ModelConfig, build_model
from ncfm.seeding import keyed_generator, keyed_seed
from ncfm.selection import easy_images, first_images
from ncfm.synthetic import SyntheticConfig, SyntheticSet, initial_images
from ncfm.train import EpochReport, TrainConfig, released_training, train

Report = Callable[[str], None]

REPORT_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How `distill` works where its arguments do not say."""

    networks: int = 2
    """Networks whose features are compared (released code: 20)."""
    training: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            epochs=5, lr=0.02, augment=AugmentConfig(strategy="color_crop", single=False)
        )
    )
    """Training of one of them on the real images."""
    distill: DistillConfig = field(
        default_factory=lambda: DistillConfig(
            num_steps=500, real_batch=128, lr=0.01, calibration=10
        )
    )
    frequencies: FrequencyConfig = field(default_factory=FrequencyConfig)
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(strategy="color_crop_cutout", single=False)
    )
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    ipc_allocation: Allocation = "equal"
    """`equal`: ipc stored images of each class. `proportional`: see `ncfm.allocation`."""


def distill(
    images: Images,
    labels: Tensor | np.ndarray | None = None,
    *,
    ipc: int = 1,
    model: ModelConfig | None = None,
    settings: Settings | None = None,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    report: Report | None = print,
    **options: Any,
) -> SyntheticSet:
    """A few learned images per class that stand in for these.

    Args:
        images: (N, C, H, W), (N, H, W, C) or (N, H, W), uint8 or float in [0, 1], square; or a
            Dataset of (image, label), whose images are arrays as these or PIL images.
        labels: (N,) integers from 0; None if `images` is a Dataset.
        ipc: stored images per class; each holds `settings.synthetic.factor`**2 smaller ones.
        model: the networks' architecture; by default a ConvNet of width 128.
        settings: all else; `options` change fields of `settings.distill` (num_steps=2000, ...).
        class_names: one name per label; by default the Dataset's `classes`, or the numbers.
        seed: every draw follows from it.
        device: by default a GPU if there is one.
        report: called with a line of progress every five seconds; None for silence.

    Raises ValueError on images that are not square, do not fit the labels, or a class without one.
    """
    settings, model = settings or Settings(), model or ModelConfig()
    settings = replace(settings, distill=replace(settings.distill, **options))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pixels, targets, names = as_arrays(images, labels, class_names)
    spec = spec_of(pixels, names)
    counts = torch.bincount(targets, minlength=len(names)).tolist()
    if 0 in counts:
        raise ValueError(f"class {counts.index(0)} has no image; labels count from 0")
    ipcs = allocate(counts, ipc, settings.ipc_allocation)
    progress = _Progress(report)
    pool = _pool(InMemoryImages(pixels, targets), spec, model, settings, seed, device, progress)
    by_class = _matched_images(pixels, targets, pool, spec, settings.distill.easy_fraction)
    first = {
        c: _initial_images(real, c, ipcs[c], pool, spec, settings.synthetic, seed)
        for c, real in by_class.items()
    }
    distiller = Distiller(
        first,
        factor=settings.synthetic.factor,
        spec=spec,
        pool=pool,
        seed=seed,
        config=settings.distill,
        frequencies=settings.frequencies,
        augment=settings.augment,
        device=device,
    )
    _run(distiller, by_class, seed, progress)
    stored = torch.cat([distiller.images[c].detach().float().clamp(0, 1).cpu() for c in by_class])
    of_class = torch.arange(len(names)).repeat_interleave(torch.tensor(ipcs))
    return SyntheticSet(stored, of_class, settings.synthetic.factor, spec, {"seed": seed})


def evaluate(
    synthetic: SyntheticSet,
    images: Images,
    labels: Tensor | np.ndarray | None = None,
    *,
    model: ModelConfig | None = None,
    training: TrainConfig | None = None,
    repeats: int = 1,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[float]:
    """Test accuracies in [0, 1] of `repeats` fresh networks trained on the set, after their last
    epoch; images and labels (of the test set) as in `distill`.
    """
    pixels, targets, _ = as_arrays(images, labels, synthetic.class_names)
    if pixels.shape[1:] != synthetic.images.shape[1:]:
        raise ValueError(
            f"test images are {tuple(pixels.shape[1:])}, those of the set "
            f"{tuple(synthetic.images.shape[1:])}"
        )
    training = training or replace(released_training(1000), schedule="cosine")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return [
        train_and_test(
            synthetic.source(device=device),
            InMemoryImages(pixels, targets),
            synthetic.spec,
            model=model or ModelConfig(),
            training=training,
            seed=keyed_seed(seed, "evaluation", repeat),
            device=device,
        ).accuracy
        for repeat in range(repeats)
    ]


def _matched_images(
    pixels: Tensor, targets: Tensor, pool: ExtractorPool, spec: ImageSpec, fraction: float
) -> dict[int, Tensor]:
    """The real images of each class that are matched: all, or the easy ones."""
    by_class = {c: pixels[targets == c] for c in range(spec.num_classes)}
    if fraction == 1:
        return by_class
    return {c: real[easy_images(pool, real, c, spec, fraction)] for c, real in by_class.items()}


def _initial_images(
    real: Tensor,
    c: int,
    ipc: int,
    pool: ExtractorPool,
    spec: ImageSpec,
    config: SyntheticConfig,
    seed: int,
) -> Tensor:
    count, every = config.real_images_needed(ipc), torch.arange(len(real))
    chosen = first_images(config.choose, pool, real, every, c, spec, count=count, seed=seed)
    return initial_images(real[chosen], ipc, config, keyed_generator(seed, "init_noise", c))


def _run(
    distiller: Distiller, by_class: Mapping[int, Tensor], seed: int, progress: "_Progress"
) -> None:
    """All steps, each on a random batch of every class."""
    steps, size = distiller.config.num_steps, distiller.config.real_batch
    for step in range(steps):
        batches = {c: _real_batch(real, size, seed, step, c) for c, real in by_class.items()}
        progress.update("distill", step + 1, steps, "steps", distiller.update(batches))


def _real_batch(real: Tensor, size: int, seed: int, step: int, c: int) -> Tensor:
    """min(size, images of the class) of its images, each at most once."""
    order = torch.randperm(len(real), generator=keyed_generator(seed, "real_batch", step, c))
    return real[order[:size].sort().values]


def _pool(
    data: InMemoryImages,
    spec: ImageSpec,
    model: ModelConfig,
    settings: Settings,
    seed: int,
    device: torch.device | str,
    progress: "_Progress",
) -> ExtractorPool:
    """The networks, trained one after the other."""

    def fresh(member: int) -> Classifier:
        return build_model(
            model,
            num_classes=spec.num_classes,
            channels=spec.channels,
            image_size=spec.image_size,
            seed=keyed_seed(seed, "pool_network", member),
        )

    def state(network: nn.Module) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}

    epochs, trajectories = settings.training.epochs, []
    for member in range(settings.networks):
        network = fresh(member)
        trajectory, done = [state(network)], member * epochs

        def update(epoch: EpochReport, done: int = done) -> None:
            if epoch.epoch + 1 == epochs or settings.distill.extractor != "blend":
                trajectory.append(state(network))  # noqa: B023 # within this turn of the loop
            values = {"loss": epoch.loss, "accuracy": epoch.accuracy}
            progress.update("pretrain", done + epoch.epoch + 1, settings.networks * epochs,
                "epochs", values)  # fmt: skip

        train(
            network,
            data,
            spec,
            settings.training,
            seed=keyed_seed(seed, "pool_training", member),
            device=device,
            report=update,
        )
        trajectories.append(trajectory)
    return ExtractorPool(fresh(0), trajectories, device=device)


class _Progress:
    """Lines at most every five seconds, and one at the end of a part."""

    def __init__(self, report: Report | None) -> None:
        self.report, self.updated = report, time.monotonic()

    def update(
        self, part: str, done: int, total: int, unit: str, values: Mapping[str, Tensor | float]
    ) -> None:
        now = time.monotonic()
        if self.report is not None and (done == total or now - self.updated >= REPORT_EVERY_S):
            self.updated = now
            text = "  ".join(f"{name} {float(value):.4g}" for name, value in values.items())
            self.report(f"[{part}] {done}/{total} {unit}  {text}")
