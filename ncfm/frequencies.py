"""Where the characteristic functions are compared: the frequency samplers, fixed and learned (psi).

Both have one interface: `sampler(generator)` gives frequencies t of shape (K, D). The learned one
is a scale mixture of normals (paper 4.2.2): component m has scales sigma_m = psi(eps_m) > 0 in
every feature dimension, and each of its draws is t = sigma_m * z with z ~ N(0, I).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm.discrepancy import (
    CF,
    ncfd,
    ncfd_slopes,
    sampling_floor,
    smooth_sqrt,
    smooth_sqrt_slope,
    squared_difference,
)
from ncfm.seeding import global_generator


@dataclass(frozen=True, kw_only=True)
class FrequencyConfig:
    """How frequencies are drawn, and how psi is trained."""

    sampler: Literal["gaussian", "psi"] = "gaussian"
    """`gaussian`: fixed N(0, sigma^2 I). `psi`: the paper's learned scale mixture, which no setting
    that was tried makes better than the fixed sampler (ncfm/STUDY.md)."""
    num_freqs: int = 1024
    """K, the number of frequencies of a step (paper: 1024)."""
    num_components: int = 64
    """M, the number of mixture components of psi; each gives K / M frequencies (paper: K / 16)."""
    sigma: float = 1.0
    """Scale of the fixed sampler, and the scale at which psi starts."""
    per_network: bool = False
    """A psi for each network of the pool, which learns in its steps; else one for all, though a
    feature dimension means another thing in every network."""
    max_ratio: float = 3.0
    """psi keeps every scale within [sigma / max_ratio, sigma * max_ratio]; unbounded, it runs away.
    """
    objective: Literal["ncfd", "excess", "ratio"] = "ratio"
    """What psi maximises. `ncfd`: the paper's. `excess`: the discrepancy beyond the sampling floor.
    `ratio`: the discrepancy in units of the sampling floor."""
    lr: float = 1e-3
    """Learning rate of psi's ascent (Adam)."""
    ascents: int = 1
    """Ascent steps per distillation step."""
    noise_dim: int = 32
    """Dimension of eps, psi's input."""
    hidden: int = 128
    """Width of psi's hidden layer."""

    def __post_init__(self) -> None:
        for name in ("num_freqs", "num_components", "ascents", "noise_dim", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sampler == "psi" and self.num_freqs % self.num_components:
            raise ValueError(
                f"num_freqs must be a multiple of num_components, "
                f"got {self.num_freqs} and {self.num_components}"
            )
        for name in ("sigma", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.max_ratio > 1:
            raise ValueError(f"max_ratio must be greater than 1, got {self.max_ratio}")


class GaussianFrequencies(nn.Module):
    """Fixed t ~ N(0, sigma^2 I). No parameters."""

    def __init__(self, config: FrequencyConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim

    def forward(self, generator: torch.Generator) -> Tensor:
        """Frequencies of shape (K, D) on the generator's device."""
        z = torch.randn(
            self.config.num_freqs, self.dim, generator=generator, device=generator.device
        )
        return z.mul_(self.config.sigma)


class ScaleMixture(nn.Module):
    """psi: t = sigma_m * z, sigma_m = sigma * max_ratio ** tanh(mlp(eps_m)) (paper 4.2.2, with
    bounded scales).
    """

    def __init__(self, config: FrequencyConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.hidden, self.out = (
            nn.Linear(config.noise_dim, config.hidden),
            nn.Linear(config.hidden, dim),
        )
        with (
            torch.no_grad()
        ):  # start close to the fixed sampler: scales within a few percent of sigma
            self.out.weight.mul_(0.1)
            self.out.bias.zero_()

    def log_scales(self, noise: Tensor) -> Tensor:
        """log sigma of shape (M, D) from noise (M, noise_dim)."""
        bounded = torch.tanh(self.out(F.silu(self.hidden(noise))))
        return math.log(self.config.sigma) + math.log(self.config.max_ratio) * bounded

    def scales(self, noise: Tensor) -> Tensor:
        """sigma of shape (M, D) from noise (M, noise_dim)."""
        return self.log_scales(noise).exp()

    def forward(self, generator: torch.Generator) -> Tensor:
        """Frequencies of shape (K, D), K / M draws from each of M components, with psi's graph."""
        log_scales, z = self._draw(generator)
        return (log_scales.exp()[:, None] * z).flatten(0, 1)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same frequencies t without a graph, and log sigma (M, D) with psi's. Since dt / dlog
        sigma = t, a gradient needs nothing of shape (K, D) beside t (`Match.add_scale_gradients`).
        """
        log_scales, z = self._draw(generator)
        return z.mul_(log_scales.detach().exp()[:, None]).flatten(0, 1), log_scales

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """log sigma (M, D), and z (M, K / M, D)."""
        m, device = self.config.num_components, generator.device
        noise = torch.randn(m, self.config.noise_dim, generator=generator, device=device)
        z = torch.randn(m, self.config.num_freqs // m, self.dim, generator=generator, device=device)
        dtype = self.out.weight.dtype
        return self.log_scales(noise.to(dtype)), z.to(dtype)


def build_sampler(
    config: FrequencyConfig, dim: int, generator: torch.Generator
) -> GaussianFrequencies | ScaleMixture:
    """The sampler of a configuration for features of dimension dim; psi's initial weights from the
    generator.
    """
    if config.sampler == "gaussian":
        return GaussianFrequencies(config, dim)
    with global_generator(int(torch.randint(2**62, (), generator=generator))):
        return ScaleMixture(config, dim)


def psi_objective(
    x: CF,
    y: CF,
    real_count: Tensor | int,
    synthetic_count: Tensor | int,
    config: FrequencyConfig,
    alpha: float,
) -> Tensor:
    """What psi ascends, shape (...).

    Plain NCFD rewards high frequencies, where a small synthetic set differs from the real one by
    sampling noise alone; the other two subtract or divide out that noise (see `sampling_floor`).
    """
    if config.objective == "ncfd":
        return ncfd(x, y, alpha)
    difference, floor = squared_difference(x, y), sampling_floor(x, real_count, synthetic_count)
    if config.objective == "excess":
        return (difference - floor).mean(-1)
    return smooth_sqrt(difference / (floor + 1e-6)).mean(-1)


def psi_slopes(
    x: CF,
    y: CF,
    real_count: Tensor | int,
    synthetic_count: Tensor | int,
    config: FrequencyConfig,
    alpha: float,
) -> tuple[CF, CF]:
    """Of what psi ascends w.r.t. x and y, each part (..., K); written out as `ncfd_slopes` are."""
    if config.objective == "ncfd":
        return ncfd_slopes(x, y, alpha)
    floor = sampling_floor(x, real_count, synthetic_count)
    if config.objective == "excess":
        of_difference = torch.full_like(floor, 1 / floor.shape[-1])
        of_floor = -of_difference
    else:
        ratio = squared_difference(x, y) / (floor + 1e-6)
        of_difference = smooth_sqrt_slope(ratio) / ((floor + 1e-6) * floor.shape[-1])
        of_floor = -of_difference * ratio
    apart = 2 * of_difference
    spread = of_floor * (floor > 0) * (-2 * (1 / synthetic_count + 1 / real_count))
    real, imag = apart * (x.real - y.real), apart * (x.imag - y.imag)
    return CF(real + spread * x.real, imag + spread * x.imag), CF(-real, -imag)
