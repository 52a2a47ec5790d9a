"""Randomness keyed by meaning.

Every random draw of this project comes from a generator that is a function of the run's seed and of
what the draw is for (purpose, step, class). No draw depends on rank, worker count, timing, or how
many draws were made elsewhere:
that is what makes a run the same on any number of workers and exactly resumable.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def keyed_seed(seed: int, *keys: str | int) -> int:
    """A 63-bit seed from the run's seed and the draw's keys, stable across platforms and Python
    versions.
    """
    text = "\x1f".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(
    seed: int, *keys: str | int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator for one purpose, e.g. `keyed_generator(seed, "real_batch", step,
    class_index)`.
    """
    return torch.Generator(device=device).manual_seed(keyed_seed(seed, *keys))


@contextmanager
def global_generator(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """What draws from the device's global generator, as layers do, draws from this seed; after it
    the generator is as it was.
    """
    device = torch.device(device)
    if device.type != "cuda":
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the accelerators too, which are not forked here.
            torch.default_generator.manual_seed(seed)
            yield
        return
    with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
        torch.cuda.manual_seed(seed)
        yield
