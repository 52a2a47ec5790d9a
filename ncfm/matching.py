"""The discrepancy of some classes, and its gradients written out.

What the step needs of features x (real) and y (synthetic) is the gradient with respect to y, for
the images, and with respect to the frequencies t, for psi. Both come from the same cosines and
sines, so that psi's ascent costs one matrix product per side on top of the descent, and neither
needs the graph of the extractor. That is why they are not left to autograd: psi adds 0.13 s to
this step with PyTorch's layers, and 1.54 s to the reference loop, which uses autograd (32 px, 10
classes: tests/benchmarks/results/step.csv, `eager` and `reference`).

Suffixes: N samples, D features, K frequencies, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncfm.backend.kernels import add_scale_gradient, can_sum_draws
from ncfm.backend.products import product
from ncfm.communication import Communicator, group_total, own_parts
from ncfm.discrepancy import CF, CFSums, cf_from_sums, ncfd, ncfd_gradient
from ncfm.frequencies import FrequencyConfig, psi_objective, psi_objective_gradient

BLOCK_FREQS = 256  # frequencies whose gradient is there at a time
GROUP_SAMPLES = {"cpu": 1, "cuda": 2**14}
"""Samples of classes that are computed on together: a CPU's cache has room for one class, and many
small operations cost a GPU their launches.
"""


class CosSin(NamedTuple):
    """cos<t_k, x_n> and sin<t_k, x_n>, each (C, N, K)."""

    cos: Tensor
    sin: Tensor

    def sums(self) -> Tensor:
        """The CF sums and N, (C, 2 K + 1): they add over samples and workers."""
        classes, size, _ = self.cos.shape
        sizes = self.cos.new_full((classes, 1), size)
        return torch.cat([self.cos.sum(1), self.sin.sum(1), sizes], 1)

    def angle_gradient(self, of_sums: Tensor) -> Tensor:
        """From the gradient (C, 2, K) of a function w.r.t. the sums of cosines and of sines to that
        w.r.t. the angles <t_k, x_n>, (C, N, K). Times t, it is the gradient w.r.t.
        x; transposed, times x, that w.r.t. t.
        """
        return self.cos * of_sums[:, 1:] - self.sin * of_sums[:, :1]


def cos_sin(x: Tensor, t: Tensor) -> CosSin:
    """Of samples x (C, N, D) at frequencies t (K, D)."""
    angles = product(x, t.mT)
    return CosSin(angles.cos(), angles.sin())


class Match:
    """Real and synthetic features of some classes, compared at frequencies t (K, D).

    Args:
        x: this member's part of each class's real features, (N_c, D) each.
        y: each class's synthetic features, all of them, on every member of the group.
        kernels: whether native kernels may compute psi's gradient.
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
        self.t, self.communicator, self.kernels = t, communicator, kernels
        # Neighbouring classes of the same sizes, (C, N, D) a group.
        self.groups = _same_sizes(x, y, GROUP_SAMPLES.get(t.device.type, GROUP_SAMPLES["cuda"]))
        self.x, self.y = ([stack(side[group]) for group in self.groups] for side in (x, y))
        self.cos_sin_x, self.cos_sin_y = (
            [cos_sin(part, t) for part in side] for side in (self.x, self.y)
        )
        self.sums_x = group_total(torch.cat([w.sums() for w in self.cos_sin_x]), communicator)
        self.sums_y = torch.cat([w.sums() for w in self.cos_sin_y])
        self.phi_x, self.phi_y = self._cf(self.sums_x), self._cf(self.sums_y)

    def _cf(self, sums: Tensor) -> CF:
        k = len(self.t)
        return cf_from_sums(CFSums(*sums.split([k, k, 1], -1)))

    def descent(self, alpha: float) -> tuple[Tensor, list[Tensor]]:
        """NCFD of each class (C,), and the gradient of each w.r.t. its y, (N_c, D)."""
        of_sums = gradient_wrt_sums(ncfd_gradient(self.phi_x, self.phi_y, alpha)[1], self.sums_y)
        gradients = [
            gradient
            for group, w in zip(self.groups, self.cos_sin_y, strict=True)
            for gradient in product(w.angle_gradient(of_sums[group]), self.t)
        ]
        return ncfd(self.phi_x, self.phi_y, alpha), gradients

    def objective(self, config: FrequencyConfig, alpha: float) -> Tensor:
        """What psi ascends, for each class (C,); `add_scale_gradients` needs it called before."""
        sizes = self.sums_x[:, -1:], self.sums_y[:, -1:]
        of_x, of_y = psi_objective_gradient(self.phi_x, self.phi_y, *sizes, config, alpha)
        self._of_sums = gradient_wrt_sums(of_x, self.sums_x), gradient_wrt_sums(of_y, self.sums_y)
        return psi_objective(self.phi_x, self.phi_y, *sizes, config, alpha)

    def add_scale_gradients(self, total: Tensor, unit: float) -> None:
        """Add to total (M, D) this member's share of the gradient of each class's objective w.r.t.
        the log-scales of the M components, of K / M neighbouring frequencies each. What is added is
        in units, and whole: in float64 the total does not depend on the order.

        Since t = sigma z, the gradient is the sum of t times that w.r.t. t, of some components at a
        time: what is added up stays in the cache, and nothing of shape (K, D) is made.
        """
        for number, group in enumerate(self.groups):
            of_sums_x, of_sums_y = (of_sums[group] for of_sums in self._of_sums)
            # All members have all of y: each counts its part alone, as it has its part of x.
            *cos_sin, own_y = own_parts(
                [*self.cos_sin_y[number], self.y[number]], self.communicator, dim=1
            )
            sides = (
                (self.cos_sin_x[number], of_sums_x, self.x[number]),
                (CosSin(*cos_sin), of_sums_y, own_y),
            )
            add_scale_gradients(total, unit, sides, self.t, kernels=self.kernels)


