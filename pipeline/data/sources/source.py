"""Interface and common base of image sources: samples, splits, and rejected samples."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

from PIL import Image

from pipeline.errors import SourceError

Split = Literal["train", "val", "select"]
SPLITS: tuple[Split, ...] = ("train", "val", "select")
"""`train`: training; `val`: evaluation of the result; `select`: held out of train, for tuning."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a source: small and picklable."""

    key: str  # unique in the source; unchanged when the source grows or moves
    label: int
    uri: str  # absolute if it is a path: it is read in another process
    where: tuple[int, ...] = ()  # position within the file, in the source's own terms
    data: bytes = b""  # the pixels, for sources whose files only the driver can read


class Rejected(NamedTuple):
    """A sample or class that is left out; it is listed in the manifest's quarantine."""

    key: str
    reason: str


class Source(Protocol):
    """Labelled images in splits."""

    class_names: tuple[str, ...]
    rejected: tuple[Rejected, ...]

    def samples(self, split: Split) -> list[Sample]:
        """All samples of a split, in a fixed order."""
        ...

    def fingerprint(self) -> str:
        """Hex digits that change when a sample is added, removed or changed."""
        ...

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        """Read a sample as an image of mode RGB or L; an exception means that it is unreadable, a
        StorageError that the storage failed.

        Runs in Ray tasks. Static, so that the source and its long lists stay in the driver.
        """
        ...


@dataclass(frozen=True)
class Found:
    """Contents of a source, before splits are held out."""

    class_names: Sequence[str]
    train: Sequence[Sample]
    val: Sequence[Sample] | None  # None: no val split
    versions: Iterable[object]  # JSON values that change with the samples
    rejected: Sequence[Rejected] = ()
    titles: Mapping[str, str] = field(default_factory=dict)  # class name -> readable name


class SampleList:
    """Base class of sources: a subclass needs only a `Found` and a `read`.

    Part of each training class becomes val if there is no val split, and another part becomes
    select. Classes without a train image and duplicate keys are rejected.
    """

    def __init__(
        self, found: Found, *, val_fraction: float, selection_fraction: float = 0.0
    ) -> None:
        self._rejected = list(found.rejected)
        filled = sorted({sample.label for sample in found.train})
        labels = {label: number for number, label in enumerate(filled)}
        for label, name in enumerate(found.class_names):
            if label not in labels:
                self._rejected.append(Rejected(name, "a class without a train image"))
        train = self._clean(found.train, labels, found.class_names)
        if found.val is None:
            val, train = _divide(train, val_fraction)
        else:
            val = self._clean(found.val, labels, found.class_names)
        select: list[Sample] = []
        if selection_fraction:
            select, train = _divide(train, selection_fraction, salt="select/")
        self._samples: dict[Split, list[Sample]] = {"train": train, "val": val, "select": select}
        names = tuple(found.class_names[label] for label in filled)
        titles = tuple(found.titles.get(name, name) for name in names)
        self.class_names = titles if len({*titles}) == len(titles) else names
        self.rejected = tuple(self._rejected)
        # Of the names, not the titles: results from before a title was known stay valid.
        content = hashlib.sha256()
        division = [names, found.val is None and val_fraction]
        for part in (division + [selection_fraction] * bool(selection_fraction), *found.versions):
            content.update(json.dumps(part).encode())
        self._fingerprint = content.hexdigest()[:16]

    def _clean(
        self, samples: Sequence[Sample], labels: Mapping[int, int], names: Sequence[str]
    ) -> list[Sample]:
        """Samples with their final labels, without rejected ones."""
        kept, keys = [], set()
        for sample in samples:
            if sample.label not in labels:
                reason = f"its class {names[sample.label]!r} has no train image"
            elif sample.key in keys:
                reason = "another image has the same key"
            else:
                keys.add(sample.key)
                label = labels[sample.label]
                kept.append(sample if label == sample.label else replace(sample, label=label))
                continue
            self._rejected.append(Rejected(sample.key, reason))
        return kept

    def refuse_no_train(self, place: str, what: str) -> None:
        """Raise SourceError, with reasons, if there is no train image."""
        if not self._samples["train"]:
            reasons = "".join(f"; {key}: {reason}" for key, reason in self.rejected[:2])
            raise SourceError(f"{place} has no {what} for train{reasons}")

    def samples(self, split: Split) -> list[Sample]:
        """The samples of a split, in the order of the source."""
        return list(self._samples[split])

    def fingerprint(self) -> str:
        """Hash of the classes, the held-out fractions, and the samples' versions."""
        return self._fingerprint


def _divide(
    samples: Sequence[Sample], fraction: float, salt: str = ""
) -> tuple[list[Sample], list[Sample]]:
    """(held out, rest), by class."""
    keys: dict[int, list[str]] = {}
    for sample in samples:
        keys.setdefault(sample.label, []).append(sample.key)
    chosen = set().union(*(held_out(group, fraction, salt) for group in keys.values()))
    return (
        [sample for sample in samples if sample.key in chosen],
        [sample for sample in samples if sample.key not in chosen],
    )


def held_out(keys: Iterable[str], fraction: float, salt: str = "") -> set[str]:
    """The held-out keys of one class: those whose hash is below `fraction`.

    A key's split does not depend on the other keys, so it is stable when the class grows. Only if a
    part would be empty, it gets the key of the lowest (highest) hash; a single key is not held out.
    """
    hashes = {key: key_hash(salt + key) for key in keys}
    ordered = sorted(hashes, key=lambda key: (hashes[key], key))
    below = sum(value < fraction for value in hashes.values())
    return set(ordered[: min(max(below, 1), len(ordered) - 1)])


def key_hash(key: str) -> float:
    """Hash of a key to a uniform number in [0, 1)."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
