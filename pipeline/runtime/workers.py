"""Joining a Ray cluster, sizing a worker group on it, and the context that a worker's loop sees.

The loops of the stages know `WorkerContext` alone: rank, world size and device. The same loop
therefore runs under Ray Train, under plain torch.distributed, and in one process.
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
    # Or under `uv run` every worker would start in a copy of the project, installed anew.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",  # no escape codes in a job's log
    "RAY_DEDUP_LOGS": "0",  # its "[repeated 2x across cluster]" is always green
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line of a worker comes twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """One worker among world_size; the default is a worker alone."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def current_context(device: str = "cpu") -> WorkerContext:
    """The context of this process: of its torch.distributed group if it is in one, else a worker
    alone.

    `device` is the run's decision (`Workers.device`): a process may see GPUs that are not its own.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = torch.device(device)
    if found.type == "cuda":  # Ray Train has made the worker's own GPU the current one
        found = torch.device("cuda", torch.cuda.current_device())
    return WorkerContext(rank=rank, world_size=world_size, device=found)


@dataclass(frozen=True)
class Workers:
    """The size of a worker group, and what each of it takes."""

    count: int
    use_gpu: bool
    cpus: float = 1.0  # of each worker

    @property
    def needs(self) -> dict[str, float]:
        """The resources of all of them, as Ray calls them."""
        needs = {"CPU": self.count * self.cpus}
        return {"GPU": float(self.count), **needs} if self.use_gpu else needs

    @property
    def device(self) -> str:
        """Where its workers compute, as torch calls it: decided here, and handed down."""
        return "cuda" if self.use_gpu else "cpu"


def set_ray_environment() -> None:
    """Set what is not set of ENVIRONMENT: before Ray's first import, when it reads some of it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


NOTICES = ("ray._private.authentication.authentication_token_setup",)
"""Loggers of Ray that warn of what is as it should be: that a cluster has a token."""


def joins() -> bool:
    """Whether this run joins a cluster, to which nodes may still come, instead of starting one."""
    return "RAY_ADDRESS" in os.environ


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (as in a submitted job), or start one on this
    machine.
    """
    set_ray_environment()
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.WARNING)  # no notices, but what it cannot place
    for name in NOTICES:
        logging.getLogger(name).setLevel(logging.ERROR)
    if joins():
        ray.init(logging_level=logging.WARNING)
    else:
        # Ray Train frees the places of its workers through the dashboard, and finds it by this
        # address: without one, or beside the cluster of somebody else, it cannot.
        port = _free_port()
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        # Nobody takes this node away, and to watch for it Ray logs an error of its own each time.
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
        # What `ray job stop` sends: Ray would print a stack trace and die.
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
    """How many workers for num_items classes or networks, each of which so many threads can share:
    as asked, else one a GPU, else one a CPU.

    On a cluster that `grows` what is alive by now limits nothing that is asked for: Ray brings up
    nodes for workers that have no place yet. Raises UsageError if more GPUs are asked for than a
    cluster has that does not grow.
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
"""Seconds between two lines that say what a stage waits for."""


def lacking(needs: Mapping[str, float], resources: Mapping[str, float]) -> str | None:
    """What of the needs a cluster with these resources does not have, in words."""
    short = [name for name, need in needs.items() if resources.get(name, 0) < need - 1e-6]
    if not short:
        return None
    wanted = " and ".join(f"{needs[name]:g} {name}" for name in short)
    there = " and ".join(f"{resources.get(name, 0):g}" for name in short)
    return f"waiting for nodes: {wanted} wanted, {there} there"


class WaitingNotice:
    """Says every `every` seconds what of its needs a stage is still waiting for, until it ends."""

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
        """The stage has ended."""
        self._ended.set()


def ray_storage(storage: UPath) -> dict[str, Any]:
    """Where Ray Train and Ray Tune keep their own files, as options of their RunConfig.

    They reach an object store as everything here does: Ray's own way to it would look for other
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
    """Run a loop on a group of Ray Train workers; a failed group is started again up to
    max_failures times, with fewer workers, but at least min_workers, if nodes are gone.

    `loop` must live in an importable module; it gets `arguments` and the workers' "device". Its
    results are the files it writes. A worker waits for the others for at most timeout_s. Raises
    WorkerError: at once for errors that would only come again.
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
    # Ray Train V1's stubs know no range.
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
    """Work in a thread of its own, since on the main thread Ray Train takes Ctrl-C over, and then
    waits for workers that are busy. All of them end with this process.
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
