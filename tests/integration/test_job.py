"""The pipeline as its users start it: a submitted job, a process that gets Ctrl-C, a full disk.

They run under `pytest -m long`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from raylets import (
    descendants,
    end,
    ray_environment,
    scratch,
    start,
    wait_for_text,
    wait_until_gone,
)
from upath import UPath

import ncfm
from pipeline.observe.progress import read_rows
from pipeline.runtime.checkpoint import newest_step

__all__ = ["scratch"]  # a fixture

ROOT = Path(__file__).parents[2]
TINY = {
    "shard.image_size": "16",
    "model.depth": "2",
    "model.width": "8",
    "pretrain.networks": "2",
    "pretrain.training.epochs": "1",
    "distill.num_steps": "4",
    "distill.real_batch": "8",
    "evaluate.repeats": "1",
    "evaluate.whole_epochs": "1",
    "evaluate.training.epochs": "1",
}


def options(storage: Path | UPath, **changes: str) -> list[str]:
    settings = TINY | changes | {"storage_path": str(storage)}
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


@dataclass(frozen=True)
class Client:
    """Whoever submits jobs to a cluster of a head and two raylets, one CPU each."""

    environment: dict[str, str]

    def ray(self, *words: str) -> CompletedProcess[str]:
        return subprocess.run(
            ["ray", *words], env=self.environment, capture_output=True, text=True, cwd=ROOT
        )

    def submit(self, *arguments: str, options: Sequence[str] = ()) -> CompletedProcess[str]:
        """As cluster/README.md says."""
        command = ["job", "submit", "--working-dir", ".", *options]
        command += ["--runtime-env", "cluster/runtime_env.yaml", "--"]
        return self.ray(*command, "python", "pipeline/run.py", *arguments)

    def listed(self, what: str, **filters: str) -> list[dict[str, str]]:
        """What the cluster says of its nodes or actors."""
        words = [w for key, value in filters.items() for w in ("--filter", f"{key}={value}")]
        address = f"--address={self.environment['RAY_API_SERVER_ADDRESS']}"
        done = self.ray("list", what, address, "--format=json", "--limit=1000", *words)
        assert done.returncode == 0, done.stderr
        found: list[dict[str, str]] = (
            [] if "No resource" in done.stdout else json.loads(done.stdout)
        )
        return found


@pytest.fixture(scope="module")
def client(s3: dict[str, str]) -> Iterator[Client]:
    """cluster/local.sh 2, its nodes with the credentials of an object store in the environment."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        scratch = Path(folder)
        environment = ray_environment(scratch) | s3 | {"CPUS_PER_RAYLET": "1"}
        dashboard = int(environment["RAY_PORT"]) + 5
        log = scratch / "log"
        script = ["bash", str(ROOT / "cluster" / "local.sh"), "2"]
        process = start(script, environment | {"DASHBOARD_PORT": str(dashboard)}, log)
        try:
            wait_for_text(log, "Ctrl-C ends the cluster", process)
            token = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", log.read_text())
            assert token
            yield Client(
                environment
                | {
                    "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN_PATH": token[1],
                }
            )
        finally:
            end(process)


