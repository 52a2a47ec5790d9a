"""Published methods by name: their objectives and hyperparameters, in one place.

`method` sets the options of `distill`, `frequencies`, `synthetic` and `augment` that define the
method, and the snapshots it needs. It does not set the budget: the pool and its training, steps,
real images per step, and how they are computed. A preset's other values override the method it
names; a method on the command line overrides the preset, and other command-line options override
the method.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ncfm.augment import AugmentConfig
from ncfm.distill import DistillConfig
from ncfm.frequencies import FrequencyConfig
from ncfm.synthetic import SyntheticConfig
from pipeline.runtime.identity import dotted

MethodName = Literal["dm", "dance", "tgdd", "ncfm", "ncfm_psi"]

SPENDING = (
    *("num_steps", "real_batch", "inner_steps", "chunk_size", "graph_images"),
    *("compile", "cuda_graphs", "precision"),
)
"""Fields of `DistillConfig` that no method sets."""

FINE = 128  # px; from this size on, the published settings of the ImageNet subsets apply
IDC_AUGMENT = AugmentConfig(strategy="color_crop_cutout", single=False)
DSA_AUGMENT = AugmentConfig(strategy="color_crop_cutout_flip_scale_rotate", single=True)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Options that a method sets."""

    distill: DistillConfig
    frequencies: FrequencyConfig = field(default_factory=FrequencyConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    augment: AugmentConfig = IDC_AUGMENT
    snapshot_every: int | None = None
    """None: the method uses no snapshots, and ignores existing ones."""


def method(name: str, *, ipc: int, image_size: int) -> Method:
    """Published hyperparameters of a method for these sizes. Raises ValueError if it is unknown.

    Learning rates are for pixels in [0, 1]: published rates for normalised pixels are multiplied by
    the squared standard deviation of the pixels, which is about 1/4.
    """
    match name:
        case "dm":  # random networks (arXiv 2110.04181); lr 1 of normalised pixels, 20 000 steps
            return Method(
                distill=DistillConfig(
                    objective="mmd_raw",
                    normalize_features=False,
                    blend=(0.0, 0.0),
                    calibration=0.0,
                    **_sgd(1 / 16),
                ),
                synthetic=SyntheticConfig(factor=1),
                augment=DSA_AUGMENT,
            )
        case "dance":  # IJCAI 2024; 20 networks, 5 for ImageNet subsets, 10 000 steps
            return Method(distill=DistillConfig(**_dance(ipc, image_size)))
        case "tgdd":  # arXiv 2512.02469; 5 trajectories. Optimizer and rate: as DANCE's
            trajectories: dict[str, Any] = {
                "extractor": "snapshot",
                "calibration_ahead": (0, 6),
                "calibration": 2.5 if ipc < 50 else 0.5,
            }
            return Method(
                distill=DistillConfig(**_dance(ipc, image_size) | trajectories), snapshot_every=1
            )
        # arXiv 2502.20653; 20 networks, 20 000 steps. Its lr of 1e-3 is for AdamW steps once per
        # class that each move all classes, so its effective rate grows with the number of classes.
        case "ncfm":
            return Method(distill=DistillConfig(lr=0.01))
        case "ncfm_psi":  # unbounded, as published; FrequencyConfig's default psi is this project's
            psi = FrequencyConfig(sampler="psi", objective="ncfd", max_ratio=1e4)
            return Method(distill=DistillConfig(lr=0.01), frequencies=psi)
    raise ValueError(f"method must be one of {', '.join(get_args(MethodName))}, got {name!r}")


def _sgd(lr: float) -> dict[str, Any]:
    """Image SGD on the unscaled loss."""
    return {
        "optimizer": "sgd",
        "lr": lr,
        "momentum": 0.5,
        "weight_decay": 0.0,
        "loss_weight": 1.0,
    }


def _dance(ipc: int, image_size: int) -> dict[str, Any]:
    return {
        "objective": "mmd_raw",
        "normalize_features": False,
        "calibration": 1.0,
        **_sgd((0.1 if image_size >= FINE else 0.01) * ipc),
    }


def method_settings(name: str, *, ipc: int, image_size: int) -> dict[str, Any]:
    """Options of a method: dotted name -> value. Raises ValueError if it is unknown."""
    published = method(name, ipc=ipc, image_size=image_size)
    groups = ("distill", "frequencies", "synthetic", "augment")
    values = dotted({group: dataclasses.asdict(getattr(published, group)) for group in groups})
    for spending in SPENDING:
        del values[f"distill.{spending}"]
    if published.snapshot_every is not None:
        values["pretrain.snapshot_every"] = published.snapshot_every
    return values


def method_changes(
    name: str, options: Mapping[str, Any], *, ipc: int, image_size: int
) -> list[str]:
    """The dotted options whose values differ from the named method."""
    settings = method_settings(name, ipc=ipc, image_size=image_size)
    return [key for key, value in settings.items() if options[key] != value]
