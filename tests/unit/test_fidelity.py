"""Fidelity measures against closed forms, and on sets whose order is known."""

import math

import pytest
import torch

from ncfm.discrepancy import empirical_cf
from ncfm.fidelity import (
    Moments,
    cf_distance,
    frechet_distance,
    intrinsic_dimension,
    kth_distances,
    label_sharpness,
    nearest,
    neighbourhood,
)


def cloud(count: int, seed: int, dim: int = 8) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double()


def test_frechet_of_gaussians_is_its_closed_form() -> None:
    """Diagonal Gaussians: |m|^2 + sum (s_x - s_y)^2."""
    shift, scale = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])
    x, y = cloud(200_000, 0, 3), cloud(200_000, 1, 3) * scale + shift
    expected = 5 + float((scale - 1).square().sum())
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=0.02)
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-9)


def test_moments_add() -> None:
    x = cloud(100, 0)
    parts = Moments.of(x[:30]).plus(Moments.of(x[30:]))
    torch.testing.assert_close(parts.covariance(), torch.cov(x.mT))
    torch.testing.assert_close(parts.mean(), x.mean(0))
    # The rank of a covariance may be far below its size.
    assert frechet_distance(Moments.of(x[:3]), parts) > 0


def test_neighbourhood_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    fake = torch.tensor([[0.5], [1.5], [50.0]])
    found = neighbourhood(real, fake, k=1)
    assert kth_distances(real, 1).tolist() == [1, 1, 1, 8]
    # 0.5 is in the balls of 0, 1 (and not 2, distance 1.5); 1.5 in those of 1, 2; 10's reaches 2.
    assert found.precision == pytest.approx(2 / 3)
    assert found.density == pytest.approx((2 + 2 + 0) / 3)
    assert found.coverage == pytest.approx(3 / 4)
    # Balls of the fakes: 1, 1, 48.5; 50's reaches down to 1.5.
    assert found.recall == pytest.approx(1)
    with pytest.raises(ValueError, match="got 4 and 1"):
        neighbourhood(real, fake[:1])


def test_alike_sets_have_density_and_coverage_of_about_one() -> None:
    found = neighbourhood(cloud(1000, 0), cloud(1000, 1))
    assert found.density == pytest.approx(1, abs=0.1)
    assert found.coverage > 0.95
    assert min(found.precision, found.recall) > 0.9


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_intrinsic_dimension_of_a_flat_manifold(dim: int) -> None:
    basis = torch.linalg.qr(cloud(20, 3, dim)).Q  # (20, dim)
    uniform = torch.rand(3000, dim, generator=torch.Generator().manual_seed(0)).double()
    assert intrinsic_dimension(uniform @ basis.mT) == pytest.approx(dim, rel=0.12)
    assert math.isnan(intrinsic_dimension(uniform[:1].expand(5, -1)))  # copies alone


def test_copies_do_not_change_the_intrinsic_dimension() -> None:
    """Distances by matrix products make copies of a sample lie apart, by rounding: 0.2 for 3."""
    x = 10 + torch.rand(400, 3, generator=torch.Generator().manual_seed(0)).double()
    right = intrinsic_dimension(x)
    assert right == pytest.approx(3, rel=0.15)
    for copies in (x[:10], x, x[:1].expand(300, -1)):
        assert intrinsic_dimension(torch.cat([x, copies])) == pytest.approx(right)
    assert intrinsic_dimension(x[:, :1].expand(-1, 3)) < 1.5  # negative control: a line


def test_copies_are_at_distance_zero() -> None:
    x = 100 + torch.rand(60, 500, generator=torch.Generator().manual_seed(0))
    assert kth_distances(torch.cat([x, x]), 1).eq(0).all()
    assert nearest(x, x).distance.eq(0).all()
    assert label_sharpness(torch.cat([x, x]), torch.arange(120) // 60) == math.inf


def test_label_sharpness_is_one_over_the_least_distance_between_classes() -> None:
    x = torch.tensor([[0.0], [0.1], [1.0], [3.0]])
    assert label_sharpness(x, torch.tensor([0, 0, 1, 1])) == pytest.approx(1 / 0.9)
    assert math.isnan(label_sharpness(x, torch.zeros(4)))
    assert label_sharpness(x[[0, 0]], torch.tensor([0, 1])) == math.inf


def test_nearest_over_chunks_is_nearest_of_all() -> None:
    x, many = cloud(7, 0), cloud(50, 1)
    whole = nearest(x, many)
    parts = nearest(x, many[20:], 20).less(nearest(x, many[:20]))
    assert torch.equal(whole.place, parts.place)
    torch.testing.assert_close(whole.distance, parts.distance)
    assert torch.equal(nearest(many, many).place, torch.arange(50))


def test_measures_order_real_mixed_and_noise() -> None:
    """Real against real is best, noise is worst, and what is mixed lies between, in order."""
    reals, other, noise = cloud(600, 0), cloud(400, 1), 3 * cloud(400, 2) + 2
    t = cloud(64, 3) * 0.3
    found: dict[str, list[float]] = {"frechet": [], "ncfd": [], "density": [], "coverage": []}
    for share in (0.0, 0.3, 0.6, 1.0):
        count = round(share * len(other))
        fake = torch.cat([noise[:count], other[count:]])
        near = neighbourhood(reals, fake)
        found["frechet"].append(frechet_distance(Moments.of(reals), Moments.of(fake)))
        found["ncfd"].append(cf_distance(empirical_cf(reals, t), empirical_cf(fake, t)).ncfd)
        found["density"].append(-near.density)
        found["coverage"].append(-near.coverage)
    for name, values in found.items():
        assert values == sorted(values), name
        assert values[0] < values[1] < values[3], name


def test_cf_parts_are_diversity_and_place() -> None:
    x, t = cloud(2000, 0), cloud(64, 1) * 0.3
    moved = cf_distance(empirical_cf(x, t), empirical_cf(x + 0.5, t))
    narrow = cf_distance(empirical_cf(x, t), empirical_cf(0.5 * x, t))
    assert moved.amplitude == pytest.approx(0, abs=1e-12)  # a shift turns phases alone
    assert moved.phase > 100 * max(moved.amplitude, 1e-9)
    assert narrow.amplitude > 10 * narrow.phase
