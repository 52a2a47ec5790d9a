"""The gradients that matching writes out, against autograd on the definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ncfm.matching
from ncfm.backend.products import product
from ncfm.communication import SingleProcess
from ncfm.discrepancy import empirical_cf, linear_mmd, ncfd
from ncfm.frequencies import FrequencyConfig, psi_objective
from ncfm.matching import GROUP_SAMPLES, Match
from ncfm.objectives import OBJECTIVES, Comparison

DIM, FREQS, REAL, SYNTHETIC = 6, 10, (12, 7, 7, 7, 1), (4, 2, 2, 3, 3)
UNIT = 2.0**-44


def rows(counts: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in counts]


def scale_gradient(match: Match, components: int) -> Tensor:
    """Of the sum of the objectives of all classes, (M, D)."""
    total = torch.zeros(components, DIM, dtype=torch.float64)
    match.add_scale_gradients(total, UNIT)
    return total * UNIT


@pytest.fixture(params=[1, 100], ids=["apart", "together"])
def features(
    request: pytest.FixtureRequest, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of classes that are computed on one by one, as on a CPU, or with their like, as on a GPU."""
    monkeypatch.setitem(GROUP_SAMPLES, "cpu", request.param)
    x, y = rows(REAL, generator), rows(SYNTHETIC, generator)
    return x, y, torch.randn(FREQS, DIM, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("samples", "groups"), [(1, [1] * 5), (17, [1] * 5), (18, [1, 2, 1, 1]), (99, [1, 2, 1, 1])]
)
def test_classes_of_the_same_sizes_are_together(
    samples: int,
    groups: list[int],
    features: tuple[list[Tensor], list[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(GROUP_SAMPLES, "cpu", samples)
    x, y, t = features
    match = Match(x, y, t, SingleProcess())
    assert [len(part) for part in match.x] == groups
    assert [group.stop - group.start for group in match.groups] == groups


@pytest.mark.parametrize("alpha", [0.5, 0.2, 0.9])
def test_the_descent(features: tuple[list[Tensor], list[Tensor], Tensor], alpha: float) -> None:
    x, y, t = features
    values, gradients = Match(x, y, t, SingleProcess()).descent(alpha)
    for a, b, value, gradient in zip(x, y, values, gradients, strict=True):
        leaf = b.clone().requires_grad_()
        expected = ncfd(empirical_cf(a, t), empirical_cf(leaf, t), alpha)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])
        assert float(gradient.abs().max()) > 1e-3  # negative control


@pytest.mark.parametrize("components", [1, 5, 10])
@pytest.mark.parametrize(
    ("objective", "alpha"), [("ncfd", 0.5), ("ncfd", 0.2), ("excess", 0.5), ("ratio", 0.5)]
)
def test_the_ascent(
    features: tuple[list[Tensor], list[Tensor], Tensor],
    objective: Any,
    alpha: float,
    components: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ncfm.matching, "BLOCK_FREQS", 4)  # several blocks
    x, y, t = features
    config = FrequencyConfig(sampler="psi", objective=objective)
    match = Match(x, y, t, SingleProcess())
    match.descent(alpha)  # leaves nothing behind
    values = match.objective(config, alpha)
    leaf = torch.zeros(components, DIM, dtype=torch.float64, requires_grad=True)
    scaled = t * leaf.exp().repeat_interleave(FREQS // components, 0)
    expected = torch.stack(
        [
            psi_objective(
                empirical_cf(a, scaled), empirical_cf(b, scaled), len(a), len(b), config, alpha
            )
            for a, b in zip(x, y, strict=True)
        ]
    )
    torch.testing.assert_close(values, expected.detach())
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(scale_gradient(match, components), gradient)


def test_what_psi_s_gradient_adds_up_is_whole(
    features: tuple[list[Tensor], list[Tensor], Tensor],
) -> None:
    x, y, t = features
    match = Match(x, y, t, SingleProcess())
    match.objective(FrequencyConfig(sampler="psi"), 0.5)
    total = torch.full((5, DIM), 3.0, dtype=torch.float64)
    match.add_scale_gradients(total, 1e-4)
    assert torch.equal(total, total.round())
    exact = 3 + scale_gradient(match, 5) / 1e-4
    assert float((total - exact).abs().max()) <= len(x) / 2  # each class's is rounded
    assert float((total - exact).abs().max()) > 0.1


def test_the_members_of_a_group_count_every_sample_once(
    features: tuple[list[Tensor], list[Tensor], Tensor],
) -> None:
    """Shares of psi's gradient add up to the whole one; here the others' sums are known."""
    x, y, t = features
    config, whole = (
        FrequencyConfig(sampler="psi", objective="ratio"),
        Match(x, y, t, SingleProcess()),
    )
    whole.objective(config, 0.5)
    expected = scale_gradient(whole, 5)

    class Three:
        members = 3

        def __init__(self, member: int) -> None:
            self.member = member

        def sum_all(self, tensor: Tensor) -> Tensor:
            return tensor

        def sum_group(self, tensor: Tensor) -> Tensor:
            return tensor.copy_(whole.sums_x)

    total = torch.zeros_like(expected)
    for rank in range(3):
        parts = [part.tensor_split(3)[rank] for part in x]
        match = Match(parts, y, t, Three(rank))
        match.objective(config, 0.5)
        share = scale_gradient(match, 5)
        assert not torch.allclose(share, expected)  # negative control
        total += share
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("objective", ["mmd", "mmd_raw"])
def test_linear_mmd(objective: str, features: tuple[list[Tensor], list[Tensor], Tensor]) -> None:
    x, y, t = features
    values, gradients = OBJECTIVES[objective](Comparison(t=t, communicator=SingleProcess()))(x, y)
    for a, b, value, gradient in zip(x, y, values, gradients, strict=True):
        leaf = b.clone().requires_grad_()
        expected = linear_mmd(a, leaf)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("rows", [0, 1, 5, 130])
def test_the_product_is_the_product(rows: int, generator: torch.Generator) -> None:
    a, b = torch.randn(rows, 33, generator=generator), torch.randn(65, 33, generator=generator)
    for left, right in ((a, b.mT), (a.mT.contiguous().mT, b.mT), (b, a.mT)):
        expected = (left.double() @ right.double()).float()
        torch.testing.assert_close(product(left, right), expected, rtol=1e-5, atol=1e-5)
