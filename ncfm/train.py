"""The supervised training loop: for the pool's networks, and for networks that judge a synthetic
set.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm.augment import Augment, AugmentConfig, cutmix
from ncfm.images import ImageSource, ImageSpec, to_unit
from ncfm.memory import keep_freed_memory
from ncfm.seeding import keyed_generator

PART_PIXELS = 3 * 2**14  # 48 images at 32 px; at width 128 no activation exceeds 25 MiB


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A supervised training run."""

    epochs: int = 60
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    """Momentum of SGD; AdamW ignores it."""
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)
    """The learning rate is multiplied by `gamma` after each of these fractions of the epochs."""
    gamma: float = 0.2
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cutmix_prob: float = 0.0
    """Probability that a batch is mixed by CutMix."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones must be fractions within (0, 1), got {self.milestones}")
        if not 0 <= self.cutmix_prob <= 1:
            raise ValueError(f"cutmix_prob must be within [0, 1], got {self.cutmix_prob}")


@dataclass(frozen=True)
class EpochReport:
    """What an epoch of training did."""

    epoch: int
    loss: float
    accuracy: float  # on the augmented training batches


def train(
    model: nn.Module,
    data: ImageSource,
    spec: ImageSpec,
    config: TrainConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    report: Callable[[EpochReport], None] | None = None,
    tail: ImageSource | None = None,
    tail_epochs: int = 0,
) -> nn.Module:
    """Train the model in place on labelled images, hard (N,) or soft (N, classes); returns it in
    eval mode. The last `tail_epochs` of the epochs walk through `tail` (curation's fine-tuning).

    Every draw comes from (seed, purpose, epoch). Raises ValueError on an empty source and
    FloatingPointError, with the epoch, if the loss is no longer finite.
    """
    if len(data) == 0 or (tail is not None and len(tail) == 0):
        raise ValueError("there is no image to train on")
    keep_freed_memory()
    model.to(device).train()
    part_size = _part_size(model, spec, device)
    optimizer, augment = _optimizer(model, config), Augment(config.augment)
    for epoch in range(config.epochs):
        lr = config.lr * config.gamma ** sum(epoch >= m * config.epochs for m in config.milestones)
        for group in optimizer.param_groups:
            group["lr"] = lr
        draws = keyed_generator(seed, "train_draws", epoch)
        loss_sum = torch.zeros((), device=device)
        correct = torch.zeros((), device=device)
        source = data if tail is None or epoch < config.epochs - tail_epochs else tail
        for images, labels in source.epoch(
            config.batch_size, keyed_generator(seed, "train_order", epoch)
        ):
            x = spec.normalize(to_unit(images.to(device)))
            targets = _one_hot(labels.to(device), spec.num_classes)
            x = augment.apply(x, augment.draw([draws], len(x)), torch.arange(len(x)))
            if config.cutmix_prob and float(torch.rand((), generator=draws)) < config.cutmix_prob:
                x, targets = cutmix(x, targets, draws)
            optimizer.zero_grad()
            parts = math.ceil(len(x) / (part_size or len(x)))
            for part, target in zip(x.chunk(parts), targets.chunk(parts), strict=True):
                logits = model(part)
                loss = F.cross_entropy(logits, target, reduction="sum")
                (loss / len(x)).backward()
                loss_sum += loss.detach()
                correct += (logits.detach().argmax(1) == target.argmax(1)).sum()
            optimizer.step()
        mean_loss = float(loss_sum) / len(source)
        if mean_loss != mean_loss or mean_loss == float("inf"):
            raise FloatingPointError(
                f"training diverged: the loss of epoch {epoch} is {mean_loss} (lr {lr})"
            )
        if report is not None:
            report(EpochReport(epoch, mean_loss, float(correct) / len(source)))
    return model.eval()


@torch.no_grad()
def accuracy(
    model: nn.Module,
    data: ImageSource,
    spec: ImageSpec,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> float:
    """Top-1 accuracy in [0, 1] of a model in eval mode."""
    model.to(device).eval()
    correct = torch.zeros((), device=device, dtype=torch.long)
    for images, labels in data.epoch(batch_size, None):
        logits = model(spec.normalize(to_unit(images.to(device))))
        correct += (logits.argmax(1) == labels.to(device)).sum()
    return int(correct) / len(data)


def _part_size(model: nn.Module, spec: ImageSpec, device: torch.device | str) -> int | None:
    """Images of a batch that go through the network at a time; None: all.

    On a CPU activations of many MiB cost more than their arithmetic. The gradients of the parts add
    up to that of the batch, unless the network has statistics of the batch.
    """
    if torch.device(device).type != "cpu":
        return None
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return None
    return max(1, PART_PIXELS // spec.image_size**2)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    return labels if labels.ndim == 2 else F.one_hot(labels, num_classes).float()