Side = tuple[CosSin, Tensor, Tensor]
"""Samples of some classes at frequencies t: cosines and sines, the gradient (C, 2, K) w.r.t. the
sums of both, and the samples (C, N, D)."""


def add_scale_gradients(
    total: Tensor, unit: float, sides: Sequence[Side], t: Tensor, *, kernels: bool
) -> None:
    """As `Match.add_scale_gradients`, of classes of the same sizes."""
    if kernels and can_sum_draws(t):
        for c in range(len(sides[0][1])):
            of_class = [((w.cos[c], w.sin[c]), of_sums[c], part[c]) for w, of_sums, part in sides]
            add_scale_gradient(total, unit, of_class, t)
        return
    draws = len(t) // len(total)
    rows = max(1, BLOCK_FREQS // draws) * draws
    angles = torch.cat([w.angle_gradient(of_sums) for w, of_sums, _ in sides], 1)
    features = torch.cat([samples for _, _, samples in sides], 1)
    parts = [
        product(angle.mT, features).mul_(block).unflatten(1, (-1, draws)).sum(2)
        for angle, block in zip(angles.split(rows, 2), t.split(rows), strict=True)
    ]
    total += torch.cat(parts, 1).div_(unit).round_().sum(0, dtype=total.dtype)


def _same_sizes(x: Sequence[Tensor], y: Sequence[Tensor], samples: int) -> list[slice]:
    """Neighbouring classes of the same sizes, up to so many samples together, but at least one."""
    sizes = [(len(a), len(b)) for a, b in zip(x, y, strict=True)]
    groups, start = [], 0
    for end in range(1, len(sizes) + 1):
        together = (end + 1 - start) * sum(sizes[start])
        if end == len(sizes) or sizes[end] != sizes[start] or together > samples:
            groups.append(slice(start, end))
            start = end
    return groups


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """(C, N, D); one alone is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def gradient_wrt_sums(gradient: CF, sums: Tensor) -> Tensor:
    """From the gradient w.r.t. a CF to that w.r.t. the sums (C, 2 K + 1) that it is from, of
    cosines and of sines: (C, 2, K).
    """
    return torch.stack(gradient, 1) / sums[:, None, -1:]
