"""Checkpoints exist wholly or not at all."""

import json
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from upath import UPath

import pipeline.runtime.checkpoint
from pipeline.runtime.checkpoint import (
    CheckpointWriter,
    checkpoint_tensors,
    load_checkpoint,
    newest_step,
    newest_whole_step,
)
from pipeline.runtime.files import write_atomic


def state_of(step: int, *classes: int) -> dict[str, torch.Tensor]:
    images = {f"class/{c}/images": torch.full((2, 3), float(step + 100 * c)) for c in classes}
    return {"step": torch.tensor(step), **images}


def write(directory: Path | UPath, step: int, keep: int = 2) -> dict[str, torch.Tensor]:
    writer = CheckpointWriter(UPath(directory), keep=keep)
    writer.save(step, state_of(step, 0))
    writer.wait()
    return state_of(step, 0)


def step_in(directory: Path | UPath, **options: Any) -> int:
    state = load_checkpoint(UPath(directory), **options)
    return -1 if state is None else int(state["step"])


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    """A local disk, and an object store's interface."""
    return UPath(tmp_path) if request.param == "disk" else UPath(f"memory://{uuid.uuid4().hex}/run")


def test_the_newest_is_loaded_and_old_ones_go(directory: UPath) -> None:
    assert load_checkpoint(directory / "none") is None
    for step in (0, 5, 10, 15):
        state = write(directory, step)
    loaded = load_checkpoint(directory)
    assert loaded is not None
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    names = ["step-00000000", "step-00000010", "step-00000015"]  # that of step 0 stays
    assert sorted(path.name for path in directory.iterdir()) == names
    assert step_in(directory, at_most=14) == 10
    assert step_in(directory, at_most=9) == 0
    found = newest_step(directory)
    assert found is not None
    assert found[0] == 15


def test_truncated_at_any_byte_it_never_loads(
    directory: UPath, caplog: pytest.LogCaptureFixture
) -> None:
    write(directory, 5)
    write(directory, 10)
    part = next((directory / "step-00000010").glob("part-*.safetensors"))
    whole = part.read_bytes()
    for length in range(len(whole)):
        part.write_bytes(whole[:length])
        assert step_in(directory) == 5
    assert "damaged" in caplog.text
    assert "step-00000010" in caplog.text
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert step_in(directory) == 5
    part.write_bytes(whole)  # negative control: the whole one loads
    assert step_in(directory) == 10


def test_parts_without_an_index_are_no_checkpoint(directory: UPath) -> None:
    write(directory, 5)
    write(directory, 10)
    (directory / "step-00000010" / "checkpoint.json").unlink()
    assert step_in(directory) == 5
    next((directory / "step-00000005").glob("part-*.safetensors")).unlink()
    assert load_checkpoint(directory) is None


def workers(directory: UPath, count: int, attempt: str = "0", **options: Any) -> Any:
    return [
        CheckpointWriter(directory, rank=rank, writers=range(count), attempt=attempt, **options)
        for rank in range(count)
    ]


def test_it_exists_when_all_parts_do(directory: UPath) -> None:
    first, second = workers(directory, 2)
    first.save(5, state_of(5, 0, 2))
    assert first.busy
    assert load_checkpoint(directory) is None
    second.save(5, state_of(5, 1))
    first.wait()
    assert not first.busy
    state = load_checkpoint(directory)
    assert state is not None
    assert [float(state[f"class/{c}/images"][0, 0]) for c in range(3)] == [5, 105, 205]


def test_a_worker_reads_the_parts_of_its_classes(directory: UPath) -> None:
    first, second, third = workers(directory, 3)
    for writer, c in ((second, 1), (third, 2), (first, 0)):
        writer.save(5, state_of(5, c))
    first.wait()
    next((directory / "step-00000005").glob("part-0001-*.safetensors")).unlink()
    state = load_checkpoint(directory, classes=[2])
    assert state is not None
    assert {"step", "class/2/images"} <= state.keys()
    assert "class/1/images" not in state
    assert load_checkpoint(directory, classes=[1, 2]) is None


def test_only_the_classes_asked_for_are_read(directory: UPath) -> None:
    first, second = workers(directory, 2)
    second.save(5, state_of(5, 1))
    first.save(5, state_of(5, 0, 2))
    first.wait()
    state = load_checkpoint(directory, classes=[2])
    assert state is not None
    assert state.keys() == {"step", "class/2/images"}


