"""Stages: what is written is whole, and a manifest vouches only for what it was written for."""

import os
import stat
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from pipeline.graph import run_stage
from pipeline.runtime.files import Manifest, write_atomic


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    """A local disk, and an object store's interface."""
    return UPath(tmp_path) if request.param == "disk" else UPath(f"memory://{uuid.uuid4().hex}/run")


def build(directory: UPath, content: str, fail: bool = False) -> Manifest:
    (directory / "data").write_text(content)
    if fail:
        raise KeyboardInterrupt
    return {"content": content}


def run(directory: UPath, identity: str, fail: bool = False) -> Manifest:
    return run_stage("some", directory, identity, lambda: build(directory, identity, fail))


def test_a_manifest_does_not_vouch_for_what_an_interrupted_build_wrote(directory: UPath) -> None:
    assert not run(directory, "A")["reused"]
    assert run(directory, "A")["reused"]  # negative control
    with pytest.raises(KeyboardInterrupt):
        run(directory, "B", fail=True)
    assert (directory / "data").read_text() == "B"
    assert not run(directory, "A")["reused"]
    assert (directory / "data").read_text() == "A"


def test_processes_of_the_same_number_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """In containers that share a directory, every driver may be process 1. Here: threads."""
    path, errors = tmp_path / "file", list[BaseException]()
    contents = [bytes([number]) * (100_000 + number) for number in range(4)]

    def write(content: bytes) -> None:
        try:
            for _ in range(20):
                write_atomic(path, content)
                assert path.read_bytes() in contents
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_bytes_reach_the_disk_before_the_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine that loses power can come back with the new name and no bytes."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("sync directory" if is_directory else "sync file")
        fsync(descriptor)

    def record_replace(source: Any, target: Any, **options: Any) -> None:
        events.append("replace")
        replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomic(tmp_path / "file", b"content")
    assert events == ["sync file", "replace", "sync directory"]
