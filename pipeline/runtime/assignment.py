"""Which workers have which classes: two axes of parallelism.

Classes are spread over GROUPS of workers. Most groups are one worker. With more workers than
classes, or with a class so large that the others would wait for it, a group has several members,
who share all of its classes: each takes a part of their real batches.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

SYNTHETIC_PASSES = 3.0
"""Cost of a decoded synthetic image in real ones: a forward and a backward pass."""
SHARING_GAIN = 1.1
"""Sharing classes that need not be shared must be predicted to be this much faster: every member
holds the real images of all of its group's classes."""
FEWEST_IMAGES = 64
"""Real images of a class and step that are worth a worker of their own."""


@dataclass(frozen=True, kw_only=True)
class ClassCost:
    """What a class costs in a step, in passes of an image through the extractor."""

    shared: float  # divided among the members of its group: the real images used
    own: float  # done by every member: the synthetic images

    @classmethod
    def of(cls, real: int, synthetic: int, *, calibrated: bool = False) -> "ClassCost":
        """From the real images really used in a step, and the decoded synthetic images."""
        return cls(shared=real, own=synthetic * SYNTHETIC_PASSES * (1 + calibrated))


@dataclass(frozen=True)
class Group:
    """Workers (ranks, in a row) and the classes that they share."""

    ranks: tuple[int, ...]
    classes: tuple[int, ...]

    def cost(self, costs: Sequence[ClassCost]) -> float:
        """Passes of one member in a step."""
        return _cost([costs[c] for c in self.classes], len(self.ranks))


def assign(costs: Sequence[ClassCost], workers: int) -> tuple[Group, ...]:
    """Groups that together hold every class and every worker once, the costliest group made cheap.

    For a number of groups: classes, the costliest first, go to the cheapest group so far; workers
    beyond one each go to the costliest. Of the numbers that are not slower than the best by more
    than SHARING_GAIN the largest is taken: in it the fewest workers share. Raises ValueError
    without a class or a worker.
    """
    if not costs or workers < 1:
        raise ValueError(f"need a class and a worker, got {len(costs)} and {workers}")
    order = sorted(range(len(costs)), key=lambda c: (-_cost([costs[c]], 1), c))
    most = min(workers, len(costs))
    ideal = sum(_cost([c], 1) for c in costs) / workers
    plans = [_divide(costs, order, most, workers)]
    if plans[0][1] > SHARING_GAIN * ideal:
        plans += [_divide(costs, order, count, workers) for count in range(most - 1, 0, -1)]
    lowest = min(cost for _, cost in plans)
    return next(groups for groups, cost in plans if cost <= SHARING_GAIN * lowest)


def most_workers(costs: Sequence[ClassCost]) -> int:
    """More workers than this would share classes in fewer than `FEWEST_IMAGES` images each."""
    return sum(max(1, int(c.shared) // FEWEST_IMAGES) for c in costs)


def _cost(classes: Sequence[ClassCost], members: int) -> float:
    return sum(c.shared for c in classes) / members + sum(c.own for c in classes)


def _divide(
    costs: Sequence[ClassCost], order: Sequence[int], count: int, workers: int
) -> tuple[tuple[Group, ...], float]:
    """`count` groups, and the cost of the costliest."""
    classes: list[list[int]] = [[] for _ in range(count)]
    load = [(0.0, 0, g) for g in range(count)]  # cost, classes, group; a heap
    for c in order:
        cost, number, g = load[0]
        classes[g].append(c)
        heapq.heapreplace(load, (cost + _cost([costs[c]], 1), number + 1, g))
    held = [[costs[c] for c in mine] for mine in classes]
    members = [1] * count
    costliest = [(-_cost(held[g], 1), g) for g in range(count)]
    heapq.heapify(costliest)
    for _ in range(workers - count):
        g = costliest[0][1]
        members[g] += 1
        heapq.heapreplace(costliest, (-_cost(held[g], members[g]), g))
    groups, rank = [], 0
    # Ranks of a node follow each other: large groups first, so that they stay on a node.
    for g in sorted(range(count), key=lambda g: (-members[g], g)):
        groups.append(Group(tuple(range(rank, rank + members[g])), tuple(sorted(classes[g]))))
        rank += members[g]
    return tuple(groups), -costliest[0][0]
