"""Failures of workers: which are worth another try, and one line about each.

Ray Train starts a failed group of workers again. That helps after a lost node, but an error in the
code or the configuration would only come again: `guarded` writes it down, workers that are started
again end at once, and the driver raises it.
"""

import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from upath import UPath

from pipeline.errors import ShardError, StorageError, StoreError, WorkerError
from pipeline.runtime.files import write_atomic

PERMANENT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    ShardError,
    StoreError,
    TypeError,
    ValueError,
)
"""Errors that come again when the same code gets the same input: not those of networks, devices and
other workers (OSError, RuntimeError, MemoryError).
"""


def one_line(error: BaseException) -> str:
    """Type and message of an error."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def guarded(arguments: dict[str, Any]) -> None:
    """Run `arguments["loop"]` on the others as a worker of Ray Train; write a permanent error to
    the file `arguments["failure"]`.
    """
    loop: Callable[[dict[str, Any]], None] = arguments["loop"]
    failure: UPath = arguments["failure"]
    if failure.exists():
        return  # started again after an error that would only come again: the driver raises it
    try:
        loop({k: v for k, v in arguments.items() if k not in ("loop", "failure")})
    except PERMANENT as error:
        write_atomic(failure, f"{one_line(error)}\n{traceback.format_exc()}")
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise  # the others wait for this one: they have to be stopped
    # A worker alone ends as if all were well: it is not started again.


def raise_recorded(failure: UPath) -> None:
    """Raise what `guarded` wrote down as a WorkerError, if it did."""
    if failure.exists():
        line, _, details = failure.read_text(encoding="utf-8").partition("\n")
        raise WorkerError(f"a worker failed: {line}", details)


def worker_error(error: BaseException) -> WorkerError | None:
    """The WorkerError that says what Ray's exception about a worker or a task does; None for any
    other exception.
    """
    from ray.exceptions import RayTaskError
    from ray.train import TrainingFailedError, WorkerGroupError

    details = "".join(traceback.format_exception(error))
    if isinstance(error, WorkerGroupError):
        rank, cause = min(error.worker_failures.items())
        return WorkerError(f"worker {rank} failed: {one_line(_cause(cause))}", details)
    if isinstance(error, TrainingFailedError):
        cause = getattr(error, "controller_failure", error)
        return WorkerError(f"Ray Train failed: {one_line(cause)}", details)
    if isinstance(error, RayTaskError):
        return WorkerError(f"a task failed: {one_line(_cause(error))}", details)
    return None


def _cause(error: BaseException) -> BaseException:
    """The exception that was raised in the other process."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def storage_error(error: BaseException) -> StorageError | None:
    """The StorageError in an exception, also as Ray wraps that of a task or of a Train worker; its
    message is one line, theirs a traceback. None if there is none.
    """
    waiting: list[Any] = [error]
    seen: list[BaseException] = []
    while waiting:
        found = waiting.pop()
        if isinstance(found, BaseException) and all(found is not other for other in seen):
            seen.append(found)
            waiting += [getattr(found, name, None) for name in ("cause", "_base_exc", "__cause__")]
            waiting += getattr(found, "worker_failures", {}).values()
    # The innermost: Ray's own exception of a task is a StorageError, too.
    return next((each for each in reversed(seen) if isinstance(each, StorageError)), None)
