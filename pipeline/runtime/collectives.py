"""All that crosses the network while workers distil: sums over the workers, and how much they are.

In a step with psi on, every ascent sums psi's gradient over all W workers, at the log-scales of its
M components in D feature dimensions; a group of m > 1 workers that share C_g classes sums its CF
sums, (2 K + 1) numbers a class, of the real features for every ascent; the descent has those of the
first. A ring all-reduce of B bytes over n workers sends 2 (n - 1) B bytes in total. With 8 bytes a
number for psi and F for the others

    bytes a step = 2 [8 ascents M D (W - 1) + F sum_g (m_g - 1) C_g (2 K + 1) max(1, ascents)]

and the metrics, a few numbers of 8 bytes and one for each worker, every `log_every` steps. With psi
off and no class shared, nothing else crosses at all. Images never do.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ncfm.frequencies import FrequencyConfig
from pipeline.runtime.assignment import Group
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.runtime.workers import WorkerContext

DIAGNOSIS_S = 30.0
"""How long a failed sum waits for the others to come and be counted."""


class CollectiveError(RuntimeError):
    """A sum over the workers did not come about; the message names the ranks that did not come."""


class Collectives:
    """The `ncfm.communication.Communicator` of a worker under torch.distributed, or alone.

    All workers of a run make one together. `bytes_sent` and `seconds` (spent in sums) count up.
    """

    def __init__(
        self, context: WorkerContext, groups: Sequence[Group], *, timeout_s: float
    ) -> None:
        self.context, self.bytes_sent, self._watch = context, 0.0, Stopwatch(context.device)
        self._timeout = timedelta(seconds=timeout_s)
        self._all = self._control_all = self._group = self._control_group = None
        # Every worker calls for every group, in the same order: torch asks for it.
        if context.world_size > 1:
            self._all, self._control_all = self._new(range(context.world_size))
        for group in groups:
            made = self._new(group.ranks) if len(group.ranks) > 1 else (None, None)
            if context.rank in group.ranks:
                self._group, self._control_group = made
                self.member, self.members = group.ranks.index(context.rank), len(group.ranks)

    def _new(self, ranks: Sequence[int]) -> tuple[Any, Any]:
        """A group for sums, and one on the CPU beside it, to count who is there if it is stuck."""
        backends = (None, "gloo")
        made = [dist.new_group(list(ranks), timeout=self._timeout, backend=b) for b in backends]
        return made[0], made[1]

    @property
    def seconds(self) -> float:
        """Spent in sums so far, waiting included; on a GPU all that was queued is done then."""
        return self._watch.read()

    def sum_all(self, tensor: Tensor) -> Tensor:
        """Sum over all workers, in place. Raises CollectiveError."""
        return self._sum(tensor, self.context.world_size, self._all, self._control_all)

    def sum_group(self, tensor: Tensor) -> Tensor:
        """Sum over the workers that share this one's classes, in place. Raises CollectiveError."""
        return self._sum(tensor, self.members, self._group, self._control_group)

    def gather(self, value: object) -> list[Any]:
        """The values of all workers, by rank."""
        values = [value] * self.context.world_size
        if self.context.world_size > 1:
            dist.all_gather_object(values, value, group=self._control_all)
        return values

    def agree(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """The state with every value as the lowest rank that has it holds it, and which ranks held
        another: {key: ranks}, the same for all workers.

        Workers that hold the same value compute it each. On unlike processors, or where a GPU's
        kernels add in no fixed order, their results may drift apart. What is compared are hashes:
        only values that differ are sent.
        """
        hashes = self.gather({key: _sha256(value) for key, value in state.items()})
        owners: dict[str, int] = {}
        for rank, theirs in enumerate(hashes):
            for key in theirs:
                owners.setdefault(key, rank)
        drifted: dict[str, list[int]] = {}
        for rank, theirs in enumerate(hashes):
            for key, value in theirs.items():
                if value != hashes[owners[key]][key]:
                    drifted.setdefault(key, []).append(rank)
        if not drifted:
            return dict(state), {}
        sent = self.gather({k: state[k] for k in drifted if owners[k] == self.context.rank})
        right = {key: value for theirs in sent for key, value in theirs.items() if key in state}
        return {**state, **right}, drifted

    def _sum(self, tensor: Tensor, size: int, group: Any, control: Any) -> Tensor:
        if size == 1:
            return tensor
        try:
            with self._watch.running():
                dist.all_reduce(tensor, group=group)
        except RuntimeError as error:
            raise self._who_is_missing(control) from error
        self.bytes_sent += 2 * (size - 1) / size * tensor.nbytes
        return tensor

    def _who_is_missing(self, control: Any) -> CollectiveError:
        what = f"rank {self.context.rank}: a sum over the workers failed"
        wait = min(self._timeout, timedelta(seconds=DIAGNOSIS_S))
        try:
            dist.monitored_barrier(control, timeout=wait, wait_all_ranks=True)
        except RuntimeError as error:  # it names the ranks
            return CollectiveError(f"{what}, and not all are there: {error}")
        return CollectiveError(f"{what}, though all workers are there")


def _sha256(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().cpu().numpy().tobytes()).hexdigest()


def predicted_bytes(
    groups: Sequence[Group], frequencies: FrequencyConfig, *, dim: int, number_bytes: int = 4
) -> int:
    """Bytes that all workers together send in a step, without the metrics and what the median
    distance takes: the formula above.

    `dim` is the dimension of the features.
    """
    psi = frequencies.sampler == "psi"
    ascents, width = psi * frequencies.ascents, 2 * frequencies.num_freqs + 1
    scales = frequencies.num_components * dim
    classes = len({c for group in groups for c in group.classes})
    workers = sum(len(group.ranks) for group in groups)
    shared = sum((len(group.ranks) - 1) * len(group.classes) for group in groups)
    descents = number_bytes * shared * width
    if frequencies.learns_between_classes:
        between = number_bytes * classes * width
        return 2 * (ascents * (8 * scales + between) * (workers - 1) + descents)
    return 2 * (8 * ascents * scales * (workers - 1) + descents * max(1, ascents))
