"""A cluster that starts with a head alone, grows, loses a node, and has another one reclaimed.

They run under `pytest -m long`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from raylets import Process, end, ray_environment, scratch, start, wait_for_text
from upath import UPath

import ncfm
from pipeline.observe.progress import read_rows

__all__ = ["scratch"]  # a fixture

ROOT = Path(__file__).parents[2]
STEPS = 2000  # seven minutes while they are held back, and some seconds when they are not
OPTIONS = {
    "shard.image_size": "16",
    "model.depth": "2",
    "model.width": "8",
    "pretrain.networks": "2",
    "pretrain.training.epochs": "1",
    "distill.num_steps": str(STEPS),
    "distill.real_batch": "8",
    "frequencies.sampler": "paced.law",
    "frequencies.num_freqs": "64",
    "runtime.log_every": "5",
    "runtime.min_workers": "1",
    "runtime.max_failures": "1",
    "num_workers": "2",
}


def command(storage: Path) -> list[str]:
    options = OPTIONS | {"storage_path": str(storage)}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    return ["python", "pipeline/run.py", "distill", *words]


class GrowingCluster:
    """A head without CPUs, and nodes of one CPU that come and go."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.hold = scratch, scratch / "hold"
        self.hold.touch()
        environment = ray_environment(scratch)
        port = int(environment["RAY_PORT"])
        self.address, dashboard = f"127.0.0.1:{port}", port + 3
        self.environment = environment | {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
            "NCFM_HOLD": str(self.hold),
        }
        self.shared = ["--block", f"--temp-dir={scratch}", f"--object-store-memory={10**8}"]
        head = ["ray", "start", "--head", f"--port={port}", "--num-cpus=0", "--num-gpus=0"]
        head += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={port + 1}"]
        head += [f"--dashboard-agent-listen-port={port + 2}", f"--metrics-export-port={port + 4}"]
        self.processes = [self.start([*head, *self.shared], "head")]
        wait_for_text(scratch / "head.log", "Ray runtime started", self.processes[0])

    def start(self, words: list[str], name: str) -> Process:
        return start(words, self.environment, self.scratch / f"{name}.log")

    def add(self, name: str) -> tuple[Process, str]:
        """A new node, and what Ray calls it."""
        before = self.nodes()
        words = ["ray", "start", f"--address={self.address}", "--num-cpus=1", "--num-gpus=0"]
        words += ["--dashboard-agent-listen-port=0"]
        self.processes.append(self.start([*words, *self.shared], name))
        until(lambda: bool(self.nodes() - before), f"node {name} is there")
        (node,) = self.nodes() - before
        return self.processes[-1], node

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ray", *words], env=self.environment, capture_output=True, text=True, cwd=ROOT
        )

    def ray(self, *words: str) -> str:
        done = self.call(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submits(self, words: list[str]) -> bool:
        """Whether the head has taken a job: it needs some seconds before it does."""
        submit = ["job", "submit", "--submission-id=job", "--no-wait", "--working-dir=."]
        submit += ["--runtime-env=cluster/runtime_env.yaml", "--", *words]
        return self.call(*submit).returncode == 0

    def nodes(self) -> set[str]:
        address = f"--address={self.environment['RAY_API_SERVER_ADDRESS']}"
        nodes = json.loads(self.ray("list", "nodes", address, "--format=json"))
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE"}

    def reclaim(self, node: str, seconds: int) -> None:
        """Announce that a node goes, as the provider of spot instances does."""
        self.ray(
            *("drain-node", f"--address={self.address}", f"--node-id={node}"),
            *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"),
            f"--deadline-remaining-seconds={seconds}",
        )

    def end(self) -> None:
        for process in reversed(self.processes):
            end(process)


def until(condition: Callable[[], bool], what: str, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s it was not true that {what}"
        time.sleep(0.5)


def kill(process: Process) -> None:
    """All of a node at once."""
    os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_job_on_a_cluster_that_comes_and_goes(scratch: Path, tmp_path: Path) -> None:
    """It waits and says for what, uses the nodes that come, goes on without one that is killed and
    with its replacement, saves before one is reclaimed, and ends as it does undisturbed.
    """
    cluster = GrowingCluster(scratch)
    metrics, log = UPath(tmp_path / "job" / "builtin" / "metrics.jsonl"), scratch / "job.log"

    def step(workers: int | None = None) -> int:
        """The last step that was logged by so many workers."""
        rows = [row for row in read_rows(metrics) if row["stage"] == "distill"]
        if not rows or workers not in (None, 1 + (rows[-1]["distill/imbalance"] > 1)):
            return 0
        return int(rows[-1]["step"])

    try:
        until(lambda: cluster.submits(command(tmp_path / "job")), "the head takes the job")
        job = cluster.start(["ray", "job", "logs", "--follow", "job"], "job")
        cluster.processes.append(job)
        wait_for_text(log, "waiting for nodes: 1 CPU wanted, 0 there", job)
        killed, _ = cluster.add("first")
        until(lambda: step(1) > 0, "one worker distils")
        _, reclaimed = cluster.add("second")
        until(lambda: step(2) > 0, "the second node's worker joined")
        kill(killed)
        until(lambda: step(1) > 0, "the other worker goes on alone")
        cluster.add("replacement")
        until(lambda: step(2) > 0, "the replacement's worker joined")
        cluster.reclaim(reclaimed, 30)
        wait_for_text(log, "a node is about to be reclaimed: checkpoint of step", job)
        (saved,) = re.findall(r"checkpoint of step (\d+)", log.read_text())[:1]
        until(lambda: step(1) > 0, "the worker on the replacement goes on alone")
        assert step() > int(saved), "it began again"
        cluster.hold.unlink()
        job.wait(300)
        assert "succeeded" in cluster.ray("job", "status", "job"), log.read_text()
    finally:
        cluster.end()
    rows = [row["step"] for row in read_rows(metrics) if row["stage"] == "distill"]
    assert rows == list(range(5, STEPS + 1, 5))
    environment = cluster.environment | {"RAY_TMPDIR": str(scratch)}
    environment.pop("RAY_API_SERVER_ADDRESS")
    alone = subprocess.run(
        [sys.executable, *command(tmp_path / "alone")[1:]],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    sets = [ncfm.load(tmp_path / name / "builtin" / "distilled") for name in ("job", "alone")]
    assert torch.equal(sets[0].images, sets[1].images)
