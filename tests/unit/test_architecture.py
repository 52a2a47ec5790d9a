"""The house: how long a file and a function may be, and what the process of a worker loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT) for name in ("ncfm", "pipeline") for path in (ROOT / name).rglob("*.py")
)
MOST_LINES, MOST_FUNCTION_LINES = 300, 60
# What a worker unpickles: the functions that Ray runs on it.
ON_WORKERS = (
    *("pipeline.data.shards", "pipeline.stages.pretrain", "pipeline.stages.distill_loop"),
    *("pipeline.stages.networks", "pipeline.stages.curate", "pipeline.stages.audit_pass"),
    "pipeline.stages.tuning.trial",
)
COMMAND_LINE = ("jsonargparse", "pipeline.cli", "pipeline.run", "pipeline.observe.reporting")


def test_there_are_files() -> None:
    assert len(FILES) > 80


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_and_no_function_is_too_long(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= MOST_LINES
    long = [
        f"{node.name} ({lines})"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_FUNCTION_LINES
    ]
    assert not long


def loaded(statement: str) -> set[str]:
    """The modules that are there after a statement in a fresh interpreter."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_workers_load_neither_the_command_line_nor_the_report() -> None:
    assert not loaded(f"import {', '.join(ON_WORKERS)}") & {*COMMAND_LINE}
    assert {"jsonargparse", "pipeline.cli"} <= loaded("import pipeline.run")  # negative control


def test_a_stage_is_found_from_its_name() -> None:
    from pipeline.cli import EXTRA_STAGES, STAGES
    from pipeline.graph import action_class

    for name in (*STAGES, *EXTRA_STAGES):
        found = action_class(name)
        assert found.name == name
        assert found.__module__ == f"pipeline.stages.{name.replace('-', '_')}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
