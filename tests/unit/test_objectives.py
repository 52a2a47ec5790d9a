"""What the images descend, with frequencies in units of the median distance."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ncfm.communication import SingleProcess, own_parts
from ncfm.discrepancy import empirical_cf, ncfd
from ncfm.objectives import NCFD, OBJECTIVES, Comparison, group_means, median_distances


class Member:
    """A member of a group of three; `sum_group` adds what the other two have."""

    members = 3

    def __init__(self, member: int, others: list[Tensor]) -> None:
        self.member, self.others = member, others

    def sum_all(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum_group(self, tensor: Tensor) -> Tensor:
        return tensor.add_(self.others.pop(0))


def features(*counts: int, dim: int = 128, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(dim, generator=generator, dtype=torch.float64)
    return [
        F.normalize(spread * torch.randn(n, dim, generator=generator, dtype=torch.float64) + 0.2)
        for n in counts
    ]


def test_the_median_distance_is_about_that_of_all_pairs() -> None:
    for scale in (1.0, 30.0):
        x = [scale * part for part in features(200, 50, 11)]
        found = median_distances(x, SingleProcess())
        for part, median in zip(x, found, strict=True):
            pairs = torch.pdist(part).median()
            assert float(median) == pytest.approx(float(pairs), rel=0.06)
    assert float(found[0]) > 10 * float(
        median_distances(features(200), SingleProcess())
    )  # a control
    assert median_distances([torch.ones(4, 3)], SingleProcess()).tolist() == [1.0]


def test_members_of_a_group_find_the_same_median() -> None:
    x = features(20, 7, 2)
    whole = median_distances(x, SingleProcess())
    means, _ = group_means(x, SingleProcess())
    shares, distances = [], []
    for member in range(3):
        own = own_parts(x, Member(member, []))
        shares.append(torch.stack([F.pad(p.sum(0), (0, 1), value=len(p)) for p in own]))
        places = own_parts([torch.arange(len(part)) for part in x], Member(member, []))
        parts = []
        for part, mean, place in zip(x, means, places, strict=True):
            vector = part.new_zeros(len(part))
            vector[place] = (part[place] - mean).norm(dim=1)
            parts.append(vector)
        distances.append(torch.cat(parts))
    for member in range(3):
        others = [sum(v for i, v in enumerate(of) if i != member) for of in (shares, distances)]
        communicator = Member(member, others)  # type: ignore[arg-type]
        found = median_distances(own_parts(x, communicator), communicator)
        torch.testing.assert_close(found, whole)
        assert communicator.others == []


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_ncfd_in_units_of_the_median(alpha: float) -> None:
    """The value and its gradient by autograd, the unit held fixed; the same of features of any
    length, but for the gradient's unit.
    """
    x, y = features(30, 9), features(4, 3, seed=1)
    t = torch.randn(64, 128, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    comparison = Comparison(t=t, communicator=SingleProcess(), alpha=alpha, median=True)
    values, gradients = NCFD(comparison)(x, y)
    units = median_distances(x, SingleProcess())
    for a, b, unit, value, gradient in zip(x, y, units, values, gradients, strict=True):
        leaf = b.clone().requires_grad_()
        expected = ncfd(empirical_cf(a / unit, t), empirical_cf(leaf / unit, t), alpha)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])
    longer = NCFD(comparison)([7 * part for part in x], [7 * part for part in y])
    torch.testing.assert_close(longer[0], values)
    torch.testing.assert_close(longer[1][0], gradients[0] / 7)
    plain, _ = NCFD(Comparison(t=t, communicator=SingleProcess(), alpha=alpha))(x, y)
    assert not torch.allclose(plain, values, rtol=0.01)  # negative control


def test_objectives_without_frequencies_have_nothing_for_psi() -> None:
    without = [name for name, made in OBJECTIVES.items() if not made.uses_frequencies]
    assert without == ["mmd", "mmd_raw"]
    t = torch.zeros(1, 128, dtype=torch.float64)
    objective = OBJECTIVES["mmd"](Comparison(t=t, communicator=SingleProcess()))
    objective(features(5), features(3))
    assert objective.match is None
    with pytest.raises(NotImplementedError, match="mmd"):
        objective.compare(features(5), features(3))
