"""The collective operations that a distiller needs."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Communicator(Protocol):
    """Joins the workers of a run, and inside it the GROUP of workers that share the same classes.

    Every worker of a run, or of a group, calls the same sums in the same order. A sum is the same
    number, bit for bit, on all who took part: that is what keeps the members of a group alike.
    """

    @property
    def member(self) -> int:
        """This worker's place in its group, from 0."""
        ...

    @property
    def members(self) -> int:
        """Workers in its group."""
        ...

    def sum_all(self, tensor: Tensor) -> Tensor:
        """Sum over all workers of the run, in place."""
        ...

    def sum_group(self, tensor: Tensor) -> Tensor:
        """Sum over the members of the group, in place."""
        ...


class SingleProcess:
    """The communicator of a single process: sums of one summand."""

    member, members = 0, 1

    def sum_all(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def sum_group(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


def group_total(share: Tensor, communicator: Communicator) -> Tensor:
    """The sum of the members' shares; the share itself is left as it is."""
    return share if communicator.members == 1 else communicator.sum_group(share.clone())


def own_parts(tensors: Sequence[Tensor], communicator: Communicator, dim: int = 0) -> list[Tensor]:
    """This member's part of each along a dimension; it is empty if there is too little of it."""
    members, member = communicator.members, communicator.member
    return [tensor.tensor_split(members, dim)[member] for tensor in tensors]
