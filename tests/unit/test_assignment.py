"""Every class and every worker has its place, and no worker waits long for another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.assignment import ClassCost, Group, assign

COSTS = st.lists(
    st.builds(ClassCost, shared=st.integers(1, 2000), own=st.integers(0, 600)),
    min_size=1,
    max_size=40,
)


def makespan(groups: tuple[Group, ...], costs: list[ClassCost]) -> float:
    return max(group.cost(costs) for group in groups)


@given(costs=COSTS, workers=st.integers(1, 60))
def test_every_class_and_every_worker_once(costs: list[ClassCost], workers: int) -> None:
    groups = assign(costs, workers)
    assert sorted(c for group in groups for c in group.classes) == list(range(len(costs)))
    assert [rank for group in groups for rank in group.ranks] == list(range(workers))
    assert all(group.classes and group.ranks for group in groups)
    assert groups == assign(costs, workers)


@given(costs=COSTS, workers=st.integers(1, 60))
def test_no_worker_has_much_more_than_a_fair_share(costs: list[ClassCost], workers: int) -> None:
    """Greedy assignment is within 4/3 of the best for groups of one; sharing may only better it."""
    groups = assign(costs, workers)
    whole = [c.shared + c.own for c in costs]
    fair = max(sum(whole) / workers, max(whole))
    assert makespan(groups, costs) <= 4 / 3 * fair + max(whole)
    if len(costs) >= workers:
        assert makespan(groups, costs) <= sum(whole) / workers + max(whole)


@given(classes=st.integers(1, 200), workers=st.integers(1, 60))
def test_equal_classes_are_spread_evenly(classes: int, workers: int) -> None:
    costs = [ClassCost(shared=64, own=1_000)] * classes  # not worth sharing
    groups = assign(costs, workers)
    if classes >= workers:
        numbers = [len(group.classes) for group in groups]
        assert max(numbers) - min(numbers) <= 1
    else:
        members = [len(group.ranks) for group in groups]
        assert len(groups) == classes
        assert max(members) - min(members) <= 1


@given(costs=COSTS, workers=st.integers(2, 30))
def test_classes_are_shared_without_need_only_for_a_gain(
    costs: list[ClassCost], workers: int
) -> None:
    groups = assign(costs, workers)
    if len(groups) < min(len(costs), workers):
        unshared = assign([ClassCost(shared=0, own=c.shared + c.own) for c in costs], workers)
        assert makespan(groups, costs) < makespan(unshared, costs)


def test_a_large_class_gets_more_workers() -> None:
    costs = [ClassCost(shared=n, own=0) for n in (1200, 100, 100, 100, 100)]
    groups = assign(costs, 4)
    assert {group.classes: len(group.ranks) for group in groups} == {(0,): 3, (1, 2, 3, 4): 1}


def test_more_workers_than_classes() -> None:
    groups = assign([ClassCost(shared=1024, own=12)] * 2, 4)
    assert groups == (Group((0, 1), (0,)), Group((2, 3), (1,)))


def test_a_thousand_classes_on_512_workers() -> None:
    """1000 classes on 512 workers: two each would leave a quarter of the workers' time unused."""
    costs = [ClassCost(shared=1024, own=120)] * 1000
    fair = sum(c.shared + c.own for c in costs) / 512
    assert makespan(assign(costs, 512), costs) < 1.2 * fair


def test_the_cost_counts_passes() -> None:
    assert ClassCost.of(100, 40) == ClassCost(shared=100, own=120)
    assert ClassCost.of(100, 40, calibrated=True).own == 240


def test_nothing_to_assign_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 1"):
        assign([], 1)
    with pytest.raises(ValueError, match="got 1 and 0"):
        assign([ClassCost(shared=1, own=1)], 0)
