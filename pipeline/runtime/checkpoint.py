"""Atomic sharded checkpoints, written in the background.

Every worker writes its own part, then a note with the part's SHA-256 and classes. When all notes
exist, rank 0 writes the index that makes them a checkpoint. Workers coordinate only through the
storage, so the step loop never waits. Parts are keyed by class, so a checkpoint can be read by any
number of workers. The checkpoint of step 0, the initial images, is never removed.
"""

import hashlib
import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from safetensors.torch import save
from torch import Tensor
from upath import UPath

from ncfm.tensor_files import file_sha256, read_tensors
from pipeline.runtime.files import read_json, write_atomic

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]

POLL_S = 0.2


class CheckpointWriter:
    """Checkpoint writer of one worker; every worker of a run has one.

    Args:
        rank: this worker's rank.
        writers: the ranks that write parts, including rank 0; `save` is a no-op on the others.
        attempt: suffix of the parts' names, the same for all workers and new at every start, so
            that parts of a failed attempt are never mixed in.
        keep: checkpoints kept besides that of step 0.
        share: largest part of the time that checkpoints take; where they take long, they are rarer.
        timeout_s: how long rank 0 waits for the other parts before it abandons a checkpoint.
    """

    def __init__(
        self,
        directory: UPath,
        *,
        rank: int = 0,
        writers: Sequence[int] = (0,),
        attempt: str = "0",
        keep: int = 2,
        share: float = 0.05,
        timeout_s: float = 600.0,
    ) -> None:
        self.directory, self.rank, self.writers, self.keep = directory, rank, writers, keep
        self._attempt, self._timeout = attempt, timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._share, self._cost_s, self._last = share, 0.0, time.monotonic()

    def due(self, every_s: float) -> bool:
        """Whether it is time for the next checkpoint, at most one in every_s seconds."""
        return time.monotonic() - self._last >= max(every_s, self._cost_s / self._share)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written; on rank 0, until it is complete. Re-raises write
        errors.
        """
        if self._pending is not None and self._pending.done():
            self.wait()
        return self._pending is not None

    def wait(self) -> None:
        """Wait for the checkpoint being written. Re-raises write errors."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def save(self, step: int, state: State, *, began: float | None = None) -> None:
        """Start writing `directory/step-<step>/`. The state must not change afterwards; `began`:
        when (time.monotonic) it began to be collected, which is part of the cost.
        """
        self.wait()
        self._last = time.monotonic()
        if self.rank in self.writers:
            began = self._last if began is None else began
            self._pending = self._thread.submit(self._write, step, dict(state), began)

    def _part(self, rank: int) -> str:
        place = self.writers.index(rank)
        return f"part-{place:04d}-of-{len(self.writers):04d}-{self._attempt}.safetensors"

    def _write(self, step: int, state: dict[str, Tensor], began: float) -> None:
        target = self.directory / f"step-{step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        data = save(state)
        classes = sorted({int(k.split("/")[1]) for k in state if k.startswith("class/")})
        note = {"sha256": hashlib.sha256(data).hexdigest(), "classes": classes}
        part = self._part(self.rank)
        write_atomic(target / part, data)
        write_atomic(target / f"{part}.json", json.dumps(note))
        if self.rank == 0:
            self._commit(target, step)
        self._cost_s = time.monotonic() - began

    def _commit(self, target: UPath, step: int) -> None:
        parts: dict[str, Any] = dict.fromkeys(self._part(rank) for rank in self.writers)
        deadline = time.monotonic() + self._timeout
        while missing := [part for part, note in parts.items() if note is None]:
            parts |= {part: read_json(target / f"{part}.json") for part in missing}
            if None not in parts.values():
                break
            if time.monotonic() > deadline:
                logger.warning("checkpoint %s abandoned: no %s", target, ", ".join(missing))
                return
            time.sleep(POLL_S)
        write_atomic(
            target / "checkpoint.json", json.dumps({"step": step, "parts": parts}, indent=1)
        )
        # An incomplete checkpoint older than this one is left over from a failed attempt, since
        # every worker writes its parts in order. A newer one may still be in progress.
        known = [(path, (path / "checkpoint.json").exists()) for path in _steps(self.directory)]
        whole = [path for path, is_whole in known if is_whole and _step_of(path) > 0]
        for path, is_whole in known:
            if path in whole[self.keep :] or (not is_whole and _step_of(path) < step):
                remove(path)


def load_checkpoint(
    directory: UPath,
    *,
    classes: Collection[int] | None = None,
    at_most: int | None = None,
) -> dict[str, Tensor] | None:
    """The merged state of the newest complete checkpoint; None if there is none.

    A checkpoint with a missing, truncated or altered part is skipped with a warning.

    Args:
        directory: contains step-<step>/ directories.
        classes: classes to load, beside psi and the step; parts without any of them are not read.
            None: all.
        at_most: newer steps are skipped.
    """
    for path in _steps(directory):
        if at_most is not None and _step_of(path) > at_most:
            continue
        index = read_json(path / "checkpoint.json")
        if index is None:
            continue  # incomplete: interrupted while it was written
        state: dict[str, Tensor] = {}
        for number, (part, note) in enumerate(index["parts"].items()):
            if number and classes is not None and not set(classes) & set(note["classes"]):
                continue
            if not _is_whole(path / part, note):
                logger.warning(
                    "checkpoint %s is damaged (%s); going back to the one before it", path, part
                )
                break
            own = read_tensors(path / part).items()
            state.update({k: value.clone() for k, value in own if _is_of(k, classes)})
        else:
            return state
    return None


def newest_whole_step(directory: UPath, *, at_most: int | None = None) -> int | None:
    """Step of the newest complete, undamaged checkpoint."""
    for path in _steps(directory):
        if at_most is not None and _step_of(path) > at_most:
            continue
        index = read_json(path / "checkpoint.json")
        if index is None:
            continue
        if all(_is_whole(path / part, note) for part, note in index["parts"].items()):
            return _step_of(path)
        logger.warning("checkpoint %s is damaged; going back to the one before it", path)
    return None


def _is_whole(part: UPath, note: Mapping[str, Any]) -> bool:
    return part.exists() and file_sha256(part) == note["sha256"]


def checkpoint_tensors(directory: UPath, step: int) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a complete checkpoint, by part; memory maps if its files are local."""
    path = directory / f"step-{step:08d}"
    for part in read_json(path / "checkpoint.json")["parts"]:
        yield from read_tensors(path / part).items()


def newest_step(directory: UPath) -> tuple[int, UPath] | None:
    """Step and directory of the newest checkpoint, without reading its parts."""
    for path in _steps(directory):
        if (path / "checkpoint.json").exists():
            return _step_of(path), path
    return None


def _is_of(key: str, classes: Collection[int] | None) -> bool:
    """Whether a tensor is of one of the classes, or of none."""
    return classes is None or not key.startswith("class/") or int(key.split("/")[1]) in classes


def _step_of(path: UPath) -> int:
    return int(path.name.removeprefix("step-"))


def _steps(directory: UPath) -> list[UPath]:
    """The checkpoint directories, newest first."""
    if not directory.exists():
        return []
    return sorted(directory.glob("step-*"), key=lambda path: path.name, reverse=True)


def remove(path: UPath) -> None:
    """Remove a checkpoint, its index first, so that a partly removed one does not count."""
    files = sorted(path.iterdir(), key=lambda file: file.name != "checkpoint.json")
    for file in files:
        file.unlink()
    if path.exists():  # in an object store, a directory disappears with its last file
        path.rmdir()