def pipelines_part(log: str) -> str:
    """What the job wrote; before and after it, `ray job submit` speaks, in colours."""
    return log[log.index("[shard]") : log.index("report:")]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_job_submit_distils_on_both_raylets(client: Client, tmp_path: Path) -> None:
    done = client.submit(*options(tmp_path / "runs", num_workers="2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "random_same_factor" in done.stdout
    assert "\x1b" not in pipelines_part(done.stdout)
    assert len(ncfm.load(tmp_path / "runs" / "builtin" / "distilled").images) == 10
    rows = read_rows(tmp_path / "runs" / "builtin" / "metrics.jsonl")
    assert all(row["distill/imbalance"] > 1 for row in rows if row["stage"] == "distill")
    workers = client.listed("actors", class_name="RayTrainWorker")
    assert len(workers) == 2, "of the distillation: pretraining and evaluation are tasks"
    (head,) = (node["node_id"] for node in client.listed("nodes") if node["is_head_node"])
    nodes = {worker["node_id"] for worker in workers}
    assert len(nodes) == 2
    assert head not in nodes


@pytest.mark.long
def test_a_job_that_fails_says_so(client: Client) -> None:
    failed = client.submit("--ipc", "0")
    assert failed.returncode == 1
    assert "exit code 2" in failed.stdout + failed.stderr
    assert "ipc must be at least 1, got 0" in failed.stdout


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_search_as_a_job(client: Client, tmp_path: Path) -> None:
    preset = tmp_path / "search.toml"
    preset.write_text("[tune]\nsamples = 2\nepochs = 1\n[tune.space.ipc]\ngrid = [1, 2]\n")
    small = {k: v for k, v in TINY.items() if k.startswith(("shard", "model", "pre", "distill"))}
    words = [word for key, value in small.items() for word in (f"--{key}", value)]
    storage = ["--storage_path", str(tmp_path / "runs")]
    done = client.submit("tune", "--config", str(preset), *words, *storage)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in pipelines_part(done.stdout)
    found = json.loads((tmp_path / "runs" / "search" / "tune" / "results.json").read_text())
    assert [row["values"]["ipc"] for row in found["trials"]] == [1, 2, 1, 2]
    assert {row["status"] for row in found["trials"]} <= {"finished", "stopped"}


SLOW = {"distill.num_steps": "1000", "runtime.checkpoint_every_s": "1", "num_workers": "2"}


def submit_and_stop(client: Client, runs: UPath, name: str) -> int:
    """A slow run, stopped while it distils; the step of its newest checkpoint."""
    begun = client.submit(*options(runs, **SLOW), options=["--no-wait", "--submission-id", name])
    assert begun.returncode == 0, begun.stderr

    def newest() -> int:
        places = (runs / "builtin" / "checkpoints").glob("*")
        return max((found[0] for place in places if (found := newest_step(place))), default=0)

    deadline = time.monotonic() + 200
    while newest() < 100:
        assert time.monotonic() < deadline, client.ray("job", "logs", name).stdout
        time.sleep(0.5)
    stopped = client.ray("job", "stop", name)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert f"'{name}' was stopped" in client.ray("job", "status", name).stdout
    log = client.ray("job", "logs", name).stdout
    assert "interrupted; the same command resumes" in log
    assert "Traceback" not in log, log
    assert "SIGTERM" not in log, log
    assert "\x1b" not in log[log.index("[shard]") :]
    deadline = time.monotonic() + 60
    while client.listed("actors", class_name="RayTrainWorker", state="ALIVE"):
        assert time.monotonic() < deadline, "a worker outlives its job"
        time.sleep(1)
    assert not (runs / "builtin" / "distilled").exists()
    return newest()


def first_step(log: str) -> int:
    """The first that a run tells of."""
    line = next(line for line in log.splitlines() if "ncfd" in line)
    return int(line.split("[distill] ")[1].split("/")[0])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_stopped_job_ends_cleanly_and_goes_on_later(client: Client, tmp_path: Path) -> None:
    runs = UPath(tmp_path / "runs")
    left = submit_and_stop(client, runs, "stopped")
    done = client.submit(*options(runs, **SLOW))
    assert done.returncode == 0, done.stdout + done.stderr
    assert first_step(done.stdout) > left, "it began again"
    rows = read_rows(runs / "builtin" / "metrics.jsonl")
    steps = [row["step"] for row in rows if row["stage"] == "distill"]
    assert steps == sorted(set(steps)), "no row twice"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_job_whose_storage_is_an_object_store(client: Client, bucket: UPath) -> None:
    runs = bucket / "run"
    left = submit_and_stop(client, runs, "stopped-s3")

    done = client.submit(*options(runs, **SLOW))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("reusing") == 2, "shards and pool"
    assert first_step(done.stdout) > left, "it began again"
    written = contents(runs)
    for pattern in (
        r"cache/shard-\w+/train/0009-00000\.tar",
        r"cache/pretrain-\w+/network-001\.safetensors",
        r"cache/evaluate/\w+\.json",
        r"builtin/checkpoints/\w+/step-00001000/checkpoint\.json",
        r"builtin/distilled/images/.+/0\.png",
        r"builtin/evaluation\.json",
        r"builtin/report\.html",
    ):
        assert any(re.fullmatch(pattern, name) for name in written), pattern
    assert len(ncfm.load(runs / "builtin" / "distilled").images) == 10
    rows = read_rows(runs / "builtin" / "metrics.jsonl")
    steps = [row["step"] for row in rows if row["stage"] == "distill"]
    assert steps == sorted(set(steps)), "no row twice"

    again = client.submit(*options(runs, **SLOW))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "done in" not in pipelines_part(again.stdout)
    summaries = {"config.toml", "stages.json", "evaluation.json", "report.html"}
    anew = dict(contents(runs).items() - written.items())
    assert anew.keys() <= {f"builtin/{name}" for name in summaries}

    here = {path.name for path in Path(client.environment["HOME"]).rglob("*")}
    assert "run.py" in here, "the directory that the jobs ran in"
    assert not {name for name in here if name in summaries or name.endswith((".tar", "tensors"))}


def contents(root: UPath) -> dict[str, str]:
    """What lies in an object store: (name below the root -> when it was written)."""
    found = root.fs.find(root.path, detail=True)
    return {
        name.removeprefix(f"{root.path}/"): str(entry["LastModified"])
        for name, entry in found.items()
    }


@pytest.mark.long
@pytest.mark.parametrize("stage", ["shard", "pretrain", "distill", "evaluate"])
def test_ctrl_c_ends_quickly_and_the_same_command_goes_on(
    scratch: Path, tmp_path: Path, stage: str
) -> None:
    environment = ray_environment(scratch)
    slow = {"pretrain.training.epochs": "3", "evaluate.training.epochs": "300"}
    if stage == "distill":
        slow |= {"distill.num_steps": "1500", "runtime.checkpoint_every_s": "1"}
    command = [sys.executable, str(ROOT / "pipeline/run.py"), *options(tmp_path / "runs", **slow)]
    log = scratch / "log"
    process = start(command, environment, log)
    try:
        wait_for_text(log, f"[{stage}] /", process)
        if stage == "distill":
            wait_for_text(log, "ncfd", process)
        time.sleep(3)
        started, began = descendants(process.pid), time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
        seconds = time.monotonic() - began
        # An agent of Ray that was still starting looks for its head for up to a minute.
        assert wait_until_gone(started, 90) == set()
        text = log.read_text()
        assert "interrupted; the same command resumes" in text
        assert text.count("Traceback") == 0, text
        assert seconds < 30  # 10 s on a machine that does nothing else
    finally:
        end(process)
    quick = options(tmp_path / "runs", **(slow | {"evaluate.training.epochs": "1"}))
    again = subprocess.run(
        [sys.executable, str(ROOT / "pipeline/run.py"), *quick],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    if stage == "distill":
        first = next(line for line in again.stdout.splitlines() if "ncfd" in line)
        assert int(first.split("[distill] ")[1].split("/")[0]) > 10, "it began again at step 0"
