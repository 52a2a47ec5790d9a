"""Starting real Ray processes in a test, and ending exactly these, by PID."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

Process = subprocess.Popen[bytes]


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for first in range(21000, 32000, 100):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.create_server(("", port)))
        except OSError:
            continue
        else:
            return first
        finally:
            for opened in sockets:
                opened.close()
    raise RuntimeError("no free ports")


Birth = tuple[int, str]  # PID and start time: a PID alone may be somebody else's by now


def living() -> dict[Birth, int]:
    """All living processes and their parents' PIDs."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                table[int(entry.name), fields[19]] = int(fields[1])
    return table


def descendants(pid: int) -> set[Birth]:
    """The processes below a process, itself included."""
    table = living()
    found = {birth for birth in table if birth[0] == pid}
    while more := {b for b, parent in table.items() if parent in {pid for pid, _ in found}} - found:
        found |= more
    return found


def wait_until_gone(processes: set[Birth], seconds: float = 20) -> set[Birth]:
    """Those that still live after a while."""
    deadline = time.monotonic() + seconds
    while (left := processes & living().keys()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory with a short path: Ray's sockets live below it."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as directory:
        yield Path(directory)


def ray_environment(scratch: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(scratch),
        "RAY_TMPDIR": str(scratch),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_PORT": str(free_ports(6)),
        "OBJECT_STORE_MEMORY": "100000000",
        "CUDA_VISIBLE_DEVICES": "",
    }


def start(command: list[str], environment: Mapping[str, str], log: Path) -> Process:
    # A shell started with SIGINT ignored (pytest in the background) could not trap it.
    return subprocess.Popen(
        ["env", "--default-signal=INT", *command],
        env=dict(environment),
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for_text(log: Path, text: str, process: Process, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def end(process: Process) -> None:
    """For the end of a test that failed: the script first, then whatever it left."""
    started = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
    for pid, _ in wait_until_gone(started, seconds=5):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
