"""Real images from shards, under a budget of memory: batches of one class, and epochs over all.

A class that fits its share of the budget is decoded once and stays. Otherwise a window of it is in
memory, which moves on through the class as the steps go by.
"""

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, islice

import numpy as np
import torch
from torch import Tensor

from ncfm.images import InMemoryImages, to_device
from ncfm.seeding import keyed_generator
from pipeline.shard_reader import ShardError, ShardReader, ShardSet, decode_threads
from pipeline.sources import Split

__all__ = ["ClassStreams", "ShardError", "ShardSet", "StreamedImages", "pool_sizes"]

logger = logging.getLogger(__name__)

REAL_BATCH = "real_batch"
GPU_SHARE = 0.25  # of a GPU's free memory; the rest is the step's


def pool_sizes(counts: Sequence[int], budget: int) -> list[int]:
    """How many images of each class are held if all classes together may hold `budget`.

    Every class gets the same share; what small classes leave over goes to the larger ones.
    """
    sizes, left = [0] * len(counts), budget
    for rank, label in enumerate(sorted(range(len(counts)), key=lambda label: counts[label])):
        sizes[label] = min(counts[label], left // (len(counts) - rank))
        left -= sizes[label]
    return sizes


class ClassStreams:
    """Batches of real images of single classes, for a worker that has some of the classes.

    A batch depends on (seed, step, class, purpose) and the budget, not on which other classes the
    worker has or which steps it has seen. So the budget is one for ALL classes of the data set,
    however many workers divide them: a class's share follows from the manifest, and a worker with
    a fraction of the classes uses that fraction of the budget.

    A class larger than its share is rotated: its pool is a window of P images on the class's cyclic
    order (shards in an order that follows from the seed), and every `rotate_every` steps it moves
    on by `rotate_share` of P. So every image is in the pool for the same number of steps. The
    images of the next move are decoded meanwhile; they count in the budget.

    Where all pools fit a quarter of what is free on the GPU, they are in its memory, and a batch
    never crosses the bus. Elsewhere they are in the worker's.
    """

    def __init__(
        self,
        shards: ShardSet,
        classes: Iterable[int],
        memory_budget_bytes: int,
        seed: int,
        *,
        split: Split = "train",
        rotate_every: int = 16,
        rotate_share: float = 0.125,
        device: torch.device | str = "cpu",
    ) -> None:
        if rotate_every < 1:
            raise ValueError(f"rotate_every must be at least 1 step, got {rotate_every}")
        if not 0 < rotate_share <= 1:
            raise ValueError(f"rotate_share must be within (0, 1], got {rotate_share}")
        self._seed, self._rotate_every, self._threads = seed, rotate_every, decode_threads()
        self._told: set[int] = set()
        sizes = pool_sizes(shards.counts(split), memory_budget_bytes // shards.image_bytes)
        rooms = {c: sizes[c] for c in classes}
        place = _pools_device(sum(rooms.values()) * shards.image_bytes, torch.device(device))
        self._pools = {
            c: _ClassPool(
                _cyclic_order(shards, split, c, seed), room, rotate_share, self._threads, place
            )
            for c, room in rooms.items()
        }

    def batch(self, class_index: int, step: int, size: int, *, purpose: str = REAL_BATCH) -> Tensor:
        """(n, C, H, W) uint8: n = min(size, images of the class) of them, each at most once.

        The real batches of the steps come from the pool, and are where it is; a draw for any other
        purpose is from the whole class, read from the shards, whatever the budget. Raises
        ShardError, and ValueError if the class's share of the budget is smaller than a batch.
        """
        pool = self._pools[class_index]
        if not pool.order.count:
            raise ValueError(f"class {class_index} has no images in this split")
        self._tell_small_classes(size)
        size = min(size, pool.order.count)
        generator = keyed_generator(self._seed, purpose, step, class_index)
        if purpose != REAL_BATCH:
            places = torch.randperm(pool.order.count, generator=generator)[:size]
            return pool.order.read(places.tolist(), self._threads)
        if size > pool.size:
            raise ValueError(
                f"stream.memory_budget_mib gives class {class_index} room for {pool.size} of its "
                f"{pool.order.count} images, fewer than a batch of {size}; "
                f"about {size / max(pool.size, 1):.1f} times as much would do"
            )
        images = pool.at(step // self._rotate_every)
        chosen = torch.randperm(pool.size, generator=generator)[:size]
        return images[to_device(chosen, images.device)]

    def _tell_small_classes(self, size: int) -> None:
        """Say once which classes are smaller than a batch."""
        if size in self._told:
            return
        self._told.add(size)
        counts = {c: pool.order.count for c, pool in self._pools.items()}
        small = [c for c, count in counts.items() if count < size]
        if small:
            logger.warning(
                "%d of %d classes are smaller than a batch of %d images (the smallest, class %d, "
                "has %d): all their images are in every batch, each once",
                len(small),
                len(counts),
                size,
                min(small, key=counts.__getitem__),
                min(counts[c] for c in small),
            )


class _Order:
    """All images of a class in one fixed order; places count on beyond the end, cyclically."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self.readers = readers
        self._ends = list(accumulate(reader.count for reader in readers))
        self.count = self._ends[-1] if readers else 0

    def read(self, places: Sequence[int], threads: ThreadPoolExecutor | None = None) -> Tensor:
        """The images at some places, in their order; every shard is opened once."""
        rows: dict[int, tuple[list[int], list[int]]] = {}
        for row, place in enumerate(places):
            place %= self.count
            shard = bisect_right(self._ends, place)
            into, indices = rows.setdefault(shard, ([], []))
            into.append(row)
            indices.append(place - self._ends[shard] + self.readers[shard].count)
        images = torch.empty((len(places), *self.readers[0].shape), dtype=torch.uint8)
        for shard, (into, indices) in rows.items():
            self.readers[shard].read_into(images, into, indices, threads)
        return images


def _cyclic_order(shards: ShardSet, split: Split, class_index: int, seed: int) -> _Order:
    readers = shards.readers(split, [class_index])
    generator = keyed_generator(seed, "shard_order", class_index)
    return _Order([readers[k] for k in torch.randperm(len(readers), generator=generator).tolist()])


class _ClassPool:
    """The images of one class that are in memory: all, or a window that moves on."""

    def __init__(
        self,
        order: _Order,
        room: int,
        rotate_share: float,
        threads: ThreadPoolExecutor,
        device: torch.device,
    ) -> None:
        self.order, self._threads, self._device = order, threads, device
        resident = room >= order.count
        # Of the room of a rotating class a part is for the images of the next move.
        self.size = order.count if resident else int(room / (1 + rotate_share))
        self._advance = 0 if resident else max(1, min(int(self.size * rotate_share), self.size))
        self._rotation: int | None = None
        self._images = torch.empty(0)
        self._next: Future[Tensor] | None = None

    def at(self, rotation: int) -> Tensor:
        """The pool (P, C, H, W) after so many moves; place p of the order is at p mod P."""
        if not self._advance:
            rotation = 0
        if rotation == self._rotation:
            return self._images
        start = rotation * self._advance
        if self._next is not None and rotation - 1 == self._rotation:
            fresh = range(start - self._advance + self.size, start + self.size)
            places = to_device(_slots(fresh, self.size), self._device)
            self._images[places] = to_device(self._next.result(), self._device)
        else:  # the first step of a run, or a jump
            window = [start + (slot - start) % self.size for slot in range(self.size)]
            self._images = to_device(self.order.read(window, self._threads), self._device)
        self._rotation = rotation
        if self._advance:
            coming = range(start + self.size, start + self.size + self._advance)
            self._next = self._threads.submit(self.order.read, coming)
        return self._images


def _pools_device(size: int, device: torch.device) -> torch.device:
    """Where pools of so many bytes are."""
    if device.type == "cuda" and size <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


def _slots(places: range, size: int) -> Tensor:
    return torch.arange(places.start, places.stop) % size


class StreamedImages:
    """An `ncfm.images.ImageSource` over a split.

    Within the budget it is decoded once and kept. Beyond it, every epoch reads pieces of shards in
    random order through a shuffle buffer that fills the budget. Either way every image comes once
    an epoch; the order follows from the generator, and from the budget.
    """

    PIECE = 32  # images; small, for a buffer to hold many classes, since a shard holds but one
    AHEAD = 16  # pieces that are decoded ahead

    def __init__(
        self,
        shards: ShardSet,
        split: Split,
        memory_budget_bytes: int,
        *,
        classes: Iterable[int] | None = None,
    ) -> None:
        self._shards, self._split = shards, split
        self._classes = None if classes is None else tuple(classes)
        self._readers = shards.readers(split, self._classes)
        self._count = sum(reader.count for reader in self._readers)
        self._room = memory_budget_bytes // shards.image_bytes
        self._resident: InMemoryImages | None = None

    def __len__(self) -> int:
        return self._count

    def epoch(
        self, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (N, C, H, W) uint8 and labels (N,) int64; without a generator in order
        of the shards. Raises ShardError.
        """
        if self._room >= self._count:
            if self._resident is None:
                self._resident = self._shards.load(self._split, self._classes)
            return self._resident.epoch(batch_size, generator)
        pieces = [
            (reader, range(start, min(start + self.PIECE, reader.count)))
            for reader in self._readers
            for start in range(0, reader.count, self.PIECE)
        ]
        if generator is None:
            return _batches(self._decoded(pieces), batch_size, batch_size, None)
        order = torch.randperm(len(pieces), generator=generator).tolist()
        buffered = max(batch_size, self._room - (self.AHEAD + 1) * self.PIECE)
        return _batches(self._decoded([pieces[k] for k in order]), batch_size, buffered, generator)

    def _decoded(
        self, pieces: Sequence[tuple[ShardReader, range]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces in their order, decoded ahead in threads."""
        todo = iter(pieces)
        pending: deque[tuple[ShardReader, Future[Tensor]]] = deque()
        with decode_threads() as threads:
            try:
                while True:
                    for reader, part in islice(todo, self.AHEAD - len(pending)):
                        pending.append((reader, threads.submit(reader.read, part)))
                    if not pending:
                        return
                    reader, future = pending.popleft()
                    images = future.result()
                    yield images, torch.full((len(images),), reader.label)
            finally:  # an epoch may be left early
                for _, future in pending:
                    future.cancel()


def _batches(
    pieces: Iterable[tuple[Tensor, Tensor]],
    batch_size: int,
    buffered: int,
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from a buffer of at least `buffered` images while pieces come: drawn at random if a
    generator is given, else the oldest.
    """
    buffer = _Buffer(buffered + StreamedImages.PIECE)
    for images, labels in pieces:
        buffer.add(images, labels)
        while buffer.count >= buffered:
            yield buffer.take(batch_size, generator)
    while buffer.count:
        yield buffer.take(batch_size, generator)


class _Buffer:
    """Labelled images, drawn one batch at a time.

    NumPy moves them: torch would do it on all cores, which have the decoding to do.
    """

    def __init__(self, room: int) -> None:
        self._room, self.count = room, 0
        self._images = np.empty(0, np.uint8)
        self._labels = np.empty(0, np.int64)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Put images behind the others."""
        if not len(self._images):
            self._images = np.empty((self._room, *images.shape[1:]), np.uint8)
            self._labels = np.empty(self._room, np.int64)
        end = self.count + len(images)
        self._images[self.count : end] = images.numpy()
        self._labels[self.count : end] = labels.numpy()
        self.count = end

    def take(self, size: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Take some images out, random ones if a generator is given, else those added first."""
        size = min(size, self.count)
        left = self.count - size
        if generator is None:
            taken = np.arange(size)
            gaps, movers = np.arange(left), np.arange(size, self.count)
        else:
            taken = torch.randperm(self.count, generator=generator)[:size].numpy()
            free = np.zeros(self.count, bool)
            free[taken] = True
            gaps = free[:left].nonzero()[0]  # to be filled with what stays behind them
            movers = (~free[left:]).nonzero()[0] + left
        batch = torch.from_numpy(self._images[taken]), torch.from_numpy(self._labels[taken])
        for stored in (self._images, self._labels):
            stored[gaps] = stored[movers]
        self.count = left
        return batch
