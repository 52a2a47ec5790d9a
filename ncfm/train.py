"""The supervised training loop: of the pool's networks, and of those that evaluate a set."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm.augment import Augment, AugmentConfig, cutmix
from ncfm.backend.kernels import kernel_logits
from ncfm.backend.memory import keep_freed_memory
from ncfm.backend.threads import Map, thread_map
from ncfm.images import ImageSource, ImageSpec, to_device, to_unit
from ncfm.models.libraries import LibraryClassifier
from ncfm.seeding import global_generator, keyed_generator, keyed_seed
from ncfm.training_state import TrainingState, WeightAverages, load_state, pack_state

PART_PIXELS = 2**15  # 32 images at 32 px; at width 128 no activation exceeds 16 MiB

Gradients = tuple[Tensor | None, ...]


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
    schedule: Literal["steps", "cosine"] = "steps"
    """Learning rate of an epoch. steps: multiplied by `gamma` at each of the `milestones`. cosine:
    lr (1 + cos(pi epoch / epochs)) / 2."""
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)
    """The learning rate is multiplied by `gamma` after each of these fractions of the epochs."""
    gamma: float = 0.2
    ema: float | None = None
    """Decay of an exponential moving average of the weights, updated after every batch; the trained
    network has the averaged weights. None: those of the last batch."""
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
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be within (0, 1), got {self.ema}")


def released_training(epochs: int) -> TrainConfig:
    """The released code's training on a small set, in so many epochs (there 2000)."""
    return TrainConfig(
        epochs=epochs,
        batch_size=128,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.01,  # AdamW's own default, which the released code leaves as it is
        cutmix_prob=0.5,
        milestones=(0.2, 0.4, 0.6, 0.8),
        gamma=0.5,
        augment=AugmentConfig(strategy="flip_color_crop_scale_rotate", always="flip_color"),
    )


@dataclass(frozen=True)
class EpochReport:
    """Loss and accuracy of one epoch of training."""

    epoch: int
    loss: float
    accuracy: float  # on the augmented training batches


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return config.lr * config.gamma ** sum(epoch >= m * config.epochs for m in config.milestones)


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
    threads: int = 1,
    on_batch: Callable[[float], None] | None = None,
    save: Callable[[TrainingState], None] | None = None,
    resume: Mapping[str, Tensor] | None = None,
    relabel: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> nn.Module:
    """Train the model in place on labelled images, hard (N,) or soft (N, classes); returns it in
    eval mode. The last `tail_epochs` of the epochs walk through `tail` (curation's fine-tuning).

    Every draw comes from (seed, purpose, epoch). `threads` share the parts of a batch, and the
    result is the same on any number (while torch.get_num_threads() is 1). Raises ValueError on an
    empty source and FloatingPointError, with the epoch, if the loss is no longer finite.

    Args:
        on_batch: called after every batch with the number of epochs done, a fraction among them.
        report: called after every epoch; the model then has the weights that it would be returned
            with (the averaged ones, with `ema`), in training mode.
        save: called after every epoch and `report`, with all that the epochs to come depend on.
        relabel: the labels (N, classes) of the augmented and mixed images (N, C, H, W) of a batch,
            from these and from the labels that they had; not asked for in the epochs of the tail.
        resume: such a state; training continues with the next epoch, and ends with the same bits.
    """
    if len(data) == 0 or (tail is not None and len(tail) == 0):
        raise ValueError("there is no image to train on")
    keep_freed_memory()
    run = _Training(model, spec, config, device, on_batch)
    with thread_map(threads) as each, global_generator(keyed_seed(seed, "train_layers"), device):
        for epoch in range(run.restore(resume), config.epochs):
            source = data if tail is None or epoch < config.epochs - tail_epochs else tail
            relabel_views = relabel if source is data else None
            done = run.epoch(epoch, source, seed, each, relabel_views)
            if report is not None:
                run.averages.swap()
                report(done)
                run.averages.swap()
            if save is not None:
                save(pack_state(epoch + 1, model, run.optimizer, run.averages, device))
    run.averages.swap()
    return model.eval()


