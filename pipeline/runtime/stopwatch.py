"""Seconds that sums over the workers take, the waiting for the others included.

On a GPU a sum returns when it is queued, so the CPU's clock tells nothing of it: there CUDA events
on the stream that waits for it are read, later and all at once.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up how long blocks take on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        if self.device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
        else:
            start = time.monotonic()
            yield
            self._seconds += time.monotonic() - start

    def read(self) -> float:
        """All seconds so far. On a GPU it waits until all that was queued before is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for began, ended in self._events:
            self._seconds += began.elapsed_time(ended) / 1000
        self._events.clear()
        return self._seconds
