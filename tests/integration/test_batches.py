"""Batches by index: each a choice from the whole class, each epoch a permutation of all images."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from numbered import COUNTS, NumberedSource, everything, numbers, write_set

from ncfm.images import ImageSource, InMemoryImages
from ncfm.seeding import keyed_generator
from pipeline.data.batches import ClassBatches, StoredImages, warn_of_small_classes
from pipeline.data.shards import ShardConfig
from pipeline.data.store import Store

STEPS = range(0, 400, 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("numbered")
    return write_set(NumberedSource(), ShardConfig(image_size=4, shard_size=30), folder / "set")


def batches(store: Store, classes: Iterable[int] = (0, 1, 2), seed: int = 0) -> ClassBatches:
    return ClassBatches(store, classes, seed)


def test_batches_are_distinct_images_of_the_class(store: Store) -> None:
    source = batches(store)
    for step in STEPS:
        for label, count in enumerate(COUNTS["train"]):
            found = numbers(source.batch(label, step, 20), label)
            assert len(set(found)) == len(found) == min(20, count)


def test_a_batch_depends_on_seed_step_and_class_alone(store: Store, tmp_path: Path) -> None:
    source = batches(store)
    expected = {(c, step): source.batch(c, step, 16) for step in STEPS for c in (0, 1)}
    elsewhere = Store(store.shards, store.manifest, str(tmp_path))  # another node's store
    worker = batches(elsewhere, [1])  # another division of the classes
    for step in STEPS:
        assert torch.equal(worker.batch(1, step, 16), expected[1, step])
        assert torch.equal(worker.step(step, 16)[1], expected[1, step])
    for step in reversed(STEPS):  # another history, as after a resume
        assert torch.equal(source.batch(0, step, 16), expected[0, step])
    other = batches(store, seed=1)
    assert not any(torch.equal(other.batch(0, s, 16), expected[0, s]) for s in STEPS)
    assert not torch.equal(expected[0, 0], expected[0, 3])
    other_purpose = source.batch(0, 0, 16, purpose="init")
    assert not torch.equal(other_purpose, expected[0, 0])


def test_a_batch_is_the_keyed_choice_from_the_whole_class(store: Store) -> None:
    """Against the generator's own permutation of what the store holds."""
    for size in (1, 16, 1000):
        order = torch.randperm(100, generator=keyed_generator(7, "real_batch", 5, 0))[:size]
        expected = sorted(numbers(store.images("train", [0])[0][order]))
        assert sorted(numbers(batches(store, seed=7).batch(0, 5, size))) == expected


def test_batches_of_some_images_of_a_class(store: Store) -> None:
    source, other = batches(store), batches(store)
    allowed = torch.tensor([5, 7, 30, 31, 90])
    source.restrict(0, allowed)
    seen = set(numbers(store.images("train", [0])[0][allowed]))
    drawn = [numbers(source.batch(0, step, 3)) for step in STEPS]
    assert all(len(set(found)) == 3 for found in drawn)
    assert {number for found in drawn for number in found} == seen
    assert sorted(numbers(source.batch(0, 0, 100))) == sorted(seen)
    assert source.allowed(0).tolist() == allowed.tolist()
    assert len(source.allowed(1)) == len(source.images(1))
    assert torch.equal(source.batch(1, 0, 10), other.batch(1, 0, 10))  # another class


def deviation(draws: Counter[int], count: int) -> float:
    """How far the numbers of draws are from equal: chi-squared in standard deviations."""
    mean = draws.total() / count
    chi2 = sum((draws[number] - mean) ** 2 / mean for number in range(count))
    return (chi2 - (count - 1)) / math.sqrt(2 * (count - 1))


def test_all_images_of_a_class_are_drawn_equally_often(store: Store) -> None:
    source = batches(store)
    draws = Counter(n for step in range(800) for n in numbers(source.batch(0, step, 10)))
    assert deviation(draws, 100) < 4
    # The negative control: always the first images of the class, as in the released code.
    fixed = source.batch(0, 0, 24)
    draws = Counter(n for step in range(800) for n in numbers(fixed[torch.randperm(24)[:10]]))
    assert deviation(draws, 100) > 50


def test_a_class_without_images(store: Store) -> None:
    with pytest.raises(ValueError, match="class 1 has no images"):
        ClassBatches(store, [1], 0, split="val").batch(1, 0, 1)


def test_the_batches_of_a_step_are_gathered_when_they_are_asked_for(store: Store) -> None:
    source, gathered = batches(store, [2, 0]), []
    gather, source.batch = source.batch, lambda c, *rest: gathered.append(c) or gather(c, *rest)
    step = source.step(3, 8)
    assert (list(step), len(step), gathered) == ([2, 0], 2, [])
    assert torch.equal(step[0], gather(0, 3, 8))
    assert gathered == [0]


def test_small_classes_are_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_small_classes([100, 64, 7], 7, "abc")
    assert not caplog.records
    warn_of_small_classes([100, 64, 7], 20, "abc")
    (record,) = caplog.records
    assert "1 of 3 classes are smaller than a batch of 20" in record.message
    assert "the smallest, c, has 7" in record.message


# --- epochs ---------------------------------------------------------------------------------------


def pairs(source: ImageSource, generator: torch.Generator | None) -> list[tuple[int, int]]:
    found = []
    for images, labels in source.epoch(16, generator):
        assert labels.dtype == torch.int64
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
        found += zip(labels.tolist(), numbers(images), strict=True)
    return found


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_epoch_is_one_permutation_of_all_images(store: Store) -> None:
    source = StoredImages(store, "train")
    everyone = [(label, n) for label, count in enumerate(COUNTS["train"]) for n in range(count)]
    assert len(source) == len(everyone) == 171
    first, second, again = (pairs(source, seeded(seed)) for seed in (0, 1, 0))
    assert sorted(first) == sorted(second) == everyone
    assert first == again
    assert first != second
    sizes = [len(labels) for _, labels in source.epoch(16, seeded(0))]
    assert sizes == [16] * 10 + [11]
    # It is what the same images would give if they were in memory.
    in_memory = InMemoryImages(*everything(store, "train"))
    for generator in (None, 3):
        ours, theirs = (
            pairs(s, None if generator is None else seeded(generator)) for s in (source, in_memory)
        )
        assert ours == theirs


def test_some_classes_and_an_early_end(store: Store) -> None:
    source = StoredImages(store, "train", [2, 1])
    assert len(source) == 71
    assert {label for label, _ in pairs(source, seeded(0))} == {1, 2}
    for _ in range(3):
        next(iter(source.epoch(4, seeded(0))))
    assert [label for label, _ in pairs(source, None)] == [1] * 64 + [2] * 7
    assert len(StoredImages(store, "select")) == 0
