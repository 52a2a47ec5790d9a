"""Worker failures: which ones to retry, and one-line error messages.

Ray Train restarts a failed worker group. That helps after a lost node, but not with an error in the
code or the configuration: `guarded` records such an error, restarted workers return at once, and
the driver raises it.
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
"""Errors that recur with the same code and input, unlike those of networks, devices and other
workers (OSError, RuntimeError, MemoryError).
"""


def one_line(error: BaseException) -> str:
    """Type and message of an error, in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def preempted() -> bool:
    """Whether a Ray Train worker's node is about to be reclaimed, as spot instances are, the same
    on all workers, which must call it equally often.
    """
    from ray.train import get_preemption_info

    return get_preemption_info() is not None


def guarded(arguments: dict[str, Any]) -> None:
    """Ray Train worker function: call `arguments["loop"]` with `preempted` and the other arguments;
    write a permanent error to the file `arguments["failure"]`.
    """
    loop: Callable[[dict[str, Any]], None] = arguments["loop"]
    failure: UPath = arguments["failure"]
    if failure.exists():
        return  # restarted after a permanent error: the driver raises it
    try:
        own = {k: v for k, v in arguments.items() if k not in ("loop", "failure")}
        loop({**own, "preempted": preempted})
    except PERMANENT as error:
        write_atomic(failure, f"{one_line(error)}\n{traceback.format_exc()}")
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise  # stops the other workers, which wait for this one
    # A single worker returns normally, so that Ray Train does not restart it.


def raise_recorded(failure: UPath) -> None:
    """Raise the error that `guarded` recorded, if any, as a WorkerError."""
    if failure.exists():
        line, _, details = failure.read_text(encoding="utf-8").partition("\n")
        raise WorkerError(f"a worker failed: {line}", details)


def worker_error(error: BaseException) -> WorkerError | None:
    """Convert Ray's exception about a worker or a task to a WorkerError; None for any other
    exception.
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
    """The original exception of the remote process."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def storage_error(error: BaseException) -> StorageError | None:
    """The StorageError inside an exception, unwrapped from Ray's exceptions of tasks and Train
    workers, whose messages are tracebacks. None if there is none.
    """
    waiting: list[Any] = [error]
    chain: list[BaseException] = []
    while waiting:
        each = waiting.pop()
        if isinstance(each, BaseException) and all(each is not other for other in chain):
            chain.append(each)
            waiting += [getattr(each, name, None) for name in ("cause", "_base_exc", "__cause__")]
            waiting += getattr(each, "worker_failures", {}).values()
    # The innermost: Ray's own task exception is a StorageError, too.
    return next((e for e in reversed(chain) if isinstance(e, StorageError)), None)