@pytest.mark.parametrize(("cost", "wait"), [(0.1, 30), (30, 600)])
def test_what_takes_long_is_done_rarely(
    directory: UPath, monkeypatch: pytest.MonkeyPatch, cost: float, wait: float
) -> None:
    """At most a twentieth of the time, and at least half a minute apart."""
    clock = [0.0]
    monkeypatch.setattr(pipeline.runtime.checkpoint.time, "monotonic", lambda: clock[0])

    def slow(path: UPath, data: bytes | str) -> None:
        clock[0] += cost / 3  # of a part, its note, and the index
        write_atomic(path, data)

    monkeypatch.setattr(pipeline.runtime.checkpoint, "write_atomic", slow)
    writer = CheckpointWriter(directory, share=0.05)
    writer.save(5, state_of(5, 0))
    writer.wait()
    clock[0] = wait - 1
    assert not writer.due(30)
    clock[0] = wait + 1
    assert writer.due(30)


def test_the_tensors_of_a_whole_checkpoint(directory: UPath) -> None:
    """Part after part, without what a damaged newer one has."""
    assert newest_whole_step(directory) is None
    first, second = workers(directory, 2)
    for step in (5, 6):
        second.save(step, state_of(step, 1))
        first.save(step, state_of(step, 0, 2))
        first.wait()
    assert newest_whole_step(directory) == 6
    part = next((directory / "step-00000006").glob("part-0001-*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert newest_whole_step(directory) == 5
    part.unlink()
    assert newest_whole_step(directory) == 5
    read = dict(checkpoint_tensors(directory, 5))
    loaded = load_checkpoint(directory, at_most=5)
    assert loaded is not None
    assert read.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in read.items())


def test_nothing_is_taken_for_the_work_of_a_dead_group(directory: UPath) -> None:
    """The other worker of an earlier attempt has left its part of the same step."""
    _, dead = workers(directory, 2, attempt="before")
    dead.save(5, state_of(5, 1))
    dead.wait()
    first, second = workers(directory, 2, attempt="now", timeout_s=0.3)
    first.save(5, state_of(5, 0))
    first.wait()  # gives it up
    assert load_checkpoint(directory) is None
    second.save(6, state_of(6, 1))
    first.save(6, state_of(6, 0))
    first.wait()
    assert step_in(directory) == 6
    assert [path.name for path in directory.iterdir()] == ["step-00000006"]  # the rest is gone


def test_parts_written_ahead_of_a_commit_stay(directory: UPath) -> None:
    """The others do not wait for rank 0, which may still be busy with the checkpoint before."""
    first, second = workers(directory, 2)
    for step in (5, 10):
        second.save(step, state_of(step, 1))
    second.wait()
    for step in (5, 10):
        first.save(step, state_of(step, 0))
        first.wait()
        assert step_in(directory) == step


def test_members_who_only_share_classes_write_nothing(directory: UPath) -> None:
    writer = CheckpointWriter(directory, rank=1, writers=[0, 2])
    writer.save(5, state_of(5, 0))
    assert not writer.busy
    assert not directory.exists() or not list(directory.iterdir())


def test_the_loop_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write_atomic = threading.Event(), pipeline.runtime.checkpoint.write_atomic

    def slowly(path: Any, data: Any) -> None:
        assert gate.wait(30)
        write_atomic(path, data)

    monkeypatch.setattr(pipeline.runtime.checkpoint, "write_atomic", slowly)
    writer = CheckpointWriter(UPath(tmp_path))
    writer.save(5, state_of(5, 0))  # returns although nothing can be written
    assert writer.busy
    gate.set()
    writer.wait()
    assert step_in(tmp_path) == 5


def test_an_error_while_writing_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, data: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(pipeline.runtime.checkpoint, "write_atomic", full)
    writer = CheckpointWriter(UPath(tmp_path))
    writer.save(5, state_of(5, 0))
    with pytest.raises(OSError, match="no space"):
        writer.wait()


def test_the_index_is_json(tmp_path: Path) -> None:
    write(tmp_path, 5)
    index = json.loads((tmp_path / "step-00000005" / "checkpoint.json").read_text())
    assert index["step"] == 5
    assert [note["classes"] for note in index["parts"].values()] == [[0]]
