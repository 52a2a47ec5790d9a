"""Published methods by name: what the images descend, and how, in one place.

`method` sets the options of `distill`, `frequencies`, `synthetic` and `augment` that make the
method, and the snapshots that it needs. What a run may spend stays as it is: networks of the pool
and their training, steps, real images a step, and how it is computed. A method that a preset names
gives way to the other values of the preset; one that is named on the command line overrides the
preset and gives way to the other options of the command line.
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

FINE = 128  # px, from which the published settings are those of the ImageNet subsets
IDC_AUGMENT = AugmentConfig(strategy="color_crop_cutout", single=False)
DSA_AUGMENT = AugmentConfig(strategy="color_crop_cutout_flip_scale_rotate", single=True)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method fixes."""

    distill: DistillConfig
    frequencies: FrequencyConfig = field(default_factory=FrequencyConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    augment: AugmentConfig = IDC_AUGMENT
    snapshot_every: int | None = None
    """None: the method needs no snapshots; those that there are do not disturb it."""


def method(name: str, *, ipc: int, image_size: int) -> Method:
    """A method's published hyperparameters for these sizes. Raises ValueError if there is no such.

    Rates are those of pixels in [0, 1]. Where a published rate is of normalised pixels, it is
    multiplied by the square of their standard deviation, about 1/4.
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
        # arXiv 2502.20653; 20 networks, 20 000 steps. Its lr of 1e-3 is of an AdamW that steps once
        # a class and moves all classes each time, which is more the more classes there are.
        case "ncfm":
            return Method(distill=DistillConfig(lr=0.01))
        case "ncfm_psi":  # unbounded, as published; this project's psi is FrequencyConfig's
            psi = FrequencyConfig(sampler="psi", objective="ncfd", max_ratio=1e4)
            return Method(distill=DistillConfig(lr=0.01), frequencies=psi)
    raise ValueError(f"method must be one of {', '.join(get_args(MethodName))}, got {name!r}")


def _sgd(lr: float) -> dict[str, Any]:
    """SGD of the images on the loss as it is."""
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
    """What a method sets: dotted option -> value. Raises ValueError if there is no such."""
    found = method(name, ipc=ipc, image_size=image_size)
    groups = ("distill", "frequencies", "synthetic", "augment")
    values = dotted({group: dataclasses.asdict(getattr(found, group)) for group in groups})
    for spending in SPENDING:
        del values[f"distill.{spending}"]
    if found.snapshot_every is not None:
        values["pretrain.snapshot_every"] = found.snapshot_every
    return values


def method_changes(
    name: str, options: Mapping[str, Any], *, ipc: int, image_size: int
) -> list[str]:
    """Which of the dotted options of a run are not those of the method that it names."""
    wanted = method_settings(name, ipc=ipc, image_size=image_size)
    return [key for key, value in wanted.items() if options[key] != value]
