"""CONTRIBUTING.md's six extensions as a user's own package, in one run from source to stage."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
OPTIONS = {
    "source.kind": "mine.stripes",
    "model.name": "mine.Net",
    "distill.objective": "mine.Scaled",
    "frequencies.sampler": "mine.uniform",
    "evaluate.protocol": "mine.SHORT",
    "shard.image_size": "16",
    "distill.num_steps": "3",
    "distill.real_batch": "8",
    "pretrain.networks": "1",
    "pretrain.training.epochs": "1",
    "num_workers": "1",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's directory, and what the last stage said."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine").mkdir()
    (source,) = (block for block in BLOCKS if "def open_source" in block)
    (folder / "mine/stripes.py").write_text(source)
    (folder / "mine/__init__.py").write_text("\n".join(b for b in BLOCKS if b is not source))
    options = [word for key, value in OPTIONS.items() for word in (f"--{key}", value)]
    command = [sys.executable, "pipeline/run.py"]
    options += ["--storage_path", str(folder / "runs"), "--name", "mine"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    for stage in ("evaluate", "mine.Brightness"):
        done = subprocess.run(
            [*command, stage, *options], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs/mine", done.stdout


def test_there_is_a_block_for_each() -> None:
    assert len(BLOCKS) == 6


def test_the_source_and_the_network(finished: tuple[Path, str]) -> None:
    manifest = json.loads((finished[0] / "distilled/manifest.json").read_text())
    assert manifest["class_names"] == ["red", "green", "blue"]
    evaluation = json.loads((finished[0] / "evaluation.json").read_text())
    assert evaluation["rows"][0]["network"] == "mine.Net"


def test_the_objective_and_the_law(finished: tuple[Path, str]) -> None:
    lines = (finished[0] / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["stage"] == "distill"]
    assert "distill/scaled" in rows[-1]
    config = (finished[0] / "config.toml").read_text()
    assert 'sampler = "mine.uniform"' in config


def test_the_protocol(finished: tuple[Path, str]) -> None:
    evaluation = json.loads((finished[0] / "evaluation.json").read_text())
    assert evaluation["protocol"] == "mine.SHORT"
    assert [row["set"] for row in evaluation["rows"]] == ["distilled"]
    assert [(len(r["accuracy"]), r["epochs"]) for r in evaluation["rows"]] == [(2, 3)]


def test_the_stage(finished: tuple[Path, str]) -> None:
    assert re.search(r"^mean brightness 0\.\d\d\d$", finished[1], re.MULTILINE)
    stages = json.loads((finished[0] / "stages.json").read_text())
    assert not stages["brightness"]["reused"]
    assert stages["distill"]["reused"], "what it needs was there"
