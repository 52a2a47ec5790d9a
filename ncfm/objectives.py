"""Objectives of the images: distances between the real and the synthetic features.

An `Objective` is made for one descent and called once for each block of classes. To add one: a
class in a module of its own, and an entry of `OBJECTIVES` or its dotted path as the option.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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
    """Divide the features of a class by the median distance between its real ones (the median
    heuristic): <t, x> / m = <t, x / m>, so that t is the same for all classes."""
    kernels: bool = False
    """Whether psi's gradient may come from `ncfm.backend.kernels`."""


class Objective(ABC):
    """The distance of each class's synthetic features y from its real features x."""

    name: ClassVar[str]
    """That of the logged metric."""
    uses_frequencies: ClassVar[bool] = False
    """Whether it depends on t, so that psi has something to learn."""
    raw_features: ClassVar[bool] = False
    """Whether features are compared as they are, even with `DistillConfig.normalize_features`."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.match: Match | None = None
        """The last block of classes, compared at frequencies, for psi's ascent."""

    def compare(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Match:
        """Some classes at the frequencies, as `__call__` compares them: for further ascents."""
        raise NotImplementedError(f"{self.name} uses no frequencies")

    @abstractmethod
    def __call__(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Each class's value (C,), and its gradient with respect to the class's y, (N_c, D) each.

        `x` holds this worker's part of each class's real features, (N_c, D) each; `y` all of each
        class's synthetic features.
        """


class NCFD(Objective):
    """The discrepancy of characteristic functions (paper eq. 7)."""

    name, uses_frequencies = "ncfd", True

    def __call__(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As in `Objective`."""
        self.match = self.compare(x, y)
        values, gradients = self.match.descent(self.comparison.alpha)
        if self.comparison.median:
            gradients = [g / unit for g, unit in zip(gradients, self.units, strict=True)]
        return values, gradients

    def compare(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Match:
        """As in `Objective`."""
        by = self.comparison
        if by.median:
            self.units = median_distances(x, by.communicator)
            x, y = ([part / u for part, u in zip(side, self.units, strict=True)] for side in (x, y))
        return Match(x, y, by.t, by.communicator, kernels=by.kernels)


class LinearMMD(Objective):
    """|mean x - mean y|^2, the objective of DM, of features as `DistillConfig` has them."""

    name = "mmd"

    def __call__(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As in `Objective`."""
        means, _ = group_means(x, self.comparison.communicator)
        leaves = [part.detach().requires_grad_() for part in y]
        values = torch.stack([linear_mmd(a, b) for a, b in zip(means, leaves, strict=True)])
        return values.detach(), list(torch.autograd.grad(values.sum(), leaves))


class RawLinearMMD(LinearMMD):
    """The same of raw features, as DM and DANCE have it: long features count more."""

    name, raw_features = "mmd_raw", True


def group_means(x: Sequence[Tensor], communicator: Communicator) -> tuple[Tensor, Tensor]:
    """The mean (C, 1, D) of each class's features over the members of the group, each of which has
    a part of them, (N_c, D); and how many there are, (C,).
    """
    sums = torch.stack([torch.cat([part.sum(0), part.new_full((1,), len(part))]) for part in x])
    total = group_total(sums, communicator)
    return total[:, None, :-1] / total[:, None, -1:], total[:, -1]


@torch.no_grad()
def median_distances(x: Sequence[Tensor], communicator: Communicator) -> Tensor:
    """About the median distance between each class's features, (C,), over the members of the group:
    sqrt(2) times the median distance from the class's mean. 1 for a class of equal features.

    E |x - x'|^2 = 2 E |x - mean|^2, so that this is the median over pairs wherever distances
    concentrate, as they do in many dimensions. It takes N distances in the place of N^2, and of
    classes that workers share D + 1 + N numbers each cross the network.
    """
    means, counts = group_means(x, communicator)
    distances = [(part - mean).norm(dim=-1) for part, mean in zip(x, means, strict=True)]
    if communicator.members > 1:
        distances = _gathered(distances, [int(n) for n in counts.tolist()], communicator)
    medians = 2**0.5 * torch.stack([distance.median() for distance in distances])
    return torch.where(medians > 0, medians, 1)


def _gathered(
    own: Sequence[Tensor], counts: Sequence[int], communicator: Communicator
) -> list[Tensor]:
    """Vectors of these lengths that the members of a group have parts of, joined by a sum: the
    others' places are zero.
    """
    places = own_parts([torch.arange(n, device=own[0].device) for n in counts], communicator)
    whole = [
        part.new_zeros(n).index_copy(0, place, part)
        for part, n, place in zip(own, counts, places, strict=True)
    ]
    return list(communicator.sum_group(torch.cat(whole)).split(list(counts)))


OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (NCFD, LinearMMD, RawLinearMMD)
}
"""By the name that `DistillConfig.objective` has for it."""
