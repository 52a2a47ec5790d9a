"""Parts of a batch on several threads: the same numbers on however many."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

Map = Callable[..., Iterable[Any]]


@contextmanager
def mapped(threads: int) -> Iterator[Map]:
    """What maps a function over parts, as `map` does, on so many threads, an operation in each of
    which uses one core. Grad mode is a thread's own: the function sets it.
    """
    if threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool.map
