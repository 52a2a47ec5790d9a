"""Curation: soft labels for a finished synthetic set, from networks trained on the real images.

The paper's table 1 has numbers with curation, its table 5 without. Soft labels carry knowledge of
the real images that the synthetic images do not hold, and storage that images per class do not
count: results with and without belong into rows of their own.
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
    """How soft labels are made, and how a network learns from them."""

    soft_labels: bool = False
    """Whether a set with soft labels is made and evaluated, beside the one without."""
    networks: int = 20
    """Teachers: so many networks of the pool, or all if there are fewer (released code: 1)."""
    temperature: float = 1.0
    """The teachers' logits are divided by it before the softmax (released code: 1)."""
    keep_class: bool = True
    """An image that the teachers predict as another class keeps its hard label (released code)."""
    per_view: bool = False
    """Also evaluate with labels that the teachers give to every augmented view anew, in rows of
    their own. What is stored for it is the teachers, or a label of each view: `view_label_bytes`.
    """
    hard_fraction: float = 0.05
    """Fine-tuning: the last part of the epochs learns from the hard labels (released code: the last
    100 of 2000 epochs)."""

    def __post_init__(self) -> None:
        if self.networks < 1:
            raise ValueError(f"networks must be at least 1, got {self.networks}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.hard_fraction <= 1:
            raise ValueError(f"hard_fraction must be within [0, 1], got {self.hard_fraction}")


class ViewLabels:
    """Soft labels of augmented views: the teachers' mean softmax on what the network sees.

    Args:
        teachers: networks in memory, each a module of its own. Raises ValueError without any.
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
        """Normalised views (N, C, H, W) and their labels (N, classes), mixed ones too, to soft
        labels (N, classes).
        """
        logits = torch.stack([teacher(views).double() for teacher in self.teachers])
        mean = (logits / self.config.temperature).softmax(-1).mean(0).to(labels.dtype)
        if not self.config.keep_class:
            return mean
        right = mean.argmax(1) == labels.argmax(1)
        return torch.where(right[:, None], mean, labels)


def view_label_bytes(*, epochs: int, images: int, classes: int) -> int:
    """What it takes to store a label of every view in float16: images of every epoch."""
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
    """The teachers' mean softmax on the decoded images, (N * factor^2, classes) float32, rows sum
    to 1.

    One teacher is on the device at a time, and may be the same module with other weights. Raises
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
    """The same images with soft labels beside the hard ones."""
    return replace(synthetic, soft_labels=soft_labels(synthetic, teachers, config, device=device))
