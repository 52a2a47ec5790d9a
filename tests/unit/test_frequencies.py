"""The frequency samplers, and psi's ascent."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ncfm.discrepancy import empirical_cf, ncfd
from ncfm.frequencies import FrequencyConfig, ScaleMixture, build_sampler, psi_objective

SMALL = FrequencyConfig(
    sampler="psi", num_freqs=64, num_components=4, noise_dim=4, hidden=16, lr=1e-2
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_psi(config: FrequencyConfig, dim: int) -> ScaleMixture:
    psi = build_sampler(config, dim, seeded(0))
    assert isinstance(psi, ScaleMixture)
    return psi


def ascend(
    psi: ScaleMixture, x: Tensor, y: Tensor, steps: int, config: FrequencyConfig
) -> list[float]:
    """Plain ascent on fixed features; returns the mean scale after each step."""
    optimizer = torch.optim.Adam(psi.parameters(), lr=config.lr, maximize=True)
    scales = []
    for step in range(steps):
        t = psi(seeded(step))
        value = psi_objective(empirical_cf(x, t), empirical_cf(y, t), len(x), len(y), config, 0.5)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            with torch.no_grad():
                scales.append(
                    float(
                        psi.scales(torch.randn(16, config.noise_dim, generator=seeded(step))).mean()
                    )
                )
    return scales


@pytest.mark.parametrize("sampler", ["gaussian", "mixture", "matern", "imq", "psi"])
@pytest.mark.parametrize(("freqs", "components"), [(64, 4), (1024, 64), (30, 30), (7, 1)])
def test_all_frequencies_are_distinct(sampler: str, freqs: int, components: int) -> None:
    config = FrequencyConfig(sampler=sampler, num_freqs=freqs, num_components=components)  # type: ignore[arg-type]
    t = build_sampler(config, 12, seeded(0))(seeded(1))
    assert t.shape == (freqs, 12)
    assert len(torch.unique(t, dim=0)) == freqs


def test_frequencies_follow_the_generator_alone() -> None:
    psi = make_psi(SMALL, 5)
    torch.testing.assert_close(psi(seeded(3)), psi(seeded(3)), rtol=0, atol=0)
    assert not torch.equal(psi(seeded(3)), psi(seeded(4)))


def test_psi_starts_near_the_fixed_sampler() -> None:
    config = dataclasses.replace(SMALL, sigma=2.0, num_freqs=4096)
    t = make_psi(config, 6)(seeded(1))
    assert abs(float(t.detach().std()) - 2.0) < 0.15


def test_components_have_scales_of_their_own() -> None:
    config = FrequencyConfig(sampler="psi", num_freqs=64, num_components=4, noise_dim=4, hidden=16)
    psi = make_psi(config, 500)
    with torch.no_grad():
        psi.out.weight.mul_(50)
    per_draw = psi(seeded(1)).detach().view(4, 16, 500)
    within = per_draw.std(1)  # (component, dimension): an estimate of sigma_m from its 16 draws
    direct = psi.scales(torch.randn(4, 4, generator=seeded(1))).detach()
    assert torch.corrcoef(torch.stack([within.flatten(), direct.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("objective", ["ncfd", "excess", "ratio"])
def test_the_ascent_raises_the_discrepancy_on_held_out_batches(objective: str) -> None:
    """The max happens: its gradient is not zero, and what it learns holds on samples it has not
    seen.
    """
    config = dataclasses.replace(SMALL, objective=objective)  # type: ignore[arg-type]
    # The sets differ in dimension 0, by a fine structure that N(0, 1) frequencies mostly miss.
    x = torch.randn(4000, 6, generator=seeded(1)) * 0.3
    y = torch.randn(4000, 6, generator=seeded(2)) * 0.3
    y[:, 0] = 0.3 * y[:, 0].sign()
    psi = make_psi(config, 6)

    def held_out(model: ScaleMixture) -> float:
        with torch.no_grad():
            t = model(seeded(77))
            return float(ncfd(empirical_cf(x[2000:], t), empirical_cf(y[2000:], t)))

    before = held_out(psi)
    t = psi(seeded(0))
    value = psi_objective(
        empirical_cf(x[:2000], t), empirical_cf(y[:2000], t), 2000, 2000, config, 0.5
    )
    grads = torch.autograd.grad(value, list(psi.parameters()))
    assert all(float(g.abs().max()) > 0 for g in grads)
    ascend(psi, x[:2000], y[:2000], 150, config)
    assert held_out(psi) > 1.15 * before


def test_scales_stay_bounded_where_plain_ascent_runs_away() -> None:
    """Few synthetic samples, no signal: plain unbounded ascent follows the sampling noise to ever
    higher frequencies.
    """
    x, y = (
        torch.randn(64, 4, generator=seeded(1)) * 0.1,
        torch.randn(4, 4, generator=seeded(2)) * 0.1,
    )
    plain = dataclasses.replace(SMALL, objective="ncfd", max_ratio=1e6)
    run_away = ascend(make_psi(plain, 4), x, y, 1000, plain)
    assert run_away[-1] > 10, "the plain version must show the failure, or this test proves nothing"
    ours = dataclasses.replace(SMALL)
    scales = ascend(make_psi(ours, 4), x, y, 3000, ours)  # three times as long
    assert all(ours.sigma / ours.max_ratio <= s <= ours.sigma * ours.max_ratio for s in scales)


@pytest.mark.parametrize(
    "change",
    [
        {"num_freqs": 0},
        {"num_freqs": 100, "num_components": 64},
        {"sigma": 0.0},
        {"max_ratio": 1.0},
        {"lr": -1.0},
        {"nu": 0},
        {"scales": ()},
        {"scales": (1.0, 0.0)},
        {"curriculum_start": 0.0},
        {"curriculum_steps": -1},
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        dataclasses.replace(SMALL, **change)


SIGMA = 1.5
KERNELS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "gaussian": ({}, lambda r: (-(r**2) / 2).exp()),
    "mixture": (
        {"scales": (0.5, 1.0, 2.0, 4.0)},
        lambda r: torch.stack([(-((a * r) ** 2) / 2).exp() for a in (0.5, 1, 2, 4)]).mean(0),
    ),
    "Laplace": ({"sampler": "matern", "nu": 1}, lambda r: (-r).exp()),
    "Matern 3/2": (
        {"sampler": "matern", "nu": 3},
        lambda r: (1 + 3**0.5 * r) * (-(3**0.5) * r).exp(),
    ),
    "Matern 5/2": (
        {"sampler": "matern", "nu": 5},
        lambda r: (1 + 5**0.5 * r + 5 * r**2 / 3) * (-(5**0.5) * r).exp(),
    ),
    "imq": ({}, lambda r: (1 + r**2).rsqrt()),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_laws_are_those_of_their_kernels(name: str) -> None:
    """E cos<t, d> is the kernel of |d| in its closed form, whatever the direction of d."""
    settings, kernel = KERNELS[name]
    config = FrequencyConfig(num_freqs=200_000, sigma=SIGMA, **{"sampler": name, **settings})  # type: ignore[arg-type]
    t = build_sampler(config, 3, seeded(0))(seeded(1))
    d = torch.randn(24, 3, generator=seeded(2))
    d *= (torch.linspace(0.05, 2.5, 24) / d.norm(dim=1))[:, None]
    found, r = (t @ d.mT).cos().mean(0), SIGMA * d.norm(dim=1)
    deviation = 200_000**-0.5  # at most, of a mean of cosines
    assert float((found - kernel(r)).abs().max()) < 4 * deviation
    for other in set(KERNELS) - {name}:  # negative control
        assert float((found - KERNELS[other][1](r)).abs().max()) > 8 * deviation


def test_the_curriculum() -> None:
    config = dataclasses.replace(SMALL, curriculum_start=0.25, curriculum_steps=10)
    factors = [config.curriculum(step) for step in (0, 5, 10, 500)]
    assert factors == pytest.approx([0.25, 0.5, 1.0, 1.0])
    assert [SMALL.curriculum(step) for step in (0, 7)] == [1.0, 1.0]
