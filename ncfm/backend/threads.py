"""Thread map whose result does not depend on the number of threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

Map = Callable[..., Iterable[Any]]


@contextmanager
def thread_map(threads: int) -> Iterator[Map]:
    """A `map` over the parts of a batch on so many threads, each operation on one core. Grad mode
    is per thread: the mapped function sets it.
    """
    if threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool.map
