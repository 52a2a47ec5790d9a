"""What differs where storage_path is an object store: listings that may be old, files that are
written whole.
"""

import uuid
from typing import Any

import pytest
import torch
from fsspec import register_implementation
from upath import UPath

from pipeline.config import RunConfig
from pipeline.observe.progress import append_rows, read_rows
from pipeline.runtime.checkpoint import CheckpointWriter, newest_step
from pipeline.runtime.health import FATAL, fatal_error


def test_what_another_process_writes_is_seen(bucket: UPath) -> None:
    checkpoints = RunConfig(storage_path=str(bucket)).run_directory / "checkpoints"
    writer = CheckpointWriter(checkpoints)
    writer.save(0, {"step": torch.tensor(0)})
    writer.wait()
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000000"]
    assert fatal_error(checkpoints) is None
    other = type(bucket.fs)(skip_instance_cache=True)  # its cache is its own
    other.pipe_file(f"{checkpoints.path}/{FATAL}", b'{"error": "a loss is NaN"}')
    assert fatal_error(checkpoints) == "a loss is NaN"
    other.pipe_file(f"{checkpoints.path}/step-00000009/checkpoint.json", b"{}")
    assert newest_step(checkpoints) == (9, checkpoints / "step-00000009")


class WrittenWhole(type(UPath("memory://x").fs)):  # type: ignore[misc]
    """Like Google's: what is appended to a file replaces it."""

    protocol = "whole"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return super()._open(path, mode.replace("a", "w"), **options)


@pytest.mark.filterwarnings("ignore:UPath 'whole' filesystem")
@pytest.mark.parametrize("store", ["s3", "written whole"])
def test_rows_are_added(request: pytest.FixtureRequest, store: str) -> None:
    if store == "s3":
        path = request.getfixturevalue("bucket") / "metrics.jsonl"
    else:
        register_implementation("whole", WrittenWhole, clobber=True)
        path = UPath(f"whole://{uuid.uuid4().hex}/metrics.jsonl")
    rows = [{"step": step} for step in range(4)]
    append_rows(path, rows[:2])
    append_rows(path, rows[2:3])
    append_rows(path, rows[3:])
    assert read_rows(path) == rows
    append_rows(path, rows[:1], fresh=True)
    assert read_rows(path) == rows[:1]
