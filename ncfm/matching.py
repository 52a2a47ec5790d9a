"""The discrepancy of some classes, and its gradients written out.

What the step needs of features x (real) and y (synthetic) is the gradient with respect to y, for
the images, and with respect to the frequencies t, for psi. Both come from the same cosines and
sines, so that psi's ascent costs one matrix product per side on top of the descent, and neither
needs the graph of the extractor. Suffixes: N samples, D features, K frequencies, C classes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncfm.communication import Communicator, group_total, own_parts
from ncfm.discrepancy import CF, CFSums, cf_from_sums, linear_mmd, ncfd
from ncfm.frequencies import FrequencyConfig, psi_objective
from ncfm.kernels import can_sum_draws, scale_gradient
from ncfm.linalg import product

BLOCK_FREQS = 256  # frequencies whose gradient is there at a time


class Waves(NamedTuple):
    """cos<t_k, x_n> and sin<t_k, x_n>, each (N, K)."""

    cos: Tensor
    sin: Tensor

    def sums(self) -> Tensor:
        """The CF sums and N, (2 K + 1,): they add over samples and workers."""
        size = self.cos.new_full((1,), len(self.cos))
        return torch.cat([self.cos.sum(0), self.sin.sum(0), size])

    def angle_gradient(self, slope: Tensor) -> Tensor:
        """Of a function of the sums of cosines and of sines, with this slope (2, K), w.r.t. the
        angles <t_k, x_n>: (N, K). Times t, it is the gradient w.r.t. x; transposed, times x, that
        w.r.t. t.
        """
        return self.cos * slope[1] - self.sin * slope[0]


def waves(x: Tensor, t: Tensor) -> Waves:
    """Of samples x (N, D) at frequencies t (K, D)."""
    angles = product(x, t.mT)
    return Waves(angles.cos(), angles.sin())


class Match:
    """Real and synthetic features of some classes, compared at frequencies t (K, D).

    Args:
        x: this member's part of each class's real features, (N_c, D) each.
        y: each class's synthetic features, all of them, on every member of the group.
        kernels: whether psi's gradient may come from `ncfm.kernels`.
    """

    def __init__(
        self,
        x: Sequence[Tensor],
        y: Sequence[Tensor],
        t: Tensor,
        communicator: Communicator,
        *,
        kernels: bool = False,
    ) -> None:
        self.x, self.y, self.t, self.communicator = x, y, t, communicator
        self.kernels = kernels
        self.waves_x, self.waves_y = ([waves(part, t) for part in side] for side in (x, y))
        self.sums_x = group_total(torch.stack([w.sums() for w in self.waves_x]), communicator)
        self.sums_y = torch.stack([w.sums() for w in self.waves_y])
        self.phi_x, self.phi_y = self._cf(self.sums_x), self._cf(self.sums_y)

    def _cf(self, sums: Tensor) -> CF:
        k = len(self.t)
        parts = CFSums(*sums.split([k, k, 1], -1))
        return CF(*(part.requires_grad_() for part in cf_from_sums(parts)))

    def descent(self, alpha: float) -> tuple[Tensor, list[Tensor]]:
        """NCFD of each class (C,), and the gradient of each w.r.t. its y, (N_c, D)."""
        values = ncfd(self.phi_x, self.phi_y, alpha)
        (slopes,) = _sum_slopes(values, (self.phi_y, self.sums_y))
        gradients = [
            product(w.angle_gradient(slope), self.t)
            for w, slope in zip(self.waves_y, slopes, strict=True)
        ]
        return values.detach(), gradients

    def objective(self, config: FrequencyConfig, alpha: float) -> Tensor:
        """What psi ascends, for each class (C,); its slopes are kept for `scale_gradients`."""
        sizes = self.sums_x[:, -1:], self.sums_y[:, -1:]
        values = psi_objective(self.phi_x, self.phi_y, *sizes, config, alpha)
        sides = (self.phi_x, self.sums_x), (self.phi_y, self.sums_y)
        self._slopes = _sum_slopes(values, *sides)
        return values.detach()

    def scale_gradients(self, components: int) -> Iterator[Tensor]:
        """This member's share of the gradient of each class's objective w.r.t. the log-scales of
        the components (M, D), of K / M neighbouring frequencies each: since t = sigma z, the sum of
        t times the gradient w.r.t. t. Some components at a time: what is added up stays in the
        cache, and nothing of shape (K, D) is made.
        """
        # All members have all of y: each counts its part alone, as it has its part of x.
        mine = [Waves(*own_parts(w, self.communicator)) for w in self.waves_y]
        own_y = own_parts(self.y, self.communicator)
        for c, (slope_x, slope_y) in enumerate(zip(*self._slopes, strict=True)):
            sides = (self.waves_x[c], slope_x, self.x[c]), (mine[c], slope_y, own_y[c])
            if self.kernels and can_sum_draws(self.t):
                yield scale_gradient(sides, self.t, components)
                continue
            angles = torch.cat([w.angle_gradient(slope) for w, slope, _ in sides])
            features = torch.cat([samples for _, _, samples in sides])
            draws = len(self.t) // components
            rows = max(1, BLOCK_FREQS // draws) * draws
            parts = [
                product(angle.mT, features).mul_(t).unflatten(0, (-1, draws)).sum(1)
                for angle, t in zip(angles.split(rows, 1), self.t.split(rows), strict=True)
            ]
            yield torch.cat(parts)


def _sum_slopes(values: Tensor, *sides: tuple[CF, Tensor]) -> list[Tensor]:
    """Of values (C,) of CFs, each from sums (C, 2 K + 1), w.r.t. those of cosines and of sines: (C,
    2, K) each.
    """
    slopes = torch.autograd.grad(values.sum(), [part for phi, _ in sides for part in phi])
    pairs = torch.stack(slopes, 1).split(2, 1)
    return [pair / sums[:, None, -1:] for pair, (_, sums) in zip(pairs, sides, strict=True)]


def match_means(
    x: Sequence[Tensor], y: Sequence[Tensor], communicator: Communicator
) -> tuple[Tensor, list[Tensor]]:
    """As `Match.descent`, with DM's linear MMD in the place of NCFD."""
    sums = torch.stack([torch.cat([part.sum(0), part.new_full((1,), len(part))]) for part in x])
    total = group_total(sums, communicator)
    means = total[:, None, :-1] / total[:, None, -1:]
    leaves = [part.detach().requires_grad_() for part in y]
    values = torch.stack([linear_mmd(a, b) for a, b in zip(means, leaves, strict=True)])
    return values.detach(), list(torch.autograd.grad(values.sum(), leaves))