class _Training:
    """A model in training: its optimizer, averaged weights, and one epoch."""

    def __init__(
        self,
        model: nn.Module,
        spec: ImageSpec,
        config: TrainConfig,
        device: torch.device | str,
        on_batch: Callable[[float], None] | None,
    ) -> None:
        self.model, self.spec, self.config, self.device = model, spec, config, device
        self.on_batch = on_batch
        model.to(device).train()
        self.part_size = _part_size(model, spec, device)
        self.optimizer, self.augment = _optimizer(model, config), Augment(config.augment)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.kernels = kernel_logits(model, training=True)
        self.forward = self.kernels or model
        self.averages = WeightAverages(self.parameters, config.ema)

    def restore(self, state: Mapping[str, Tensor] | None) -> int:
        """Continue from a state; returns the number of epochs done."""
        if state is None:
            return 0
        done = load_state(state, self.model, self.optimizer, self.averages, self.device)
        if self.kernels is not None:
            self.kernels.refresh()
        return done

    def epoch(
        self,
        epoch: int,
        source: ImageSource,
        seed: int,
        each: Map,
        relabel: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> EpochReport:
        """Train on every image once. Raises FloatingPointError if the loss is not finite."""
        lr, done = learning_rate(self.config, epoch), 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        draws = keyed_generator(seed, "train_draws", epoch)
        order = keyed_generator(seed, "train_order", epoch)
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for images, labels in source.epoch(self.config.batch_size, order):
            x, y = self._views(images, labels, draws)
            if relabel is not None:
                y = relabel(x, y)
            self.optimizer.zero_grad()
            parts, sizes = _parts(len(x), self.part_size), itertools.repeat(len(x))
            for loss, right, gradients in each(
                self._gradients, x.chunk(parts), y.chunk(parts), sizes
            ):
                loss_sum += loss
                correct += right
                _add(self.parameters, gradients)
            self.optimizer.step()
            if self.kernels is not None:
                self.kernels.refresh()
            self.averages.update()
            done += len(x)
            if self.on_batch is not None:
                self.on_batch(epoch + done / len(source))
        mean_loss = float(loss_sum) / len(source)
        if mean_loss != mean_loss or mean_loss == float("inf"):
            raise FloatingPointError(
                f"training diverged: the loss of epoch {epoch} is {mean_loss} (lr {lr})"
            )
        return EpochReport(epoch, mean_loss, float(correct) / len(source))

    def _views(
        self, images: Tensor, labels: Tensor, draws: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A batch as the network sees it: normalised, augmented, mixed, labels (N, classes)."""
        x = self.spec.normalize(to_unit(to_device(images, self.device)))
        y = _one_hot(to_device(labels, self.device), self.spec.num_classes)
        x = self.augment.apply(x, self.augment.draw([draws], len(x)), torch.arange(len(x)))
        mix = self.config.cutmix_prob
        if mix and float(torch.rand((), generator=draws)) < mix:
            x, y = cutmix(x, y, draws)
        return x, y

    def _gradients(
        self, images: Tensor, targets: Tensor, size: int
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Loss sum, number correct and gradients of one micro-batch of a batch of `size`."""
        with torch.enable_grad():
            logits = self.forward(images)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            gradients = torch.autograd.grad(loss / size, self.parameters, allow_unused=True)
        right = (logits.detach().argmax(1) == targets.argmax(1)).sum()
        return loss.detach(), right, gradients


def _part_size(model: nn.Module, spec: ImageSpec, device: torch.device | str) -> int | None:
    """Images of a batch that go through the network at a time, at most; None: all.

    On a CPU activations of many MiB cost more than their arithmetic. The gradients of the parts add
    up to that of the batch, unless the network has statistics of the batch, or draws.
    """
    if torch.device(device).type != "cpu" or isinstance(model, LibraryClassifier):
        return None
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return None
    return max(1, PART_PIXELS // spec.image_size**2)


def _parts(count: int, size: int | None) -> int:
    """Parts of so many images: a power of two, which threads share evenly."""
    return 1 if size is None else 2 ** math.ceil(math.log2(max(1, count / size)))


def _add(parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            # fused optimisers take it to lie in memory as the parameter does
            p.grad = gradient.contiguous() if p.grad is None else p.grad + gradient


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
