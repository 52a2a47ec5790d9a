"""The CF discrepancies against independent truth."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ncfm.discrepancy import (
    CF,
    CFSums,
    amplitude_part,
    cf_from_sums,
    cf_sums,
    chf,
    empirical_cf,
    linear_mmd,
    ncfd,
    ncfd_gradient,
    phase_part,
    sampling_floor,
    squared_difference,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gaussian_cf() -> None:
    x, t = normal(200_000, 3), normal(16, 3, seed=1)
    phi = empirical_cf(x, t)
    torch.testing.assert_close(phi.real, torch.exp(-t.square().sum(1) / 2), atol=8e-3, rtol=0)
    torch.testing.assert_close(phi.imag, torch.zeros(16, dtype=torch.float64), atol=8e-3, rtol=0)


def test_shift_turns_the_phase() -> None:
    x, t = normal(200_000, 3), normal(16, 3, seed=1) / 2
    shift = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    phi = empirical_cf(x + shift, t)
    modulus = torch.exp(-t.square().sum(1) / 2)
    torch.testing.assert_close(phi.real, modulus * torch.cos(t @ shift), atol=8e-3, rtol=0)
    torch.testing.assert_close(phi.imag, modulus * torch.sin(t @ shift), atol=8e-3, rtol=0)


def test_laplace_cf() -> None:
    uniform = (
        torch.rand(400_000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        - 0.5
    )
    x = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    t = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    laplace, gaussian = 1 / (1 + t[:, 0].square()), torch.exp(-t[:, 0].square() / 2)
    torch.testing.assert_close(empirical_cf(x, t).real, laplace, atol=8e-3, rtol=0)
    assert (
        empirical_cf(x, t).real - gaussian
    ).abs().max() > 0.05  # negative control: another distribution's CF


def test_matches_the_complex_definition() -> None:
    x, t = normal(40, 7), normal(11, 7, seed=1)
    expected = torch.exp(1j * (x @ t.mT)).mean(0)
    phi = empirical_cf(x, t)
    torch.testing.assert_close(torch.complex(phi.real, phi.imag), expected)


@given(cuts=st.lists(st.integers(0, 50), max_size=5), dim=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_sums_add_over_any_split(cuts: list[int], dim: int) -> None:
    x, t = normal(50, dim), normal(8, dim, seed=1)
    bounds = [0, *sorted(cuts), 50]
    total = CFSums(*(torch.zeros(1, dtype=torch.float64) for _ in range(3)))
    for begin, end in itertools.pairwise(bounds):
        total = total + cf_sums(x[begin:end], t)
    for part, whole in zip(total, cf_sums(x, t), strict=True):
        torch.testing.assert_close(part, whole)


def test_classes_are_batched() -> None:
    x, t = normal(4, 30, 5), normal(8, 5, seed=1)
    batched = empirical_cf(x, t)
    for c in range(4):
        torch.testing.assert_close(batched.real[c], empirical_cf(x[c], t).real)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_zero_on_identical_sets_and_symmetric(alpha: float) -> None:
    x, y, t = normal(30, 5), normal(20, 5, seed=2) + 0.4, normal(64, 5, seed=1)
    phi_x, phi_y = empirical_cf(x, t), empirical_cf(y, t)
    assert ncfd(phi_x, phi_x, alpha) == 0
    torch.testing.assert_close(ncfd(phi_x, phi_y, alpha), ncfd(phi_y, phi_x, alpha))
    assert ncfd(phi_x, phi_y, alpha) > 1e-2
    assert (
        ncfd(phi_x, empirical_cf(x.flip(0), t), alpha) < 1e-8
    )  # the order of samples does not matter


def test_parts_follow_the_polar_form() -> None:
    phi_x, phi_y = (empirical_cf(normal(30, 5, seed=s) + s, normal(64, 5, seed=9)) for s in (1, 2))
    a, b = (torch.complex(p.real, p.imag) for p in (phi_x, phi_y))
    theta = a.angle() - b.angle()
    torch.testing.assert_close(amplitude_part(phi_x, phi_y), (a.abs() - b.abs()).square())
    torch.testing.assert_close(phase_part(phi_x, phi_y), 2 * a.abs() * b.abs() * (1 - theta.cos()))
    torch.testing.assert_close(
        amplitude_part(phi_x, phi_y) + phase_part(phi_x, phi_y), (a - b).abs().square()
    )
    for alpha in (0.2, 0.5, 0.8):
        expected = alpha * (a.abs() - b.abs()).square() + (1 - alpha) * 2 * a.abs() * b.abs() * (
            1 - theta.cos()
        )
        torch.testing.assert_close(chf(phi_x, phi_y, alpha), expected)


def test_amplitude_sees_spread_and_phase_sees_position() -> None:
    x, t = normal(100_000, 2), normal(64, 2, seed=1) / 2
    phi, wider, moved = (empirical_cf(v, t) for v in (x, 2 * x, x + 1))
    assert amplitude_part(phi, wider).mean() > 100 * phase_part(phi, wider).mean()
    assert phase_part(phi, moved).mean() > 100 * amplitude_part(phi, moved).mean()


def test_triangle_inequality() -> None:
    t = normal(32, 4, seed=99)
    for seed in range(50):
        a, b, c = (empirical_cf(normal(10, 4, seed=3 * seed + i), t) for i in range(3))
        assert ncfd(a, c) <= ncfd(a, b) + ncfd(b, c) + 2e-6


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_gradient_against_finite_differences(alpha: float) -> None:
    x, t = normal(12, 3), normal(6, 3, seed=1)
    y = (normal(5, 3, seed=2) * 0.5).requires_grad_()
    phi_x = empirical_cf(x, t)
    assert torch.autograd.gradcheck(lambda v: ncfd(phi_x, empirical_cf(v, t), alpha), (y,))
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)  # the gradient that psi ascends
    assert torch.autograd.gradcheck(
        lambda s: ncfd(empirical_cf(x, t * s), empirical_cf(y.detach(), t * s), alpha), (scale,)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradients_written_out(alpha: float, batch: tuple[int, ...]) -> None:
    parts = [normal(*batch, 9, seed=i).div(3).requires_grad_() for i in range(4)]
    x, y = CF(*parts[:2]), CF(*parts[2:])
    expected = torch.autograd.grad(ncfd(x, y, alpha).sum(), parts)
    found = [part for phi in ncfd_gradient(x, y, alpha) for part in phi]
    torch.testing.assert_close([part.detach() for part in found], list(expected))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-6])
def test_gradients_written_out_stay_finite(alpha: float, distance: float) -> None:
    """Where the CFs meet, and where both vanish."""
    x = CF(torch.tensor([0.0, 0.3]), torch.tensor([0.0, -0.2]))
    y = CF(x.real + distance, x.imag - distance)
    for part in itertools.chain(*ncfd_gradient(x, y, alpha)):
        assert torch.isfinite(part).all()
        assert part.abs().max() <= 1


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-9, 1e-6, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_stays_finite_where_the_sets_meet(
    alpha: float, distance: float, dtype: torch.dtype
) -> None:
    x, t = normal(12, 3).to(dtype), normal(64, 3, seed=1).to(dtype)
    far = (x + 1).requires_grad_()
    y = (x + distance).requires_grad_()
    (near_grad,) = torch.autograd.grad(ncfd(empirical_cf(x, t), empirical_cf(y, t), alpha), y)
    (far_grad,) = torch.autograd.grad(ncfd(empirical_cf(x, t), empirical_cf(far, t), alpha), far)
    assert torch.isfinite(near_grad).all()
    assert near_grad.norm() < 10 * far_grad.norm() + 1


def test_gradient_where_a_cf_vanishes() -> None:
    t = torch.tensor([[torch.pi / 2]], dtype=torch.float64)
    y = torch.tensor(
        [[-1.0], [1.0]], dtype=torch.float64, requires_grad=True
    )  # phi_Y(pi/2) = cos(pi/2) = 0
    (grad,) = torch.autograd.grad(
        ncfd(CF(*(torch.full((1,), 0.1, dtype=torch.float64),) * 2), empirical_cf(y, t), 0.3), y
    )
    assert torch.isfinite(grad).all()


def test_plain_square_root_would_fail() -> None:
    """Negative control: the textbook sqrt has no finite gradient on identical sets."""
    x, t = normal(12, 3), normal(64, 3, seed=1)
    y = x.clone().requires_grad_()
    plain = squared_difference(empirical_cf(x, t), empirical_cf(y, t)).sqrt().mean()
    (grad,) = torch.autograd.grad(plain, y)
    assert not torch.isfinite(grad).all()


def test_low_precision_features_are_summed_in_float32() -> None:
    x, t = (
        torch.nn.functional.normalize(normal(1000, 64), dim=1).bfloat16(),
        normal(32, 64, seed=1).float(),
    )
    phi = empirical_cf(x, t)
    assert phi.real.dtype == torch.float32
    exact = empirical_cf(x.double(), t.double())
    torch.testing.assert_close(phi.real.double(), exact.real, atol=1e-5, rtol=0)


def test_linear_mmd_sees_the_mean_only() -> None:
    x = normal(1000, 4)
    torch.testing.assert_close(linear_mmd(x, x + 2), torch.tensor(16.0, dtype=torch.float64))
    centred = x - x.mean(0)
    assert linear_mmd(centred, 3 * centred) < 1e-20
    assert (
        ncfd(
            empirical_cf(centred, normal(64, 4, seed=1)),
            empirical_cf(3 * centred, normal(64, 4, seed=1)),
        )
        > 0.1
    )


def test_sampling_floor_is_what_random_subsets_score() -> None:
    population, t = normal(20_000, 3), normal(16, 3, seed=1)
    phi = empirical_cf(population, t)
    generator = torch.Generator().manual_seed(5)
    scores = []
    for _ in range(800):
        pick = torch.randint(len(population), (4 + 50,), generator=generator)
        scores.append(
            squared_difference(
                empirical_cf(population[pick[:4]], t), empirical_cf(population[pick[4:]], t)
            )
        )
    torch.testing.assert_close(
        torch.stack(scores).mean(0), sampling_floor(phi, 50, 4), rtol=0.15, atol=0
    )


def test_merging_statistics_gives_the_cf_of_the_union() -> None:
    x, y, t = normal(30, 5), normal(50, 5, seed=2), normal(8, 5, seed=1)
    merged = cf_from_sums(cf_sums(x, t) + cf_sums(y, t))
    torch.testing.assert_close(merged.real, empirical_cf(torch.cat([x, y]), t).real)
