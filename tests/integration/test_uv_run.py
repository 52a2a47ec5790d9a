"""Under `uv run` Ray would start every worker by `uv run` again, in a new environment."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from raylets import descendants

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv")
pytestmark = pytest.mark.skipif(UV is None, reason="uv is not installed")


def environment() -> dict[str, str]:
    """A user's: nothing of Ray's is set. uv takes the environment that these tests run in."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return inherited | {"UV_PROJECT_ENVIRONMENT": sys.prefix}


def below(pid: int) -> set[str]:
    """Command lines of all processes that come from this one."""
    lines = set()
    for child, _ in descendants(pid):
        if child == pid:
            continue
        try:
            raw = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        lines.add(raw.replace(b"\0", b" ").decode(errors="replace").strip())
    return lines


@pytest.mark.long
def test_no_worker_of_a_run_is_started_through_uv(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (32, 32)).save(folder / f"{number}.png")
    command = ["uv", "run", "--no-sync", "pipeline/run.py", "shard", "--source.kind", "folder"]
    paths = ["--source.path", str(tmp_path / "images"), "--storage_path", str(tmp_path / "runs")]
    with (tmp_path / "log").open("wb") as log:
        started = subprocess.Popen(
            [*command, *paths], cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )
        lines: set[str] = set()
        while started.poll() is None:
            lines |= below(started.pid)
            time.sleep(0.2)
    assert started.returncode == 0, (tmp_path / "log").read_text()
    assert any("default_worker.py" in line or "ray::" in line for line in lines), lines
    assert not [line for line in lines if "uv run" in line]


HOOK = """
import sys
sys.path[:0] = sys.argv[1:]
if sys.argv[1:]:
    import conftest
from ray._private.worker import _maybe_modify_runtime_env
print((_maybe_modify_runtime_env(None, False) or {}).get("py_executable"))
"""


@pytest.mark.parametrize(("folders", "executable"), [(["tests"], "None"), ([], "uv run")])
def test_the_tests_switch_the_hook_off(folders: list[str], executable: str) -> None:
    """Before they import Ray; a process that does not is the negative control."""
    command = ["uv", "run", "--no-sync", "python", "-c", HOOK, *folders]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert executable in done.stdout


@pytest.mark.skipif(not (ROOT / "uv.lock").exists(), reason="needs uv.lock, which `uv sync` makes")
def test_a_run_installs_what_running_needs() -> None:
    """`uv run pipeline/run.py` installs no tools; `--group dev` is the negative control."""
    tools = {"datasets", "import-linter", "matplotlib", "moto", "mypy", "pytest", "ruff"}

    def packages(*options: str) -> set[str]:
        command = ["uv", "export", "--frozen", "--no-hashes", "--no-header", "--no-annotate"]
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {line.partition("==")[0] for line in done.stdout.splitlines()}

    assert packages() & {"torch", "ray", *tools} == {"torch", "ray"}
    assert tools < packages("--group", "dev")
