"""All-reduces between distillation workers, and the bytes they send.

With psi on, every ascent step all-reduces psi's gradient over all W workers: the log-scales of its
M components in D feature dimensions. A group of m > 1 workers that share C_g classes all-reduces
the CF sums of the real features, (2 K + 1) numbers per class, in every ascent; the descent reuses
those of the first. A ring all-reduce of B bytes over n workers sends 2 (n - 1) B bytes in total.
With 8 bytes per number for psi and F for the rest

    bytes per step = 2 [8 ascents M D (W - 1) + F sum_g (m_g - 1) C_g (2 K + 1) max(1, ascents)]

plus the metrics, a few 8-byte numbers and one per worker, every `log_every` steps. With psi off and
no class shared, nothing else is sent. Images never are.
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
"""Timeout of the barrier that finds the missing ranks after a failed all-reduce."""


class CollectiveError(RuntimeError):
    """An all-reduce failed; the message names the missing ranks."""


class Collectives:
    """The `ncfm.communication.Communicator` of a worker: torch.distributed, or a single process.

    All workers of a run construct it together. `bytes_sent` and `seconds` (in all-reduces) are
    cumulative.
    """

    def __init__(
        self, context: WorkerContext, groups: Sequence[Group], *, timeout_s: float
    ) -> None:
        self.context, self.bytes_sent, self._watch = context, 0.0, Stopwatch(context.device)
        self._timeout = timedelta(seconds=timeout_s)
        self._all = self._control_all = self._group = self._control_group = None
        # torch requires every worker to create every group, in the same order.
        if context.world_size > 1:
            self._all, self._control_all = self._new(range(context.world_size))
        for group in groups:
            handles = self._new(group.ranks) if len(group.ranks) > 1 else (None, None)
            if context.rank in group.ranks:
                self._group, self._control_group = handles
                self.member, self.members = group.ranks.index(context.rank), len(group.ranks)

    def _new(self, ranks: Sequence[int]) -> tuple[Any, Any]:
        """A process group for all-reduces, and a CPU group that finds missing ranks if it hangs."""
        backends = (None, "gloo")
        groups = [dist.new_group(list(ranks), timeout=self._timeout, backend=b) for b in backends]
        return groups[0], groups[1]

    @property
    def seconds(self) -> float:
        """Seconds in all-reduces so far, including waiting; synchronises a GPU."""
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
        """The state with every value replaced by that of the lowest rank that holds it, and the
        ranks whose value differed: {key: ranks}, the same on all workers.

        Replicated values are computed on every worker. On different processors, or with GPU kernels
        that add in no fixed order, they may drift apart. Hashes are compared; only differing values
        are sent.
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
        failure = f"rank {self.context.rank}: a sum over the workers failed"
        wait = min(self._timeout, timedelta(seconds=DIAGNOSIS_S))
        try:
            dist.monitored_barrier(control, timeout=wait, wait_all_ranks=True)
        except RuntimeError as error:  # it names the ranks
            return CollectiveError(f"{failure}, and some workers are missing: {error}")
        return CollectiveError(f"{failure}, though all workers are present")


def _sha256(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().cpu().numpy().tobytes()).hexdigest()


def predicted_bytes(
    groups: Sequence[Group], frequencies: FrequencyConfig, *, dim: int, number_bytes: int = 4
) -> int:
    """Bytes that all workers together send in a step, by the formula above, without the metrics and
    the median distance.

    `dim`: the feature dimension.
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
