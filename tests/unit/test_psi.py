"""psi's ascent of what tells the real classes apart."""

import dataclasses
import itertools

import pytest
import torch
from test_distill import EVERYTHING, FREQUENCIES, make, real_batch
from torch import Tensor

from ncfm.backend.library import library
from ncfm.communication import SingleProcess
from ncfm.discrepancy import CF, empirical_cf
from ncfm.frequencies import FrequencyConfig, ScaleMixture, build_sampler
from ncfm.psi import (
    GRADIENT_GRID,
    HeldOut,
    PsiGradient,
    between_classes,
    between_classes_gradient,
    split_held_out,
)

BETWEEN = dataclasses.replace(FREQUENCIES, objective="between_classes", held_out=6)


def class_features(generator: torch.Generator, counts: tuple[int, ...], dim: int) -> list[Tensor]:
    return [
        torch.randn(n, dim, generator=generator, dtype=torch.float64) * 0.4 + 0.3 * c
        for c, n in enumerate(counts)
    ]


def stacked_cf(x: list[Tensor], t: Tensor) -> CF:
    none = torch.zeros(len(t), dtype=t.dtype)
    parts = [empirical_cf(part, t) if len(part) else CF(none, none) for part in x]
    return CF(torch.stack([p.real for p in parts]), torch.stack([p.imag for p in parts]))


def by_pairs(x: list[Tensor], t: Tensor) -> Tensor:
    """The definition, pair by pair, in complex numbers."""
    phi = [torch.exp(1j * (part @ t.mT)).mean(0) for part in x if len(part)]
    counts = [len(part) for part in x if len(part)]
    pairs = list(itertools.combinations(range(len(phi)), 2))
    signal = sum((phi[a] - phi[b]).abs() ** 2 for a, b in pairs) / len(pairs)
    noise = sum(
        (1 - phi[a].abs() ** 2) / counts[a] + (1 - phi[b].abs() ** 2) / counts[b] for a, b in pairs
    ) / len(pairs)
    return (signal / noise).sqrt().mean()


COUNTS = [(30, 20, 7), (9, 0, 5, 6), (12, 12)]


@pytest.mark.parametrize("counts", COUNTS)
def test_the_value_is_that_of_all_pairs(
    counts: tuple[int, ...], generator: torch.Generator
) -> None:
    x = class_features(generator, counts, 5)
    t = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    sizes = torch.tensor(counts, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        between_classes(stacked_cf(x, t), sizes), by_pairs(x, t), rtol=1e-3, atol=0
    )
    same = [x[0][: len(part)] for part in x]  # a control: classes that do not differ
    assert float(by_pairs(x, t)) > 1.5 * float(between_classes(stacked_cf(same, t), sizes))


@pytest.mark.parametrize("counts", COUNTS)
def test_gradients(counts: tuple[int, ...], generator: torch.Generator) -> None:
    x = class_features(generator, counts, 5)
    t = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    phi, sizes = stacked_cf(x, t), torch.tensor(counts, dtype=torch.float64)[:, None]
    leaves = CF(*(part.clone().requires_grad_() for part in phi))
    expected = torch.autograd.grad(between_classes(leaves, sizes), list(leaves))
    for found, right in zip(between_classes_gradient(phi, sizes), expected, strict=True):
        torch.testing.assert_close(found, right)


class TwoWorkers:
    """One of two workers, which does not wait for the other: its sum is known."""

    member, members = 0, 1

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    def sum_all(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.whole)

    def sum_group(self, tensor: Tensor) -> Tensor:
        raise AssertionError("nothing here is of a group")


