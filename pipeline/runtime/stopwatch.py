"""Time spent in all-reduces, including waiting for other workers.

On a GPU an all-reduce returns when it is queued, so it is timed by CUDA events on the stream that
waits for it; the events are read later, all at once.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Cumulative time of code blocks on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the enclosed block."""
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
        """Seconds so far; synchronises a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for began, ended in self._events:
            self._seconds += began.elapsed_time(ended) / 1000
        self._events.clear()
        return self._seconds
