"""Processes are killed, with SIGKILL, and the run goes on to the very same images."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ncfm
from pipeline.cli import parse_command
from pipeline.errors import StageError
from pipeline.graph import Run
from pipeline.observe.progress import read_rows

ROOT = Path(__file__).parents[2]
STEPS = 60
PRESET = f"""
[shard]
image_size = 16
[model]
depth = 2
width = 8
[pretrain]
networks = 2
[pretrain.training]
epochs = 1
[distill]
num_steps = {STEPS}
real_batch = 8
lr = 0.02
calibration = 0.1
[frequencies]
sampler = "psi"
num_freqs = 64
num_components = 4
[runtime]
log_every = 2
checkpoint_every_s = 0.0
checkpoint_share = 1.0
max_failures = 3
"""


@dataclass(frozen=True)
class Runs:
    """Runs that share their shards and pool."""

    folder: Path

    def arguments(self, name: str, *options: str) -> list[str]:
        preset = self.folder / "kills.toml"
        preset.write_text(PRESET)
        storage = str(self.folder / "runs")
        base = ["--config", str(preset), "--storage_path", storage, "--name", name]
        return ["distill", *base, *options]

    def finish(self, name: str, *options: str) -> torch.Tensor:
        """The distilled images; the run is started in this process."""
        run = Run(parse_command(self.arguments(name, *options)))
        run.start()
        run.action("distill").perform()
        return ncfm.load(self.folder / "runs" / name / "distilled").images

    def start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """The same command in a process of its own."""
        command = [sys.executable, str(ROOT / "pipeline" / "run.py")]
        return subprocess.Popen(
            [*command, *self.arguments(name, *options)],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )

    def steps(self, name: str) -> list[int]:
        """The logged steps."""
        rows = read_rows(self.folder / "runs" / name / "metrics.jsonl")
        return [row["step"] for row in rows if row["stage"] == "distill"]

    def reached(self, name: str, step: int) -> bool:
        return max(self.steps(name), default=0) >= step


def wait_for(condition: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def train_workers(ancestor: int) -> list[int]:
    """Ray Train's workers among the descendants of a process. No other process is touched."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])

    def descends(pid: int) -> bool:
        while pid in parents and pid != ancestor:
            pid = parents[pid]
        return pid == ancestor

    return [pid for pid, name in names.items() if b"RayTrainWorker" in name and descends(pid)]


@pytest.fixture(scope="module")
def runs(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> torch.Tensor:
    return runs.finish("undisturbed", "--num_workers", "2")


def test_a_killed_worker(runs: Runs, undisturbed: torch.Tensor) -> None:
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: runs.reached("worker", 10))
        killed.append(random.choice(train_workers(os.getpid())))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    images = runs.finish("worker", "--num_workers", "2")
    thread.join()
    assert killed
    assert torch.equal(images, undisturbed)
    assert runs.steps("worker") == list(range(2, STEPS + 1, 2))  # no row lost or doubled


def test_a_killed_driver(runs: Runs, undisturbed: torch.Tensor, joined: None) -> None:
    driver = runs.start("driver", "--num_workers", "2")
    wait_for(lambda: runs.reached("driver", 10))
    driver.kill()
    driver.wait()
    wait_for(lambda: not train_workers(os.getpid()))  # Ray ends what belonged to the driver
    assert not (runs.folder / "runs" / "driver" / "distilled").exists()
    assert torch.equal(runs.finish("driver", "--num_workers", "2"), undisturbed)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test starts join the test's cluster."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def test_a_non_finite_loss_is_not_tried_again(runs: Runs) -> None:
    with pytest.raises(StageError, match=r"step 0: the loss of class .* is .*step-00000000"):
        runs.finish("infinite", "--num_workers", "2", "--frequencies.sigma", "1e39")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_on_four_and_resumed_on_two(
    runs: Runs, undisturbed: torch.Tensor, joined: None
) -> None:
    driver = runs.start("four", "--num_workers", "4")
    wait_for(lambda: runs.reached("four", 20))
    driver.kill()
    driver.wait()
    wait_for(lambda: not train_workers(os.getpid()))
    images = runs.finish("four", "--num_workers", "2")
    assert torch.equal(images, undisturbed)


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A cluster of this test's own, its head without CPUs: workers are on the other node."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }.items():
            patch.setenv(name, value)
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True}
        )
        cluster.add_node(num_cpus=4)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def replace_node(cluster: Any) -> None:
    """Kill the node that has the workers, with all its processes, and start another."""
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=4)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_node(undisturbed: torch.Tensor, runs: Runs, two_nodes: Any) -> None:
    """This test and the next take the session's cluster down and use their own: the last ones."""
    images: list[torch.Tensor] = []
    thread = threading.Thread(
        target=lambda: images.append(runs.finish("node", "--num_workers", "2"))
    )
    thread.start()
    wait_for(lambda: runs.reached("node", 10))
    replace_node(two_nodes)
    thread.join(600)
    assert images
    assert torch.equal(images[0], undisturbed)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_random_moments(runs: Runs, two_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, drivers and nodes, at any moment: also while a run starts or writes a checkpoint."""
    options = ("--num_workers", "2", "--runtime.max_failures", "-1", "--distill.num_steps", "400")
    undisturbed = runs.finish("undisturbed-400", *options)
    monkeypatch.setenv("RAY_ADDRESS", two_nodes.address)
    draw, kills, victims = random.Random(0), 0, ("worker", "driver", "node")
    name = "random"
    while True:
        process = runs.start(name, *options)
        for _ in range(20 - kills):
            while process.poll() is None and not train_workers(os.getpid()):
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 12))
            if process.poll() is not None:
                break  # it had ended before it could be killed
            kills, victim = kills + 1, victims[kills % 3]
            if victim == "node":
                replace_node(two_nodes)
            elif victim == "worker":
                for pid in train_workers(os.getpid())[:1]:
                    os.kill(pid, signal.SIGKILL)
            else:
                process.kill()
                break
        code = process.wait()
        wait_for(lambda: not train_workers(os.getpid()))  # Ray ends what belonged to a driver
        if code == 0:
            images = ncfm.load(runs.folder / "runs" / name / "distilled").images
            assert torch.equal(images, undisturbed)
            name = f"random-{kills}"
            if kills == 20:
                return
