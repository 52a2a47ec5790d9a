"""cluster/local.sh, and cluster/slurm.sbatch with stand-ins for Slurm's commands, on real raylets.

They run under `pytest -m long`. Everything that a test starts it ends by PID.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
import textwrap
from pathlib import Path

import pytest
from raylets import (
    Birth,
    descendants,
    end,
    ray_environment,
    scratch,
    start,
    wait_for_text,
    wait_until_gone,
)

__all__ = ["scratch"]  # a fixture

CLUSTER = Path(__file__).parents[2] / "cluster"


def executable(path: Path, script: str) -> None:
    """Write a bash script and make it executable."""
    path.write_text("#!/usr/bin/env bash\n" + textwrap.dedent(script))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


COUNT_GPUS = """
import ray
ray.init(logging_level="WARNING")
gpus = sorted(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
print("GPUs by node:", gpus)
"""


@pytest.mark.long
def test_local_starts_a_head_and_raylets_and_ctrl_c_ends_them(scratch: Path) -> None:
    environment = ray_environment(scratch)
    dashboard = int(environment["RAY_PORT"]) + 5
    log = scratch / "log"
    process = start(
        ["bash", str(CLUSTER / "local.sh"), "2"],
        environment
        | {
            "DASHBOARD_PORT": str(dashboard),
            "CPUS_PER_RAYLET": "1",
            "CUDA_VISIBLE_DEVICES": "0,1,2",
        },
        log,
    )
    try:
        wait_for_text(log, "Ctrl-C ends the cluster", process)
        token = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", log.read_text())
        assert token
        assert stat.S_IMODE(Path(token[1]).stat().st_mode) == 0o600
        client = environment | {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_AUTH_MODE": "token",
        }
        submit = ["ray", "job", "submit", "--", "python", "-c", COUNT_GPUS]
        stranger = subprocess.run(
            submit, env=client | {"RAY_AUTH_TOKEN": "0" * 64}, capture_output=True, text=True
        )
        assert stranger.returncode != 0
        owner = subprocess.run(
            submit, env=client | {"RAY_AUTH_TOKEN_PATH": token[1]}, capture_output=True, text=True
        )
        assert owner.returncode == 0, owner.stdout + owner.stderr
        assert "GPUs by node: [0, 1, 2]" in owner.stdout

        started = descendants(process.pid)
        assert len(started) > 10  # three nodes of several processes
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        assert process.wait(90) == 130
        assert wait_until_gone(started) == set()
        assert list(scratch.glob("ncfm-*")) == []
    finally:
        end(process)


@pytest.fixture
def slurm(scratch: Path) -> dict[str, str]:
    """Three nodes, all of them this machine, behind stand-ins for scontrol and srun."""
    bin_directory = scratch / "bin"
    bin_directory.mkdir()
    executable(
        bin_directory / "scontrol",
        """
        if [[ $1 == requeue ]]; then echo "$*" >>"$SRUN_LOG.requeued"; exit; fi
        [[ "$*" == "show hostnames node[1-3]" ]] && printf '127.0.0.%d\\n' 1 2 3
        """,
    )
    executable(
        bin_directory / "srun",
        """
        # The command once per node of --nodelist, each with its own disk; SIGTERM goes on to all.
        while [[ $1 == --* ]]; do
          if [[ $1 == --nodelist=* ]]; then IFS=, read -ra nodes <<<"${1#*=}"; fi
          if [[ $1 == --ntasks=* ]]; then tasks=${1#*=}; fi
          shift
        done
        ((tasks == ${#nodes[@]})) || exit 9
        echo "${nodes[*]}: ${*: -1}" >>"$SRUN_LOG"
        for node in "${nodes[@]}"; do
          RAY_TMPDIR=$RAY_TMPDIR-$node "$@" &
          # Ray gives a raylet 30 s to start: not all at once on one machine.
          if [[ $* == *--address=* ]]; then sleep 5; fi
        done
        trap 'kill -TERM $(jobs -p) 2>/dev/null' TERM
        while [[ -n $(jobs -pr) ]]; do wait; done
        """,
    )
    submit_directory = scratch / "submit"
    (submit_directory / "cluster").mkdir(parents=True)
    shutil.copy(CLUSTER / "runtime_env.yaml", submit_directory / "cluster")
    environment = ray_environment(scratch)
    return environment | {
        "PATH": f"{bin_directory}:{environment['PATH']}",
        "SRUN_LOG": str(scratch / "srun.log"),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": str(submit_directory),
    }


def assert_clean(scratch: Path, started: set[Birth]) -> None:
    """No process, no token, no directory of Ray is left."""
    assert wait_until_gone(started) == set()
    assert list(scratch.glob(".ncfm-ray-*")) == []
    assert list(scratch.glob("ray-4242*")) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        (COUNT_GPUS, 0, "GPUs by node: [0, 0, 0]"),
        ("raise SystemExit(3)", 1, "failed with exit code 3"),
    ],
)
def test_slurm_script_runs_a_job(
    scratch: Path, slurm: dict[str, str], code: str, status: int, expected: str
) -> None:
    log = scratch / "log"
    if status == 0 and shutil.which("ip"):
        slurm |= {"NETWORK_INTERFACE": "lo"}
        code += "\nimport os; assert os.environ['GLOO_SOCKET_IFNAME'] == 'lo'"
    process = start(["bash", str(CLUSTER / "slurm.sbatch"), "python", "-c", code], slurm, log)
    try:
        wait_for_text(log, "submitted successfully", process)
        started = descendants(process.pid)
        assert len(started) > 10
        assert process.wait(120) == status, log.read_text()
        assert expected in log.read_text()
        assert "\x1b" not in log.read_text()
        calls = Path(slurm["SRUN_LOG"]).read_text().splitlines()
        head, workers = "127.0.0.1", "127.0.0.2 127.0.0.3"
        assert [call.partition(":")[0] for call in calls] == [head, workers, f"{head} {workers}"]
        assert_clean(scratch, started)
    finally:
        end(process)


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "restarts", "requeued"),
    [(signal.SIGTERM, 0, False), (signal.SIGUSR1, 0, True), (signal.SIGUSR1, 1, False)],
)
def test_slurm_script_stops_the_job_when_the_time_is_up(
    scratch: Path, slurm: dict[str, str], number: signal.Signals, restarts: int, requeued: bool
) -> None:
    """#SBATCH --signal=B:USR1@120: the job is asked to stop, everything ends, and the job is queued
    again, but not more often than wanted.
    """
    slurm |= {"REQUEUES": "1", "SLURM_RESTART_COUNT": str(restarts)}
    log, stopped = scratch / "log", scratch / "stopped"
    code = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        f"    pathlib.Path({str(stopped)!r}).touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('working', flush=True)\n"
        "time.sleep(600)"
    )
    process = start(["bash", str(CLUSTER / "slurm.sbatch"), "python", "-c", code], slurm, log)
    try:
        wait_for_text(log, "\nworking", process)
        started = descendants(process.pid)
        process.send_signal(number)
        assert process.wait(120) == 128 + number, log.read_text()
        assert (scratch / "srun.log.requeued").exists() is requeued
        assert stopped.exists(), log.read_text()
        assert_clean(scratch, started)
    finally:
        end(process)
