"""A tiny run: every stage, small, in this process."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.cli import STAGES, parse_command
from pipeline.graph import Run, Stage

TINY = """
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
num_steps = 6
real_batch = 8
lr = 0.02
[frequencies]
sampler = "psi"
num_freqs = 64
num_components = 4
[evaluate]
repeats = 2
whole_epochs = 1
[evaluate.training]
epochs = 2
[runtime]
log_every = 2
max_failures = 0
"""


def run(tmp_path: Path, *arguments: str) -> tuple[Path, dict[str, dict[str, Any]]]:
    """All stages in this process; returns the run's directory and its stages.json."""
    preset = tmp_path / "tiny.toml"
    preset.write_text(TINY)
    run = Run(
        parse_command(
            ["--config", str(preset), "--storage_path", str(tmp_path / "runs"), *arguments]
        )
    )
    run.perform(STAGES)
    directory = Path(str(run.directory))
    return directory, json.loads((directory / "stages.json").read_text())


def copied(tiny: tuple[Path, Path], name: str) -> tuple[Path, Path]:
    """(folder, run directory) of a run that differs from a finished one in its name alone: what is
    distilled is reused, and a test may do with it what it likes.
    """
    folder, directory = tiny
    shutil.copytree(directory, directory.with_name(name))
    return folder, directory.with_name(name)


def stage(folder: Path, directory: Path, name: str, *arguments: str) -> Any:
    """One stage of a run; returns its manifest."""
    options = ["--config", str(folder / "tiny.toml"), "--storage_path", str(folder / "runs")]
    run = Run(parse_command([name, *options, "--name", directory.name, *arguments]))
    run.perform((name,))
    action = run.action(name)
    return action.manifest if isinstance(action, Stage) else None
