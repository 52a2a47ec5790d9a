"""How long sums over the workers take, also where they return before they are done."""

import time
from typing import Any

import pytest
import torch

from pipeline.runtime.stopwatch import Stopwatch

QUEUE: list[str] = []


class Event:
    """Of a GPU on which a sum takes 2.5 s, whatever the CPU does meanwhile."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        QUEUE.append("event")

    def elapsed_time(self, end: "Event") -> float:
        assert QUEUE[-1] == "synchronized", "an event that has not happened has no time"
        return 2500.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    def synchronize(device: Any) -> None:
        QUEUE.append("synchronized")

    QUEUE.clear()
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    return torch.device("cuda", 0)


def test_on_a_gpu_its_own_time_counts(gpu: torch.device) -> None:
    watch = Stopwatch(gpu)
    for _ in range(2):
        with watch.running():
            QUEUE.append("sum")
    assert QUEUE == ["event", "sum", "event"] * 2, "nothing waits while steps are queued"
    assert watch.read() == 5.0
    assert watch.read() == 5.0, "no event counts twice"
    Stopwatch(gpu).read()
    assert QUEUE[-3:] == ["synchronized"] * 3, "also where nothing was summed: steps are queued"


def test_on_a_cpu_the_clock_counts() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch.running():
        time.sleep(0.05)
    time.sleep(0.1)
    assert 0.05 <= watch.read() < 0.15
