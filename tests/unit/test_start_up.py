"""What an import costs: nothing heavy where it is not needed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "plotly", "pyarrow", "pandas", "scipy", "skimage", "torchvision", "webdataset")
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")  # over a second


def imported(code: str) -> set[str]:
    """The modules that are there after some code has run in a fresh interpreter."""
    said = "import sys; print('\\n'.join(sys.modules), file=sys.stderr)"
    code = f"import sys\ntry:\n {code}\nfinally:\n {said}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return set(done.stderr.split())


HELP = (
    "import runpy; sys.argv = ['run.py', '--help']; sys.path.insert(0, 'pipeline')\n"
    " try: runpy.run_path('pipeline/run.py', run_name='__main__')\n"
    " except SystemExit as end: assert not end.code"
)


@pytest.mark.parametrize(
    "code", ["import ncfm", "import pipeline.graph", "import pipeline.config", HELP]
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert not imported(code) & {*HEAVY, *COMPILER}


def test_planning_shards_does_without_torch() -> None:
    modules = imported("import pipeline.data.shards")
    assert not modules & {"torch", *HEAVY}
    assert "pipeline.data.shards" in modules
    assert "torch" in imported("import ncfm")  # negative control


def test_writing_shards_does_without_torch() -> None:
    write = """
 from pipeline.data.shards import ShardTask, _tar
 from pipeline.data.sources import Sample
 task = ShardTask("train", 3, 0, 0, (Sample("a", 3, b""),))
 assert b"0003-0000000.png" in _tar(task, {"a": b"pixels"}, "png")
 held = "torch" in sys.modules
 import torch, webdataset  # may be imported afterwards
 assert not held and torch.ones(1)
"""
    assert "webdataset" in imported(write)
