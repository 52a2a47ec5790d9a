"""Allocation: how many images each class stores."""

import heapq
from collections.abc import Sequence
from typing import Literal

Allocation = Literal["equal", "proportional"]


def allocate(train: Sequence[int], ipc: int, allocation: Allocation) -> tuple[int, ...]:
    """Stored images of each class, from the train images of each.

    `equal`: ipc each. `proportional`: ipc x classes in all, by Webster's method: each class
    has one, and every further image goes to the class with the most train images per stored one,
    train / (stored + 1/2), of equal ones to the first. So no class loses an image when ipc grows,
    and none stores more than it has, unless all together do. Raises ValueError for an unknown
    allocation.
    """
    if allocation == "equal":
        return (ipc,) * len(train)
    if allocation != "proportional":
        raise ValueError(f"allocation must be equal or proportional, got {allocation!r}")
    stored = [1] * len(train)
    waiting = [(-n / 1.5, c) for c, n in enumerate(train)]
    heapq.heapify(waiting)
    for _ in range((ipc - 1) * len(train)):
        _, c = waiting[0]
        stored[c] += 1
        heapq.heapreplace(waiting, (-train[c] / (stored[c] + 0.5), c))
    return tuple(stored)


def shared_or_each(stored: tuple[int, ...]) -> int | tuple[int, ...]:
    """One number where all classes store the same, else that of each: equal sets are identified as
    before there were others.
    """
    return stored[0] if len(set(stored)) == 1 else stored


def images_text(stored: Sequence[int]) -> str:
    """Images per class as text: "10", or "3 to 17"."""
    least, most = min(stored), max(stored)
    return str(least) if least == most else f"{least} to {most}"
