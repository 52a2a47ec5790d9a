"""Connect to a Ray cluster, size a worker group, and run a loop on it with Ray Train.

The stages' loops see only `WorkerContext`: rank, world size and device. The same loop therefore
runs under Ray Train, under plain torch.distributed, and in a single process.
"""

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from upath import UPath

from pipeline.errors import UsageError
from pipeline.runtime.failures import guarded, raise_recorded, storage_error, worker_error

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    # Otherwise, under `uv run`, every worker would install and start in a copy of the project.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",  # no escape codes in a job's log
    "RAY_DEDUP_LOGS": "0",  # its "[repeated 2x across cluster]" is always green
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise every line of a worker is printed twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # On this machine's own cluster, let the next stage reuse processes that have imported PyTorch.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """One worker of world_size; the default is a single process."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def current_context(device: str = "cpu") -> WorkerContext:
    """The context of this process: that of its torch.distributed group, or a single process.

    `device` is decided by the run (`Workers.device`): a process may see GPUs of other workers.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own_device = torch.device(device)
    if own_device.type == "cuda":  # Ray Train has made the worker's own GPU the current one
        own_device = torch.device("cuda", torch.cuda.current_device())
    return WorkerContext(rank=rank, world_size=world_size, device=own_device)


@dataclass(frozen=True)
class Workers:
    """Size of a worker group, and the resources of each worker."""

    count: int
    use_gpu: bool
    cpus: float = 1.0  # of each worker

    @property
    def needs(self) -> dict[str, float]:
        """Total resources of the group, by Ray's names."""
        needs = {"CPU": self.count * self.cpus}
        return {"GPU": float(self.count), **needs} if self.use_gpu else needs

    @property
    def device(self) -> str:
        """The torch device type of the workers, decided here and passed down."""
        return "cuda" if self.use_gpu else "cpu"


def set_ray_environment() -> None:
    """Apply defaults for Ray's environment variables. Call before Ray is first imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


NOTICES = ("ray._private.authentication.authentication_token_setup",)
"""Ray loggers with warnings to suppress: they warn that a cluster has a token, as it should."""


def joins() -> bool:
    """Whether this run joins an existing cluster, which may grow, instead of starting one."""
    return "RAY_ADDRESS" in os.environ


def connect() -> None:
    """Join the cluster at RAY_ADDRESS (set in a submitted job), or start one on this machine."""
    set_ray_environment()
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.WARNING)  # keeps warnings of unschedulable work
    for name in NOTICES:
        logging.getLogger(name).setLevel(logging.ERROR)
    if joins():
        ray.init(logging_level=logging.WARNING)
    else:
        # Ray Train releases its workers' resources through the dashboard at this address: without
        # one, or beside another user's cluster, it cannot.
        port = _free_port()
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        # This node is never preempted, and Ray's watcher for it logs an error each time.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        ray.init(
            address="local",
            logging_level=logging.WARNING,
            object_store_memory=512 * 2**20,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
        )
    if threading.current_thread() is threading.main_thread():
        # Sent by `ray job stop`: by default Ray would print a stack trace and die.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def size_workers(
    num_workers: int | None,
    use_gpu: bool | None,
    num_items: int,
    *,
    threads: int = 1,
    grows: bool = False,
) -> Workers:
    """Size a worker group for num_items classes or networks, each of which can use `threads`
    threads: num_workers if given, else one worker per GPU, else one per CPU.

    If the cluster `grows`, its current size does not limit num_workers: Ray starts nodes for
    workers that do not fit. Otherwise raises UsageError if it has fewer GPUs than requested.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0.0)
    with_gpu = gpus > 0 if use_gpu is None else use_gpu
    if with_gpu and not grows and gpus < (num_workers or 1):
        raise UsageError(
            f"use_gpu true with {num_workers or 1} workers, but the cluster has {gpus} GPUs"
        )
    alive = gpus if with_gpu else int(cpus)
    most = num_items if with_gpu else num_items * threads
    count = max(1, min(num_workers or alive, most))
    return Workers(count, with_gpu, 1.0 if grows else min(1.0, cpus / count))


NOTICE_S = 30.0
"""Seconds between notices of the nodes that a stage waits for."""


def lacking(needs: Mapping[str, float], resources: Mapping[str, float]) -> str | None:
    """Message naming the needs that the resources do not cover; None if they do."""
    short = [name for name, need in needs.items() if resources.get(name, 0) < need - 1e-6]
    if not short:
        return None
    wanted = " and ".join(f"{needs[name]:g} {name}" for name in short)
    there = " and ".join(f"{resources.get(name, 0):g}" for name in short)
    return f"waiting for nodes: {wanted} wanted, {there} there"


class WaitingNotice:
    """Periodically reports the resources that a stage is waiting for, until it ends."""

    def __init__(
        self, needs: Mapping[str, float], say: Callable[[str], None], every: float = NOTICE_S
    ) -> None:
        self._ended = threading.Event()

        def watch() -> None:
            import ray

            while not self._ended.wait(every):
                if ray.is_initialized() and (text := lacking(needs, ray.cluster_resources())):
                    say(text)

        threading.Thread(target=watch, name="waiting", daemon=True).start()

    def end(self) -> None:
        """Stop reporting."""
        self._ended.set()


def ray_storage(storage: UPath) -> dict[str, Any]:
    """RunConfig options for the files of Ray Train and Ray Tune.

    Object stores are accessed through fsspec, as everywhere here: Ray's own access would need other
    packages and credentials.
    """
    if isinstance(storage, Path):
        return {"storage_path": str(storage)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem = PyFileSystem(FSSpecHandler(storage.fs))
    return {"storage_path": storage.path, "storage_filesystem": filesystem}


def fit(
    loop: Callable[[dict[str, Any]], None],
    arguments: Mapping[str, Any],
    workers: Workers,
    *,
    name: str,
    storage: UPath,
    max_failures: int,
    min_workers: int | None = None,
    timeout_s: float = 1800.0,
) -> None:
    """Run a loop on a group of Ray Train workers. A failed group is restarted up to max_failures
    times, with as few as min_workers workers if nodes are lost.

    `loop` must be in an importable module; it receives `arguments` and the workers' "device". Its
    results are the files it writes. Workers wait for each other for at most timeout_s. Raises
    WorkerError, for permanent errors without a restart.
    """
    from ray.train import (
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
    )
    from ray.train.torch import TorchConfig, TorchTrainer

    per_worker = {"CPU": workers.cpus}
    if workers.use_gpu:
        per_worker["GPU"] = 1
    # Ray Train V1's stubs do not allow a range.
    count: Any = workers.count
    if min_workers is not None:
        count = (min(min_workers, count), count)
    storage.mkdir(parents=True, exist_ok=True)
    failure = storage / f"{name}.failure.txt"
    failure.unlink(missing_ok=True)
    own = {"loop": loop, "failure": failure, "device": workers.device}
    trainer = TorchTrainer(
        guarded,
        train_loop_config={**arguments, **own},
        torch_config=TorchConfig(timeout_s=math.ceil(timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu=workers.use_gpu,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=name,
            **ray_storage(storage),
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        _in_thread(trainer.fit)
    except TrainingFailedError as error:
        raise_recorded(failure)
        raise storage_error(error) or worker_error(error) or error from error
    raise_recorded(failure)


def _in_thread(work: Callable[[], object]) -> None:
    """Run `work` in a separate thread: on the main thread Ray Train would handle Ctrl-C, and wait
    for busy workers. All of them end with this process.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="fit", daemon=True).start()
    done.result()
