"""Curation: soft labels for a finished synthetic set, from networks trained on the real images.

The paper's table 1 is with curation, its table 5 without. Soft labels add information about the
real images, and storage, beyond the images per class: report results with and without them in
separate rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ncfm.backend.kernels import kernel_logits
from ncfm.models import Classifier
from ncfm.synthetic import SyntheticSet


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Computation of soft labels, and training on them."""

    soft_labels: bool = False
    """Also build and evaluate a set with soft labels."""
    networks: int = 20
    """Teachers: this many networks of the pool, or all if there are fewer (released code: 1)."""
    temperature: float = 1.0
    """Divides the teachers' logits before the softmax (released code: 1)."""
    keep_class: bool = True
    """Keep the hard label of images that the teachers predict as another class (released code)."""
    per_view: bool = False
    """Also evaluate, in separate rows, with teacher labels for every augmented view. This requires
    storing the teachers, or a label per view: `view_label_bytes`."""
    hard_fraction: float = 0.05
    """Fraction of final epochs that fine-tune on hard labels (released code: the last 100 of 2000
    epochs)."""

    def __post_init__(self) -> None:
        if self.networks < 1:
            raise ValueError(f"networks must be at least 1, got {self.networks}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.hard_fraction <= 1:
            raise ValueError(f"hard_fraction must be within [0, 1], got {self.hard_fraction}")


class ViewLabels:
    """Soft labels of augmented views: the teachers' mean softmax on each view.

    Args:
        teachers: separate modules, all kept in memory. Raises ValueError if empty.
    """

    def __init__(
        self,
        teachers: Sequence[Classifier],
        config: CurateConfig,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if not teachers:
            raise ValueError("soft labels need at least one trained network")
        self.config = config
        networks = [teacher.to(device).eval() for teacher in teachers]
        self.teachers = [kernel_logits(each, training=False) or each for each in networks]

    @torch.no_grad()
    def __call__(self, views: Tensor, labels: Tensor) -> Tensor:
        """Map normalised views (N, C, H, W) and their labels (N, classes), possibly mixed, to soft
        labels (N, classes).
        """
        logits = torch.stack([teacher(views).double() for teacher in self.teachers])
        mean = (logits / self.config.temperature).softmax(-1).mean(0).to(labels.dtype)
        if not self.config.keep_class:
            return mean
        right = mean.argmax(1) == labels.argmax(1)
        return torch.where(right[:, None], mean, labels)


def view_label_bytes(*, epochs: int, images: int, classes: int) -> int:
    """Storage in bytes of a float16 soft label per view, i.e. per image and epoch."""
    return 2 * epochs * images * classes


@torch.no_grad()
def soft_labels(
    synthetic: SyntheticSet,
    teachers: Iterable[Classifier],
    config: CurateConfig,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """Mean teacher softmax on the decoded images, (N * factor^2, classes) float32; rows sum to 1.

    One teacher is used at a time, so they may be one module with changing weights. Raises
    ValueError if there is none.
    """
    images = synthetic.source(device=device)
    labels = synthetic.labels.repeat_interleave(synthetic.factor**2)
    total = torch.zeros(len(images), synthetic.spec.num_classes, dtype=torch.float64)
    count = 0
    for teacher in teachers:
        teacher.to(device).eval()
        rows = [
            teacher(synthetic.spec.normalize(part.to(device))).double() / config.temperature
            for part, _ in images.epoch(batch_size, None)
        ]
        total += torch.cat(rows).softmax(1).cpu()
        count += 1
    if not count:
        raise ValueError("soft labels need at least one trained network")
    mean = (total / count).float()
    if config.keep_class:
        hard = torch.nn.functional.one_hot(labels, synthetic.spec.num_classes).float()
        mean = torch.where((mean.argmax(1) == labels)[:, None], mean, hard)
    return mean


def curate(
    synthetic: SyntheticSet,
    teachers: Iterable[Classifier],
    config: CurateConfig,
    *,
    device: torch.device | str = "cpu",
) -> SyntheticSet:
    """Add soft labels to a synthetic set."""
    return replace(synthetic, soft_labels=soft_labels(synthetic, teachers, config, device=device))