def test_the_gradient_of_the_scales(generator: torch.Generator) -> None:
    """Against autograd through t = sigma z; and in the shares of two workers, one class of which
    both have a part of.
    """
    x, components, draws = class_features(generator, (9, 12, 7), 5), 4, 6
    z = torch.randn(components, draws, 5, generator=generator, dtype=torch.float64)
    log_scales = 0.2 * torch.randn(components, 5, generator=generator, dtype=torch.float64)
    log_scales.requires_grad_()
    t = (z * log_scales.exp()[:, None]).flatten(0, 1)
    sizes = torch.tensor([[9.0], [12.0], [7.0]], dtype=torch.float64)
    value = between_classes(stacked_cf(x, t), sizes)
    (expected,) = torch.autograd.grad(value, log_scales)

    def gradient(parts: list[Tensor], classes: list[int], communicator: object) -> PsiGradient:
        found = PsiGradient(log_scales, 3)
        found.add_between_classes(parts, classes, t.detach(), communicator)  # type: ignore[arg-type]
        return found

    whole = gradient(x, [0, 1, 2], SingleProcess())
    torch.testing.assert_close(whole.total * GRADIENT_GRID, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(whole.values, value.detach().expand(3))
    sums = [
        torch.cat([f(part @ t.detach().mT).sum(0) for f in (torch.cos, torch.sin)]) for part in x
    ]
    known = torch.stack(
        [torch.cat([s, s.new_tensor([len(part)])]) for s, part in zip(sums, x, strict=True)]
    )
    shares = [
        gradient([x[0], x[1][:5]], [0, 1], TwoWorkers(known)),
        gradient([x[1][5:], x[2]], [1, 2], TwoWorkers(known)),
    ]
    torch.testing.assert_close(
        (shares[0].total + shares[1].total) * GRADIENT_GRID, expected, rtol=1e-6, atol=1e-9
    )
    assert not torch.allclose(shares[0].total * GRADIENT_GRID, expected)  # negative control


def test_psi_learns_the_dimension_in_which_classes_differ(generator: torch.Generator) -> None:
    """Classes differ in the first of six dimensions by a fine structure, which frequencies of scale
    1 miss; a further dimension is noise. Other classes, of the same law, are told apart better.
    """
    config = FrequencyConfig(
        sampler="psi", objective="between_classes", num_freqs=64, num_components=4, lr=1e-2,
        noise_dim=4, hidden=16,
    )  # fmt: skip
    psi = build_sampler(config, 6, torch.Generator().manual_seed(0))
    assert isinstance(psi, ScaleMixture)
    optimizer = torch.optim.Adam(psi.parameters(), lr=config.lr, maximize=True)

    def classes() -> list[Tensor]:
        x = [0.5 * torch.randn(200, 6, generator=generator) for _ in range(2)]
        x[1][:, 0] = 0.5 * x[1][:, 0].sign()
        return x

    def told_apart(number: int) -> float:
        t, _ = psi.draw(torch.Generator().manual_seed(number))
        x = classes()
        return float(between_classes(stacked_cf(x, t), torch.full((2, 1), 200.0)))

    before = sum(told_apart(1000 + i) for i in range(20))
    for step in range(200):
        t, log_scales = psi.draw(torch.Generator().manual_seed(step))
        ascent = PsiGradient(log_scales, 2)
        ascent.add_between_classes(classes(), [0, 1], t, SingleProcess())
        optimizer.zero_grad()
        ascent.backward(SingleProcess())
        optimizer.step()
    assert sum(told_apart(1000 + i) for i in range(20)) > 1.15 * before
    noise = torch.randn(64, 4, generator=generator)
    scales = psi.scales(noise).detach().mean(0)
    assert float(scales[0]) > 1.5 * float(scales[1:].max())


def test_what_is_held_out() -> None:
    for n, wanted, expected in ((12, 4, 4), (12, 100, 6), (5, 64, 2), (1, 64, 0), (10, 3, 3)):
        batch = torch.arange(n)
        rest, held = split_held_out(batch, wanted)
        assert len(held) == expected
        assert sorted([*rest.tolist(), *held.tolist()]) == list(range(n))
    assert split_held_out(torch.arange(12), 4)[1].tolist() == [0, 3, 6, 9]  # spread
    real = {3: torch.arange(12), 5: torch.arange(4)}
    rest, held = HeldOut(real, 4, rest=True), HeldOut(real, 4, rest=False)
    assert (list(rest), len(held)) == ([3, 5], 2)
    assert (len(rest[3]), len(held[3]), len(held[5])) == (8, 4, 2)


def test_a_step_matches_the_rest_and_psi_learns_from_what_is_held_out() -> None:
    """Changing what is held out changes psi alone; what is matched, the images."""
    config = dataclasses.replace(EVERYTHING, calibration=0.0)
    real = {c: real_batch(c, 0) for c in range(5)}

    def step(changed: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The state and the metrics; `changed` is the place of an image that is another."""
        given = {c: batch.clone() for c, batch in real.items()}
        if changed is not None:
            for batch in given.values():
                batch[changed] = 255 - batch[changed]
        distiller = make(config=config, frequencies=BETWEEN)
        metrics = distiller.update(given)
        return distiller.state_dict(), metrics

    state, metrics = step(None)
    held, matched = step(2)[0], step(3)[0]  # of 12 images the even ones are held out
    assert torch.equal(state["class/1/images"], held["class/1/images"])
    assert not torch.equal(state["class/1/images"], matched["class/1/images"])
    moved = [name for name in state if name.startswith("psi_optimizer/") and "exp_avg" in name]
    assert any(not torch.equal(state[name], held[name]) for name in moved)
    assert all(torch.equal(state[name], matched[name]) for name in moved)
    assert set(metrics) == {"ncfd", "psi_objective"}


def test_a_scale_of_each_class_is_refused() -> None:
    with pytest.raises(ValueError, match="bandwidth must be 'fixed', got 'median'"):
        dataclasses.replace(BETWEEN, bandwidth="median")


def test_the_native_kernels_give_the_same_gradient(generator: torch.Generator) -> None:
    if library() is None:
        pytest.skip("no kernels here: they need a C++ compiler with OpenMP")
    x = [part.float() for part in class_features(generator, (9, 12, 0), 32)]
    t, log_scales = torch.randn(24, 32, generator=generator), torch.zeros(4, 32)
    totals = []
    for kernels in (False, True):
        ascent = PsiGradient(log_scales, 3)
        ascent.add_between_classes(x, [0, 1, 2], t, SingleProcess(), kernels=kernels)
        totals.append(ascent.total * GRADIENT_GRID)
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-6)
    assert float(totals[0].abs().max()) > 1e-3
