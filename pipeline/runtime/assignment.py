"""Assignment of classes to workers, with two axes of parallelism.

Classes are distributed over GROUPS of workers. Most groups are one worker. With more workers than
classes, or a class so large that the others would wait for it, a group has several members that
share all of its classes: each processes a part of the real batches.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ncfm.distill_config import DistillConfig
from ncfm.selection import easy_count

SYNTHETIC_PASSES = 3.0
"""Cost of a decoded synthetic image, in real images: a forward and a backward pass."""
SHARING_GAIN = 1.1
"""Minimum predicted speed-up for sharing classes that need not be shared, since every member holds
the real images of all of its group's classes."""
FEWEST_IMAGES = 64
"""Real images per class and step that justify an additional worker."""


@dataclass(frozen=True, kw_only=True)
class ClassCost:
    """Cost of a class in a step, in image passes through the extractor."""

    shared: float  # divided among the group's members: real images
    own: float  # repeated by every member: synthetic images

    @classmethod
    def of(cls, real: int, synthetic: int, *, calibrated: bool = False) -> "ClassCost":
        """From the numbers of real and of decoded synthetic images in a step."""
        return cls(shared=real, own=synthetic * SYNTHETIC_PASSES * (1 + calibrated))


def step_costs(
    config: DistillConfig, factor: int, stored: Sequence[int], train: Sequence[int]
) -> list[ClassCost]:
    """Cost per class of a step, from the stored and the train images of each class."""
    matched = (easy_count(n, config.easy_fraction) for n in train)
    real = (min(n, config.real_batch) for n in matched)
    return [
        ClassCost.of(n, factor**2 * images, calibrated=config.calibration > 0)
        for n, images in zip(real, stored, strict=True)
    ]


@dataclass(frozen=True)
class Group:
    """Workers (consecutive ranks) and the classes they share."""

    ranks: tuple[int, ...]
    classes: tuple[int, ...]

    def cost(self, costs: Sequence[ClassCost]) -> float:
        """Image passes of one member in a step."""
        return _cost([costs[c] for c in self.classes], len(self.ranks))


def assign(costs: Sequence[ClassCost], workers: int) -> tuple[Group, ...]:
    """Partition classes and workers into groups, minimising the cost of the costliest group.

    Greedy for a given number of groups: classes, costliest first, go to the cheapest group; workers
    beyond one per group go to the costliest. Of the group counts within SHARING_GAIN of the best,
    the largest is taken, in which the fewest workers share. Raises ValueError without a class or a
    worker.
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
    """The most workers that each get at least `FEWEST_IMAGES` real images of a shared class."""
    return sum(max(1, int(c.shared) // FEWEST_IMAGES) for c in costs)


def _cost(classes: Sequence[ClassCost], members: int) -> float:
    return sum(c.shared for c in classes) / members + sum(c.own for c in classes)


def _divide(
    costs: Sequence[ClassCost], order: Sequence[int], count: int, workers: int
) -> tuple[tuple[Group, ...], float]:
    """`count` groups, and the highest group cost."""
    classes: list[list[int]] = [[] for _ in range(count)]
    load = [(0.0, 0, g) for g in range(count)]  # cost, classes, group; a heap
    for c in order:
        cost, number, g = load[0]
        classes[g].append(c)
        heapq.heapreplace(load, (cost + _cost([costs[c]], 1), number + 1, g))
    held = [[costs[c] for c in group] for group in classes]
    members = [1] * count
    costliest = [(-_cost(held[g], 1), g) for g in range(count)]
    heapq.heapify(costliest)
    for _ in range(workers - count):
        g = costliest[0][1]
        members[g] += 1
        heapq.heapreplace(costliest, (-_cost(held[g], members[g]), g))
    groups, rank = [], 0
    # Ranks of a node are consecutive: large groups first, so that they stay on one node.
    for g in sorted(range(count), key=lambda g: (-members[g], g)):
        groups.append(Group(tuple(range(rank, rank + members[g])), tuple(sorted(classes[g]))))
        rank += members[g]
    return tuple(groups), -costliest[0][0]
