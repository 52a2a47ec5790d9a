"""Frequency samplers, fixed and learned (psi): where the characteristic functions are compared.

All have one interface: `sampler(generator)` gives frequencies t = s z of shape (K, D), z ~ N(0, I).
Since isotropic kernels are scale mixtures of normals, the law of the scale s says which kernel
k(d) = E cos<t, d> the mean squared difference of two CFs belongs to: see `LAWS`. The learned
sampler's scales are those of a mixture (paper 4.2.2): component m has scales sigma_m = psi(eps_m) >
0 in every feature dimension, and each of its draws is t = sigma_m * z.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm.discrepancy import (
    CF,
    ncfd,
    ncfd_gradient,
    sampling_floor,
    smooth_sqrt,
    smooth_sqrt_derivative,
    squared_difference,
)
from ncfm.registry import lookup
from ncfm.seeding import global_generator


@dataclass(frozen=True, kw_only=True)
class FrequencyConfig:
    """How frequencies are drawn, and how psi is trained."""

    sampler: str = "gaussian"
    """`gaussian`: fixed N(0, sigma^2 I), the Gaussian kernel. `mixture`: sigma times each of
    `scales` in turn, the mean of Gaussian kernels. `matern`: Student t frequencies with `nu`
    degrees of freedom, the Matern or, with nu 1, the Laplace kernel. `imq`: the inverse
    multiquadric kernel. `psi`: the paper's learned scale mixture, which no setting that was tried
    makes better than the fixed sampler (tests/benchmarks/study/README.md). Or the dotted path of a
    law of the scales (`ncfm.frequencies.Law`), package.module.function."""
    num_freqs: int = 1024
    """K, the number of frequencies of a step (paper: 1024)."""
    num_components: int = 64
    """M, the number of mixture components of psi; each gives K / M frequencies (paper: K / 16)."""
    sigma: float = 1.0
    """Scale of the fixed samplers, and the scale at which psi starts."""
    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Scales of `mixture`, in units of sigma."""
    nu: int = 3
    """Degrees of freedom of `matern`, twice its smoothness. 1: the Laplace kernel; 3 and 5: Matern
    3/2 and 5/2."""
    bandwidth: Literal["fixed", "median"] = "fixed"
    """`fixed`: sigma as it is. `median`: sigma over the median distance between a class's real
    features under the step's network (the median heuristic)."""
    curriculum_start: float = 1.0
    """From low to high frequencies: all are multiplied by a factor that goes geometrically from
    this at the first step to 1 at step `curriculum_steps`."""
    curriculum_steps: int = 0
    """Steps of this curriculum; 0: none."""
    per_network: bool = False
    """A psi for each network of the pool, which learns in its steps; else one for all of an
    architecture, though a feature dimension means another thing in every network."""
    max_ratio: float = 3.0
    """psi keeps every scale within [sigma / max_ratio, sigma * max_ratio]; unbounded, it runs away.
    """
    objective: Literal["ncfd", "excess", "ratio", "between_classes"] = "ratio"
    """What psi maximises. `ncfd`: the paper's. `excess`: the discrepancy beyond the sampling floor.
    `ratio`: the discrepancy in units of the sampling floor. `between_classes`: the discrepancy of
    the real classes from each other, which a classifier needs, in units of its sampling noise, on
    real images held out from the step; meant for `per_network`."""
    held_out: int = 64
    """With `between_classes`: so many images of a class's real batch, at most half of it, are held
    out for psi, and the synthetic images do not match them."""
    lr: float = 1e-3
    """Learning rate of psi's ascent (Adam)."""
    ascents: int = 1
    """Ascent steps per distillation step."""
    noise_dim: int = 32
    """Dimension of eps, psi's input."""
    hidden: int = 128
    """Width of psi's hidden layer."""

    def __post_init__(self) -> None:
        for name in (
            "num_freqs",
            "num_components",
            "ascents",
            "noise_dim",
            "hidden",
            "nu",
            "held_out",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        lookup("sampler", self.sampler, {**LAWS, "psi": ScaleMixture})
        if self.sampler == "psi" and self.num_freqs % self.num_components:
            raise ValueError(
                f"num_freqs must be a multiple of num_components, "
                f"got {self.num_freqs} and {self.num_components}"
            )
        for name in ("sigma", "lr", "curriculum_start"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.curriculum_steps < 0:
            raise ValueError(f"curriculum_steps must not be negative, got {self.curriculum_steps}")
        if not self.scales or not all(scale > 0 for scale in self.scales):
            raise ValueError(f"scales must be positive numbers, got {self.scales}")
        if not self.max_ratio > 1:
            raise ValueError(f"max_ratio must be greater than 1, got {self.max_ratio}")
        if self.learns_between_classes and self.bandwidth == "median":
            raise ValueError(
                "objective 'between_classes' compares all classes at the same frequencies: "
                f"bandwidth must be 'fixed', got {self.bandwidth!r}"
            )

    @property
    def learns_between_classes(self) -> bool:
        """Whether psi ascends the discrepancy between real classes."""
        return self.sampler == "psi" and self.objective == "between_classes"

    def curriculum(self, step: int) -> float:
        """The factor of all frequencies at a step."""
        if step >= self.curriculum_steps:
            return 1.0
        return float(self.curriculum_start ** (1 - step / self.curriculum_steps))


Law = Callable[[FrequencyConfig, torch.Generator], Tensor]
"""Scales s of K frequencies, (K,), in units of sigma."""


def _normals(config: FrequencyConfig, generator: torch.Generator, count: int) -> Tensor:
    """(K, count)."""
    return torch.randn(config.num_freqs, count, generator=generator, device=generator.device)


def gaussian_law(config: FrequencyConfig, generator: torch.Generator) -> Tensor:
    """s = 1: the Gaussian kernel exp(-sigma^2 |d|^2 / 2)."""
    return torch.ones(config.num_freqs, device=generator.device)


def mixture_law(config: FrequencyConfig, generator: torch.Generator) -> Tensor:
    """s = a_1, a_2, ... in turn: the mean of the kernels exp(-(sigma a)^2 |d|^2 / 2)."""
    turns = torch.arange(config.num_freqs, device=generator.device) % len(config.scales)
    return torch.tensor(config.scales, device=generator.device)[turns]


def matern_law(config: FrequencyConfig, generator: torch.Generator) -> Tensor:
    """s = 1 / sqrt(g), g ~ Gamma(nu / 2, rate nu / 2), which is the mean of nu squared normals: the
    Matern kernel of smoothness nu / 2, for nu = 1 the Laplace kernel exp(-sigma |d|).
    """
    return _normals(config, generator, config.nu).square().mean(1).rsqrt()


def imq_law(config: FrequencyConfig, generator: torch.Generator) -> Tensor:
    """s = sqrt(tau), tau ~ Gamma(1 / 2, rate 1 / 2), which is a squared normal: the inverse
    multiquadric kernel (1 + sigma^2 |d|^2) ** (-1 / 2).
    """
    return _normals(config, generator, 1).squeeze(1).abs()


LAWS: dict[str, Law] = {
    "gaussian": gaussian_law,
    "mixture": mixture_law,
    "matern": matern_law,
    "imq": imq_law,
}
"""By the name that `FrequencyConfig.sampler` has for it."""


class FixedFrequencies(nn.Module):
    """t = sigma s z, z ~ N(0, I), with s by a law of `LAWS`. No parameters."""

    def __init__(self, config: FrequencyConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.law: Law = lookup("sampler", config.sampler, LAWS)

    def forward(self, generator: torch.Generator) -> Tensor:
        """Frequencies of shape (K, D) on the generator's device."""
        z = _normals(self.config, generator, self.dim)
        scales = self.law(self.config, generator)
        return z.mul_(self.config.sigma * scales[:, None])


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
) -> FixedFrequencies | ScaleMixture:
    """The sampler of a configuration for features of dimension dim; psi's initial weights from the
    generator.
    """
    if config.sampler != "psi":
        return FixedFrequencies(config, dim)
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


def psi_objective_gradient(
    x: CF,
    y: CF,
    real_count: Tensor | int,
    synthetic_count: Tensor | int,
    config: FrequencyConfig,
    alpha: float,
) -> tuple[CF, CF]:
    """Gradient of `psi_objective` with respect to both CFs, each part (..., K); written out as
    `ncfd_gradient` is.
    """
    if config.objective == "ncfd":
        return ncfd_gradient(x, y, alpha)
    floor = sampling_floor(x, real_count, synthetic_count)
    if config.objective == "excess":
        of_difference = torch.full_like(floor, 1 / floor.shape[-1])
        of_floor = -of_difference
    else:
        ratio = squared_difference(x, y) / (floor + 1e-6)
        of_difference = smooth_sqrt_derivative(ratio) / ((floor + 1e-6) * floor.shape[-1])
        of_floor = -of_difference * ratio
    factor = 2 * of_difference
    of_phi_x = of_floor * (floor > 0) * (-2 * (1 / synthetic_count + 1 / real_count))
    real, imag = factor * (x.real - y.real), factor * (x.imag - y.imag)
    return CF(real + of_phi_x * x.real, imag + of_phi_x * x.imag), CF(-real, -imag)
