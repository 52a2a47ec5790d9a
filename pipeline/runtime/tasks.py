"""Run independent jobs as Ray tasks, as many at a time as there are workers."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pipeline.runtime.failures import storage_error, worker_error
from pipeline.runtime.workers import Workers

K = TypeVar("K")
J = TypeVar("J")

MOST_THREADS = 4
"""Maximum threads per network: batches of 128 are trained in four parts."""


def run_each(
    work: Callable[[J, int, str], Any], jobs: Mapping[K, J], workers: Workers, *, max_retries: int
) -> Iterator[tuple[K, Any]]:
    """Yield (key, work(job, threads, device)) of each job as it finishes.

    A worker that dies is replaced up to `max_retries` times per job. An exception of `work` ends
    the run: raises StorageError if it is one, else WorkerError.
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
            key, count = todo.pop(0), threads.pop(0)
            task = remote.options(num_cpus=count).remote(jobs[key], count, workers.device)
            pending[task], free = (key, count), free - count
        (ready, *_), _ = ray.wait(list(pending))
        key, count = pending.pop(ready)
        free += count
        try:
            result = ray.get(ready)
        except RayError as error:
            raise storage_error(error) or worker_error(error) or error from error
        yield key, result


def thread_shares(jobs: int, cores: int, *, largest: int | None = None) -> list[int]:
    """Threads per job, in order, so that no core idles at the end: the jobs that do not fill all
    cores come first and share them; the rest run one per core. `largest`: maximum threads per job.
    """
    odd = jobs % cores
    each = min(cores // odd, largest or cores) if odd else 1
    return [each] * odd + [1] * (jobs - odd)
