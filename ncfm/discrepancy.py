"""Characteristic functions (CFs) and the discrepancies between two sets of features.

A CF is kept as its real and imaginary part, so that every function here is plain real arithmetic:
it differentiates, compiles, and adds up over workers. Suffixes: N samples, D feature dimensions, K
frequencies, `...` batch dimensions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class CFSums(NamedTuple):
    """Sufficient statistics of an empirical CF. They add: over samples, chunks, and workers."""

    cos: Tensor  # (..., K): sum_n cos<t_k, x_n>
    sin: Tensor  # (..., K): sum_n sin<t_k, x_n>
    size: Tensor  # (..., 1): samples

    def __add__(self, other: "CFSums") -> "CFSums":  # type: ignore[override]
        return CFSums(self.cos + other.cos, self.sin + other.sin, self.size + other.size)


class CF(NamedTuple):
    """The values phi(t_k) of a characteristic function, each part of shape (..., K)."""

    real: Tensor
    imag: Tensor

    def squared_modulus(self) -> Tensor:
        """|phi(t_k)|^2, shape (..., K)."""
        return self.real.square() + self.imag.square()

    def modulus(self) -> Tensor:
        """|phi(t_k)|, shape (..., K), with a finite derivative at zero."""
        return (self.squared_modulus() + torch.finfo(self.real.dtype).tiny).sqrt()


def cf_sums(x: Tensor, t: Tensor) -> CFSums:
    """CF sums of samples x (..., N, D) at frequencies t (K, D).

    Low-precision features are raised to float32: a mean over a thousand cosines needs more than
    eight bits.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        angles = x.to(dtype) @ t.to(dtype).mT
    count = (
        torch.full_like(angles[..., 0, :1], x.shape[-2])
        if x.shape[-2]
        else angles.new_zeros(*x.shape[:-2], 1)
    )
    return CFSums(angles.cos().sum(-2), angles.sin().sum(-2), count)


def cf_from_sums(sums: CFSums) -> CF:
    """phi(t) = mean_n exp(j <t, x_n>)  (paper eq. 5)."""
    return CF(sums.cos / sums.size, sums.sin / sums.size)


def empirical_cf(x: Tensor, t: Tensor) -> CF:
    """The empirical CF of samples x (..., N, D) at frequencies t (K, D); parts (..., K)."""
    return cf_from_sums(cf_sums(x, t))


def squared_difference(x: CF, y: CF) -> Tensor:
    """|phi_X - phi_Y|^2 per frequency, (..., K); the sum of the amplitude and phase parts."""
    return (x.real - y.real).square() + (x.imag - y.imag).square()


def amplitude_part(x: CF, y: CF) -> Tensor:
    """(|phi_X| - |phi_Y|)^2: how far the spread (the diversity) of the two sets differs. Shape
    (..., K).
    """
    return (x.modulus() - y.modulus()).square()


def phase_part(x: CF, y: CF) -> Tensor:
    """2 |phi_X| |phi_Y| (1 - cos theta): how far the centres (the realism) differ; (..., K)."""
    return (squared_difference(x, y) - amplitude_part(x, y)).clamp_min(0)


def chf(x: CF, y: CF, alpha: float = 0.5) -> Tensor:
    """Per-frequency discrepancy (paper eq. 8): alpha * amplitude + (1 - alpha) * phase, shape (...,
    K).

    Written as (1 - alpha) |phi_X - phi_Y|^2 + (2 alpha - 1) amplitude, which is the same and, at
    alpha = 0.5, free of the modulus and its singularity.
    """
    total = (1 - alpha) * squared_difference(x, y)
    if alpha == 0.5:
        return total
    return (total + (2 * alpha - 1) * amplitude_part(x, y)).clamp_min(0)


def smooth_sqrt(u: Tensor, eps: float = 1e-12) -> Tensor:
    """sqrt(u), rounded off within eps of zero: exactly 0 at 0, with a finite derivative there."""
    root: Tensor = (u + eps).sqrt() + math.sqrt(eps)
    return u / root


def ncfd(x: CF, y: CF, alpha: float = 0.5) -> Tensor:
    """Neural characteristic function discrepancy: mean_k sqrt(chf(t_k))  (paper eq. 7), shape
    (...).
    """
    return smooth_sqrt(chf(x, y, alpha)).mean(-1)


def smooth_sqrt_derivative(u: Tensor, eps: float = 1e-12) -> Tensor:
    """Derivative of `smooth_sqrt` with respect to u."""
    return 0.5 / (u + eps).sqrt()


def ncfd_gradient(x: CF, y: CF, alpha: float = 0.5) -> tuple[CF, CF]:
    """Gradient of the NCFD with respect to both CFs, each part (..., K).

    Written out, since a step needs it class by class, where autograd takes several times as long
    for the many small operations.
    """
    u = chf(x, y, alpha)
    weight = smooth_sqrt_derivative(u) * (2 / u.shape[-1])
    factor = weight * (1 - alpha)
    real, imag = factor * (x.real - y.real), factor * (x.imag - y.imag)
    if alpha == 0.5:
        return CF(real, imag), CF(-real, -imag)
    modulus_x, modulus_y = x.modulus(), y.modulus()
    amplitude = weight * (u > 0) * (2 * alpha - 1) * (modulus_x - modulus_y)
    of_x, of_y = amplitude / modulus_x, amplitude / modulus_y
    return (
        CF(real + of_x * x.real, imag + of_x * x.imag),
        CF(-real - of_y * y.real, -imag - of_y * y.imag),
    )


def linear_mmd(x: Tensor, y: Tensor) -> Tensor:
    """|mean x - mean y|^2 of features (..., N, D) and (..., M, D): the objective of DM, for
    comparison.
    """
    return (x.mean(-2) - y.mean(-2)).square().sum(-1)


def sampling_floor(x: CF, real_count: Tensor | int, synthetic_count: Tensor | int) -> Tensor:
    """E|phi_X - phi_S|^2 for S a random real subset of the synthetic set's size, shape (..., K).

    A few points cannot follow phi_X at high frequencies however good they are: this is the part of
    the discrepancy that sampling noise alone explains, Var(phi_S) + Var(phi_X) = (1 - |phi_X|^2)
    (1/n_s + 1/n_r).
    """
    return (1 - x.squared_modulus()).clamp_min(0) * (1 / synthetic_count + 1 / real_count)
