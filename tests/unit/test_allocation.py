"""Images per class in proportion to the train images: against brute force, and its properties."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ncfm
from ncfm.allocation import allocate, images_text, shared_or_each
from ncfm.models import ModelConfig
from ncfm.train import TrainConfig
from pipeline.runtime.identity import fingerprint

COUNTS = st.lists(st.integers(1, 5000), min_size=1, max_size=30)


def disproportion(stored: tuple[int, ...], train: tuple[int, ...]) -> Fraction:
    """Sainte-Laguë's index, which Webster's method minimises: the squared error of each train
    image's share of a stored one, summed.
    """
    rate = Fraction(sum(stored), sum(train))
    return sum((n * (Fraction(s, n) - rate) ** 2 for s, n in zip(stored, train, strict=True)),
               start=Fraction(0))  # fmt: skip


@pytest.mark.parametrize("train", [(1, 1, 1), (50, 30, 7), (100, 10, 1), (9, 8, 8, 2), (500, 2, 2)])
@pytest.mark.parametrize("ipc", [1, 2, 3])
def test_no_other_division_of_the_total_is_more_proportional(
    train: tuple[int, ...], ipc: int
) -> None:
    total = ipc * len(train)
    every = [
        stored
        for stored in itertools.product(range(1, total + 1), repeat=len(train))
        if sum(stored) == total
    ]
    least = min(disproportion(stored, train) for stored in every)
    assert disproportion(allocate(train, ipc, "proportional"), train) == least
    if ipc == 3 and len(set(train)) > 1:  # negative control
        assert disproportion(allocate(train, ipc, "equal"), train) > least


@given(train=COUNTS, ipc=st.integers(1, 20))
def test_the_total_and_the_minimum(train: list[int], ipc: int) -> None:
    stored = allocate(train, ipc, "proportional")
    assert sum(stored) == ipc * len(train)
    assert min(stored) >= 1
    assert stored == allocate(tuple(train), ipc, "proportional")
    more = allocate(train, ipc + 1, "proportional")
    assert all(before <= after for before, after in zip(stored, more, strict=True))
    for (n, s), (m, r) in itertools.combinations(zip(train, stored, strict=True), 2):
        assert (n - m) * (s - r) >= 0, "a larger class stores no fewer"
    if sum(stored) <= sum(train):
        assert all(s <= n for s, n in zip(stored, train, strict=True))


def test_by_hand() -> None:
    # After one each: 90/1.5, /2.5, /3.5 go to the first before the second's 9/1.5 = 6.
    assert allocate([90, 9, 1], 2, "proportional") == (4, 1, 1)
    assert allocate([90, 9, 1], 10, "proportional") == (26, 3, 1)
    assert allocate([5, 5, 5], 4, "proportional") == (4, 4, 4)
    assert allocate([90, 9, 1], 2, "equal") == (2, 2, 2)
    with pytest.raises(ValueError, match="equal or proportional, got 'even'"):
        allocate([1], 1, "even")  # type: ignore[arg-type]


def test_equal_sets_keep_their_identity() -> None:
    assert fingerprint(shared_or_each((3, 3))) == fingerprint(3)
    assert shared_or_each((3, 4)) == (3, 4)
    assert fingerprint(shared_or_each((3, 4))) != fingerprint(shared_or_each((4, 3)))
    assert (images_text([3, 3]), images_text([4, 17, 3])) == ("3", "3 to 17")


def test_distil_arrays() -> None:
    labels = torch.arange(3).repeat_interleave(torch.tensor([30, 6, 2]))
    images = torch.rand(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = ncfm.Settings(
        networks=1, training=TrainConfig(epochs=1), ipc_allocation="proportional"
    )
    model = ModelConfig(depth=1, width=4)
    made = ncfm.distill(
        images, labels, ipc=3, settings=settings, model=model,
        num_steps=2, report=None,
    )  # fmt: skip
    assert made.labels.tolist() == [0] * 7 + [1] + [2]
