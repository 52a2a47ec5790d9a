"""psi's gradient, summed over classes and workers: the same number in whatever order.

Gradients are added up with respect to psi's log-scales (M, D), class by class, and go through psi
once. Each class's part is rounded to `GRADIENT_GRID` and summed in float64, which is exact.
"""

import torch
from torch import Tensor

from ncfm.communication import Communicator
from ncfm.frequencies import FrequencyConfig
from ncfm.matching import Match

GRADIENT_GRID = 2.0**-44
"""Each class's part of psi's gradient is rounded to multiples of this, far below Adam's epsilon of
1e-8. In float64, sums of such numbers are exact up to 2^53 of it, 512."""


class PsiGradient:
    """The gradient of psi's objective, the mean over all classes, with respect to its log-scales
    (M, D), and the objective of each class that was added.
    """

    def __init__(self, log_scales: Tensor | None, num_classes: int) -> None:
        assert log_scales is not None  # a fixed sampler does not ascend
        self.log_scales, self.unit = log_scales, GRADIENT_GRID * num_classes
        self.total = torch.zeros_like(log_scales, dtype=torch.float64, requires_grad=False)
        self._values: list[Tensor] = []

    @property
    def values(self) -> Tensor:
        """The objective of each class that was added, (C,)."""
        return torch.cat(self._values)

    def add(self, match: Match, config: FrequencyConfig, alpha: float) -> None:
        """Accumulate these classes' gradient, of the real against the synthetic features."""
        self._values.append(match.objective(config, alpha))
        match.add_scale_gradients(self.total, self.unit)

    def backward(self, communicator: Communicator) -> None:
        """All-reduce, then backpropagate into psi's parameters."""
        mean = communicator.sum_all(self.total) * GRADIENT_GRID
        self.log_scales.backward(mean.to(self.log_scales.dtype))
