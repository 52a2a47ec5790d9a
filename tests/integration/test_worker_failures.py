"""Errors of Ray Train's workers, and nodes that come after a run has asked for them."""

import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from raylets import end, ray_environment, scratch, start, wait_for_text
from upath import UPath

from pipeline.errors import WorkerError
from pipeline.runtime.workers import Workers, fit

__all__ = ["scratch"]  # a fixture

ROOT = Path(__file__).parents[2]


def fail_on_the_last_rank(arguments: dict[str, Any]) -> None:
    """The last worker has a wrong value; the others wait for it."""
    import torch.distributed as dist

    (Path(arguments["folder"]) / f"start-{uuid.uuid4().hex}").touch()
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("depth must be at least 1, got 0")
    dist.barrier()


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_wrong_value_ends_the_run_at_once(ray_cluster: str, tmp_path: Path, count: int) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker can import a test
    with pytest.raises(WorkerError) as caught:
        fit(
            fail_on_the_last_rank,
            {"folder": str(tmp_path)},
            Workers(count, use_gpu=False),
            name="wrong-value",
            storage=UPath(tmp_path / "ray"),
            max_failures=3,
        )
    assert str(caught.value) == "a worker failed: ValueError: depth must be at least 1, got 0"
    assert "fail_on_the_last_rank" in caught.value.details
    assert len(list(tmp_path.glob("start-*"))) == count, "once each, not four times"


LATE_GPU = """
import functools, sys
import ray.train.torch
import pipeline.runtime.workers as workers
from upath import UPath
# The GPU is a number only: what NCCL would do on it is not what is tested.
ray.train.torch.TorchConfig = functools.partial(ray.train.torch.TorchConfig, backend="gloo")
workers.connect()
group = workers.size_workers(1, True, 10, grows=workers.joins())
notice = workers.WaitingNotice(group.needs, lambda text: print(text, flush=True), every=1.0)
workers.fit(dict, {}, group, name="late", storage=UPath(sys.argv[1]), max_failures=0)
notice.end()
print("trained on", group.needs, flush=True)
"""


@pytest.mark.long
def test_a_run_waits_for_a_gpu_that_comes_on_demand(scratch: Path, tmp_path: Path) -> None:
    """The head has neither CPU nor GPU, as in cluster/; a node with one of each comes later."""
    environment = ray_environment(scratch)
    port = environment["RAY_PORT"]
    dashboard = int(port) + 3
    shared = ["--block", f"--temp-dir={scratch}", f"--object-store-memory={10**8}"]
    head = ["ray", "start", "--head", f"--port={port}", "--num-cpus=0", "--num-gpus=0", *shared]
    head += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={int(port) + 1}"]
    environment |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    log, run = scratch / "head.log", scratch / "run.log"
    processes = [start(head, environment, log)]
    try:
        wait_for_text(log, "Ray runtime started", processes[0])
        driver = [sys.executable, "-c", LATE_GPU, str(tmp_path / "ray")]
        address = {"RAY_ADDRESS": f"127.0.0.1:{port}", "PYTHONPATH": str(ROOT)}
        processes.append(start(driver, environment | address, run))
        wait_for_text(run, "waiting for nodes: 1 GPU and 1 CPU wanted, 0 and 0 there", processes[1])
        node = ["ray", "start", f"--address=127.0.0.1:{port}", "--num-cpus=1", "--num-gpus=1"]
        processes.append(start([*node, *shared], environment, scratch / "node.log"))
        assert processes[1].wait(200) == 0, run.read_text()
        assert "trained on {'GPU': 1.0, 'CPU': 1.0}" in run.read_text()
        assert run.read_text().rstrip().endswith("}"), "nothing is waited for any more"
    finally:
        for process in reversed(processes):
            end(process)
