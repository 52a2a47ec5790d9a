"""Where a run computes is decided once: no other place asks whether this machine has a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.config import RunConfig
from pipeline.runtime.workers import Workers, current_context
from pipeline.stages.probe import Request, probe_requests


@pytest.fixture(autouse=True)
def _machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)


def test_a_worker_computes_where_it_is_told() -> None:
    assert current_context(Workers(4, use_gpu=False).device).device == torch.device("cpu")
    assert current_context(Workers(4, use_gpu=True).device).device == torch.device("cuda", 2)


def test_each_probe_has_a_gpu_of_its_own() -> None:
    request = Request(config=RunConfig(), classes=1, real=[1], stored=[1], threads=1, seconds=1.0)
    assert [r.device for r in probe_requests(request, 3)] == ["cpu"] * 3
    gpu = replace(request, device="cuda")
    assert [r.device for r in probe_requests(gpu, 3)] == ["cuda:0", "cuda:1", "cuda:2"]


def test_nobody_else_asks_for_a_gpu() -> None:
    files = Path(pipeline.__file__).parent.rglob("*.py")
    asking = [path.name for path in files if "cuda.is_available" in path.read_text()]
    assert asking == [], "Workers.use_gpu is the decision"
