"""Which errors of workers are worth another try, and the one line about each."""

from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from pipeline.errors import ShardError, StorageError, StoreError, WorkerError
from pipeline.runtime.failures import guarded, preempted, raise_recorded, worker_error
from pipeline.runtime.workers import lacking, size_workers

STARTS: list[dict[str, Any]] = []


def loop(arguments: dict[str, Any]) -> None:
    STARTS.append(arguments)
    if (error := arguments.get("error")) is not None:
        raise error


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    STARTS.clear()
    return {"loop": loop, "failure": UPath(tmp_path / "failure.txt"), "device": "cpu"}


def test_a_permanent_error_is_not_tried_again(arguments: dict[str, Any]) -> None:
    arguments["error"] = ValueError("depth must be at least 1,\ngot 0")
    guarded(arguments)
    guarded(arguments)  # as if it were started again
    assert len(STARTS) == 1
    with pytest.raises(WorkerError) as caught:
        raise_recorded(arguments["failure"])
    assert str(caught.value) == "a worker failed: ValueError: depth must be at least 1, got 0"
    assert "Traceback" in caught.value.details
    assert "test_failures.py" in caught.value.details


@pytest.mark.parametrize("error", [ShardError("it is damaged"), StoreError("the disk is full")])
def test_real_images_that_cannot_be_had_are_permanent(
    arguments: dict[str, Any], error: Exception
) -> None:
    guarded({**arguments, "error": error})
    with pytest.raises(WorkerError, match=str(error)):
        raise_recorded(arguments["failure"])


@pytest.mark.parametrize(
    "error", [RuntimeError("NCCL"), OSError(5, "I/O"), MemoryError(), StorageError("cannot read")]
)
def test_others_are(arguments: dict[str, Any], error: Exception) -> None:
    arguments["error"] = error
    for _ in range(2):
        with pytest.raises(type(error)):
            guarded(arguments)
    assert len(STARTS) == 2
    raise_recorded(arguments["failure"])  # nothing


def test_a_loop_gets_its_arguments_and_its_result_stands(arguments: dict[str, Any]) -> None:
    guarded(arguments)
    assert [{"device": "cpu", "preempted": preempted}] == STARTS
    raise_recorded(arguments["failure"])


def test_rays_errors_become_one_line() -> None:
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    failures = {1: RuntimeError("second"), 0: RuntimeError("out of\nmemory")}
    group = worker_error(WorkerGroupError("a long\ntext", failures))
    assert str(group) == "worker 0 failed: RuntimeError: out of memory"
    assert group is not None
    assert "a long" in group.details
    controller = worker_error(ControllerError(TimeoutError("no answer")))
    assert str(controller) == "Ray Train failed: TimeoutError: no answer"
    task = RayTaskError("run", "Traceback: ...", ValueError("ipc"))
    for error in (task, task.as_instanceof_cause()):
        assert str(worker_error(error)) == "a task failed: ValueError: ipc"
    assert worker_error(ValueError("ipc")) is None, "not of a worker: its traceback is needed"


@pytest.mark.parametrize(
    ("asked", "alive", "expected"),  # workers, GPU?; CPUs and GPUs; workers, GPU?, CPUs of each
    [
        ((None, None), {}, (1, False, 1.0)),  # a head without CPUs
        ((4, True), {}, (4, True, 1.0)),
        ((None, True), {"CPU": 8, "GPU": 1}, (1, True, 1.0)),
        ((4, True), {"CPU": 8, "GPU": 1}, (4, True, 1.0)),
        ((16, False), {"CPU": 2}, (10, False, 1.0)),  # ten items
        ((None, None), {"CPU": 8, "GPU": 2}, (2, True, 1.0)),
    ],
)
def test_a_growing_cluster_is_asked_for_what_the_user_wants(
    asked: tuple[Any, Any],
    alive: dict[str, float],
    expected: tuple[int, bool, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: alive)
    found = size_workers(*asked, 10, grows=True)
    assert (found.count, found.use_gpu, found.cpus) == expected


def test_what_is_waited_for_is_said() -> None:
    needs = {"GPU": 4.0, "CPU": 4.0}
    assert lacking(needs, {"GPU": 4, "CPU": 32}) is None
    text = lacking(needs, {"CPU": 32.0, "GPU": 1.0})
    assert text == "waiting for nodes: 4 GPU wanted, 1 there"
    assert lacking(needs, {}) == "waiting for nodes: 4 GPU and 4 CPU wanted, 0 and 0 there"
