"""The configuration of a distillation."""

import math
from dataclasses import dataclass
from typing import Literal

from ncfm.extractors import ExtractorKind
from ncfm.objectives import OBJECTIVES
from ncfm.registry import lookup


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The matching of synthetic to real images."""

    num_steps: int = 20_000
    """Minmax steps (paper: 20 000)."""
    real_batch: int = 1024
    """Real images per class and step (paper: 1024); a smaller class is used whole."""
    easy_fraction: float = 1.0
    """Match, and start from, only this part of each class's real images: those that the pool's
    trained networks find easiest. Less than 1 may help where very few images are stored."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Learning rate of the images; every class takes exactly one optimiser step per minmax step."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate of a step. constant: lr. cosine: lr (1 + cos(pi step / num_steps)) / 2."""
    momentum: float = 0.5
    """Momentum of the images' SGD; AdamW ignores it."""
    weight_decay: float = 5e-4
    objective: str = "ncfd"
    """What the images descend. `ncfd`: the discrepancy of characteristic functions. `mmd`: the
    squared distance of the mean features, a linear MMD; `mmd_raw`: that of raw features (DM,
    DANCE). Or the dotted path of an `ncfm.objectives.Objective`, package.module.Class."""
    alpha: float = 0.5
    """Weight of the amplitude against the phase (paper eq. 8)."""
    loss_weight: float = 300.0
    """Factor of the matching loss (released code: 300); it matters beside calibration or in SGD."""
    calibration: float = 1.0
    """Weight of the cross-entropy of the synthetic images under the trained network of the step
    (released code: 1, there with optimiser steps of its own); 0: none, which saves its passes."""
    calibration_ahead: tuple[int, int] | None = None
    """Take the cross-entropy from a snapshot that is later on the extractor's trajectory by a
    number of epochs uniform between these two (TGDD: 0 and 6), at most the last; needs snapshots as
    extractors. None: from the trained network (DANCE, NCFM)."""
    extractor: ExtractorKind = "blend"
    """A step's extractor. `blend`: between the initial and the trained weights of a network of the
    pool. `snapshot`: a snapshot of its training (TGDD); `snapshot_blend`: between two of them. Both
    need pretrain.snapshot_every."""
    blend: tuple[float, float] = (0.0, 1.0)
    """A blend is lerp(initial, trained, beta), or of two snapshots, beta uniform between these two
    (paper: 0 and 1). (0, 0): random networks, as DM has them; (1, 1): the trained ones."""
    clip_grad_norm: float | None = None
    """Greatest L2 norm of the gradient of one class's images; none by default."""
    clip_grad_value: float | None = None
    """Greatest absolute value of a pixel's gradient; none by default."""
    normalize_features: bool = True
    """L2-normalise every feature vector, so that one scale of frequencies fits all networks."""
    inner_steps: int = 1
    """Minmax updates per step, all on the features of one real batch, which cost the most; each has
    its own frequencies."""
    chunk_size: int | None = None
    """Images in one pass of the extractor. None: what fits the cache (CPU) or fills the device (see
    `ncfm.backend.features.default_chunk`)."""
    graph_images: int | None = None
    """Keep the graph of at most so many decoded synthetic images of a class; with more, their
    features are computed again, so that memory does not grow with their number. None: 512 at 32 px,
    32 at 128."""
    compile: bool | None = None
    """Compile the extractor. A ConvNet with instance norm, in float32 on a CPU, uses native kernels
    (`ncfm.backend.kernels`, compiled once per machine), everything else torch.compile (half a
    minute). None: where it works (both need a C++ compiler), and torch.compile only in runs of at
    least 500 steps, which win its half a minute back."""
    cuda_graphs: bool = False
    """Replay what torch.compile makes of the extractor as CUDA graphs, which saves launches and
    costs memory. Without effect but on a GPU, where it has not been measured yet."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of all that is computed. `bfloat16`: the extractor alone; features are compared in float32,
    and images and psi are kept in it. On a CPU with bfloat16 instructions (AVX512_BF16, AMX) it
    makes torch.compile's code up to 1.5 times faster, but the native kernels in float32 were faster
    still; what it does to gradients and accuracy: tests/benchmarks/study."""

    def learning_rate(self, step: int) -> float:
        """The images' learning rate of a step, counted from 0."""
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * step / self.num_steps)) / 2
        return self.lr

    def __post_init__(self) -> None:
        for name in ("num_steps", "real_batch", "inner_steps", "chunk_size", "graph_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        lookup("objective", self.objective, OBJECTIVES)
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 < self.easy_fraction <= 1:
            raise ValueError(f"easy_fraction must be within (0, 1], got {self.easy_fraction}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be within [0, 1], got {self.alpha}")
        for name in ("weight_decay", "calibration", "momentum"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.blend[0] <= self.blend[1] <= 1:
            raise ValueError(f"blend must be two rising numbers within [0, 1], got {self.blend}")
        if (ahead := self.calibration_ahead) is not None:
            if not 0 <= ahead[0] <= ahead[1]:
                raise ValueError(f"calibration_ahead must be two rising numbers, got {ahead}")
            if self.extractor == "blend":
                raise ValueError(
                    "calibration_ahead counts from a snapshot of a trajectory: extractor must be "
                    f"'snapshot' or 'snapshot_blend', got {self.extractor!r}"
                )
        for name in ("clip_grad_norm", "clip_grad_value"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
