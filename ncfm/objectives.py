"""What the synthetic images descend: distances between the real and the synthetic features.

An `Objective` is made for one descent and called once for each block of classes. To add one: a
class here, an entry of `OBJECTIVES`, and its name in `DistillConfig.objective`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ncfm.communication import Communicator, group_total, own_parts
from ncfm.discrepancy import linear_mmd
from ncfm.matching import Match


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the features of a descent are compared with and by."""

    t: Tensor
    """Frequencies (K, D)."""
    communicator: Communicator
    alpha: float = 0.5
    """Weight of the amplitude against the phase (paper eq. 8)."""
    median: bool = False
    """Divide the features of a class by the median distance of its real ones (the median
    heuristic): <t, x> / m = <t, x / m>, so that t need not be scaled class by class."""
    kernels: bool = False
    """Whether psi's gradient may come from `ncfm.kernels`."""


class Objective(Protocol):
    """The distance of each class's synthetic features y from its real features x."""

    name: ClassVar[str]
    """That of the logged metric."""
    uses_frequencies: ClassVar[bool]
    """Whether it depends on t, so that psi has something to learn."""
    match: Match | None
    """The last block of classes, compared at frequencies, for psi's ascent; None without any."""

    def __init__(self, comparison: Comparison) -> None: ...

    def __call__(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Each class's value (C,), and its gradient with respect to the class's y, (N_c, D) each.

        `x` holds this worker's part of each class's real features, (N_c, D) each; `y` all of each
        class's synthetic features.
        """
        ...


class NCFD:
    """The discrepancy of characteristic functions (paper eq. 7)."""

    name, uses_frequencies = "ncfd", True

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.match: Match | None = None

    def __call__(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As in `Objective`."""
        by = self.comparison
        units = median_distances(x, by.communicator) if by.median else None
        if units is not None:
            x, y = ([a / unit for a, unit in zip(side, units, strict=True)] for side in (x, y))
        self.match = Match(x, y, by.t, by.communicator, kernels=by.kernels)
        values, gradients = self.match.descent(by.alpha)
        if units is not None:
            gradients = [g / unit for g, unit in zip(gradients, units, strict=True)]
        return values, gradients


class MeanMatching:
    """The squared distance of the mean features, a linear MMD: of normalised features, or of raw
    ones as in DM and DANCE (`DistillConfig.normalize_features`).
    """

    name, uses_frequencies, match = "mmd", False, None

    def __init__(self, comparison: Comparison) -> None:
        self.communicator = comparison.communicator

    def __call__(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As in `Objective`."""
        means, _ = group_means(x, self.communicator)
        leaves = [part.detach().requires_grad_() for part in y]
        values = torch.stack([linear_mmd(a, b) for a, b in zip(means, leaves, strict=True)])
        return values.detach(), list(torch.autograd.grad(values.sum(), leaves))


def group_means(x: Sequence[Tensor], communicator: Communicator) -> tuple[Tensor, Tensor]:
    """The mean (C, 1, D) of each class's features over the members of the group, each of which has
    a part of them, (N_c, D); and how many there are, (C,).
    """
    sums = torch.stack([torch.cat([part.sum(0), part.new_full((1,), len(part))]) for part in x])
    total = group_total(sums, communicator)
    return total[:, None, :-1] / total[:, None, -1:], total[:, -1]


@torch.no_grad()
def median_distances(x: Sequence[Tensor], communicator: Communicator) -> Tensor:
    """The median distance of each class's features, (C,): sqrt(2) times the median distance from
    the class's mean, over the members of the group.

    E |x - x'|^2 = 2 E |x - mean|^2, so that this is the median of the pairwise distances wherever
    they concentrate, as they do in many dimensions. It takes N distances in the place of N^2, and
    of a class that workers share D + 1 + N numbers cross the network.
    """
    means, counts = group_means(x, communicator)
    distances = [(part - mean).norm(dim=-1) for part, mean in zip(x, means, strict=True)]
    if communicator.members > 1:
        distances = [
            _gathered(own, int(count), communicator)
            for own, count in zip(distances, counts, strict=True)
        ]
    medians = 2**0.5 * torch.stack([distance.median() for distance in distances])
    return torch.where(medians > 0, medians, 1)  # 0: equal features, which no scale tells apart


def _gathered(own: Tensor, count: int, communicator: Communicator) -> Tensor:
    """The members' parts of one vector (count,), joined by a sum: the others' places are zero."""
    (places,) = own_parts([torch.arange(count, device=own.device)], communicator)
    return communicator.sum_group(own.new_zeros(count).index_copy(0, places, own))


OBJECTIVES: dict[str, type[Objective]] = {"ncfd": NCFD, "mmd": MeanMatching}
"""By the name that `DistillConfig.objective` has for it."""
