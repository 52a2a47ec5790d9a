"""Independent jobs as Ray tasks: as many at a time as there are workers, whose cores they share."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pipeline.runtime.failures import storage_error, worker_error
from pipeline.runtime.workers import Workers

K = TypeVar("K")
J = TypeVar("J")

MOST_THREADS = 4
"""Of a network: batches of 128 are trained in four parts."""


def run_each(
    work: Callable[[J, int, str], Any], jobs: Mapping[K, J], workers: Workers, *, max_retries: int
) -> Iterator[tuple[K, Any]]:
    """(key, work(job, threads, device)) of each job, in the order in which they end.

    A worker that dies is replaced up to `max_retries` times a job. An exception of `work` ends all:
    raises StorageError if it is one, else WorkerError.
    """
    import ray
    from ray.exceptions import RayError

    remote = ray.remote(num_gpus=1 if workers.use_gpu else 0, max_retries=max_retries)(work)
    threads = [1] * len(jobs)
    if not workers.use_gpu:
        nodes = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]]
        largest = max(1, min(MOST_THREADS, int(max(nodes))))
        threads = thread_shares(len(jobs), workers.count, largest=largest)
    pending: dict[Any, tuple[K, int]] = {}
    todo, free = [*jobs], workers.count
    while todo or pending:
        while todo and threads[0] <= free:
            key, mine = todo.pop(0), threads.pop(0)
            task = remote.options(num_cpus=mine).remote(jobs[key], mine, workers.device)
            pending[task], free = (key, mine), free - mine
        (ready, *_), _ = ray.wait(list(pending))
        key, mine = pending.pop(ready)
        free += mine
        try:
            result = ray.get(ready)
        except RayError as error:
            raise storage_error(error) or worker_error(error) or error from error
        yield key, result


def thread_shares(jobs: int, cores: int, *, largest: int | None = None) -> list[int]:
    """Threads of each of some jobs, in their order, so that no core waits for the last of them:
    those that do not fill all cores come first and share them; then one a core. `largest`: the most
    that one can use.
    """
    odd = jobs % cores
    each = min(cores // odd, largest or cores) if odd else 1
    return [each] * odd + [1] * (jobs - odd)
