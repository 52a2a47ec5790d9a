"""The pipeline as its users start it: a submitted job, a process that gets Ctrl-C, a full disk.

They run under `pytest -m long`.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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

import ncfm

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


def options(storage: Path, **changes: str) -> list[str]:
    settings = TINY | changes | {"storage_path": str(storage)}
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


@pytest.mark.long
def test_job_submit_carries_results_and_exit_status(scratch: Path, tmp_path: Path) -> None:
    environment = ray_environment(scratch) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}
    port = int(environment["RAY_PORT"])
    head = ["ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    head += [f"--dashboard-port={port + 5}", "--object-store-memory=100000000"]
    head += [f"--dashboard-agent-listen-port={port + 2}", f"--metrics-export-port={port + 3}"]
    log = scratch / "log"
    process = start(head, environment, log)
    try:
        wait_for_text(log, "Ray runtime started", process)
        client = environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port + 5}"}

        def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = ["ray", "job", "submit", "--working-dir", str(ROOT)]
            command += ["--runtime-env", str(ROOT / "cluster" / "runtime_env.yaml"), "--"]
            command += ["python", "pipeline/run.py", *arguments]
            for _ in range(10):
                done = subprocess.run(command, env=client, capture_output=True, text=True, cwd=ROOT)
                if "No available agent" not in done.stderr:  # the head is still starting
                    break
                time.sleep(3)
            return done

        done = submit(*options(tmp_path / "runs"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "random_same_factor" in done.stdout
        assert (
            "\x1b[" not in done.stdout[done.stdout.index("[shard]") : done.stdout.index("report:")]
        )
        assert len(ncfm.load(tmp_path / "runs" / "builtin" / "distilled").images) == 10
        failed = submit("--ipc", "0")
        assert failed.returncode == 1
        assert "exit code 2" in failed.stdout + failed.stderr
        assert "ipc must be at least 1, got 0" in failed.stdout
    finally:
        end(process)


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
        assert "interrupted; the same command goes on" in text
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
