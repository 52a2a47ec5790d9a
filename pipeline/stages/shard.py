"""Stage shard: write a source's images, resized, as per-class WebDataset shards with a manifest.

The driver assigns samples to shards before anything is read; Ray Data then writes the shards in
parallel. Names and bytes depend only on the source and the configuration, so existing shards are
kept.
"""

import json
import logging
import pickle
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from upath import UPath

from pipeline.data.local import store_root
from pipeline.data.shards import Record, ShardConfig, ShardTask, write_shards_row
from pipeline.data.sources import SPLITS, Sample, Source, key_hash
from pipeline.data.store import Store
from pipeline.errors import SourceError, StorageError, UsageError
from pipeline.graph import Stage, log
from pipeline.observe.progress import Progress
from pipeline.runtime.files import Manifest
from pipeline.runtime.identity import fingerprint
from pipeline.runtime.workers import connect, joins

logger = logging.getLogger(__name__)

SHARD_VERSION = 4
"""Raise when this stage's results change; see tests/integration/test_golden.py."""


class Shard(Stage):
    """Per-class WebDataset shards of the source, in the cache."""

    name = "shard"

    @cached_property
    def directory(self) -> UPath:
        """Named by the source's content and the shard options."""
        return self.config.cache("shard", shard_identity(self.run.source, self.config.shard))

    def check(self) -> None:
        """See Action; also checks the disk space for decoded images on this machine."""
        super().check()
        if joins() or (self.directory / "manifest.json").exists():
            return
        images = sum(len(self.run.source.samples(split)) for split in SPLITS)
        needed = images * self.config.shard.channels * self.config.shard.image_size**2
        place = store_root(self.config.storage / "cache", self.config.runtime.local_directory)
        there = next(path for path in (place, *place.parents) if path.exists())
        if (free := shutil.disk_usage(there).free) < needed:
            raise UsageError(
                f"the {images:,} decoded images will need {needed / 2**30:.2f} GiB in {place}, "
                f"where {free / 2**30:.2f} are free: make room, choose another "
                "--runtime.local_directory, or lower --shard.image_size"
            )

    def identity(self) -> str:
        """See Stage."""
        return self.directory.name

    def build(self) -> Manifest:
        """See Stage."""
        connect()
        self.run.wait_for({"CPU": 1.0})
        return shard(self.run.source, self.config.shard, self.directory)

    def summarise(self, manifest: Manifest) -> None:
        """See Stage."""
        names = manifest["class_names"]
        more = ", ..." if len(names) > 3 else ""
        counts = {split: sum(part["counts"]) for split, part in manifest["splits"].items()}
        images = ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
        log(f"[shard] {len(names)} classes ({', '.join(names[:3])}{more}): {images} images")

    @cached_property
    def manifest(self) -> Manifest:
        """See Stage; with the source's current class names."""
        return {**self.run.resolve(self), "class_names": list(self.run.source.class_names)}

    @property
    def store(self) -> Store:
        """The decoded images of the shards, on any node."""
        return Store(self.directory, self.manifest, self.config.runtime.local_directory)


MOST_IMAGES, FEWEST_IMAGES = 4000, 200  # per Ray task: about 10 s and 0.5 s


def shard_identity(source: Source, config: ShardConfig) -> str:
    """Fingerprint of everything the shards depend on."""
    return fingerprint("shard", SHARD_VERSION, source.fingerprint(), config)


def plan(source: Source, samples_per_shard: int) -> list[ShardTask]:
    """Assign a source's samples to shards.

    Within a class, samples are ordered by the hash of their keys: every shard, and every contiguous
    part of one, is a random sample of the class. Raises SourceError on a duplicate key.
    """
    tasks = []
    for split in SPLITS:
        classes: list[list[Sample]] = [[] for _ in source.class_names]
        for sample in source.samples(split):
            classes[sample.label].append(sample)
        for label, samples in enumerate(classes):
            samples.sort(key=lambda sample: (key_hash(sample.key), sample.key))
            for one, other in pairwise(samples):
                if one.key == other.key:
                    raise SourceError(f"two {split} images share the key {one.key!r}")
            for number, first in enumerate(range(0, len(samples), samples_per_shard)):
                part = tuple(samples[first : first + samples_per_shard])
                tasks.append(ShardTask(split, label, number, first, part))
    return tasks


def bundles(tasks: Sequence[ShardTask], cpus: int) -> list[list[ShardTask]]:
    """Group consecutive shards into Ray tasks: a CPU idles for 0.15 s between two tasks.

    A task takes half of a CPU's share of the remaining images, so that all CPUs finish together: at
    most MOST_IMAGES, since CPUs may join meanwhile, and at least FEWEST_IMAGES.
    """
    left = sum(len(task.samples) for task in tasks)
    groups, bundle, size = list[list[ShardTask]](), list[ShardTask](), 0
    for task in tasks:
        bundle.append(task)
        size += len(task.samples)
        if size >= min(MOST_IMAGES, max(FEWEST_IMAGES, left // (2 * cpus))):
            groups.append(bundle)
            bundle, left, size = [], left - size, 0
    return [*groups, bundle] if bundle else groups


def shard(source: Source, config: ShardConfig, directory: UPath) -> Manifest:
    """Write the shards of a source with Ray Data; returns the manifest, which the caller writes.

    The caller initialises Ray. Shards of an interrupted call are kept. Unreadable images are listed
    in the manifest's `quarantine`. Raises SourceError as soon as they exceed `max_bad`, or if a
    class has no readable train image; StorageError if a disk or an object store fails, after which
    the same call resumes.
    """
    import ray.data

    tasks = plan(source, config.samples_per_shard)
    identity = shard_identity(source, config)
    directory = directory.absolute()  # tasks have other working directories
    for split in SPLITS:
        (directory / split).mkdir(parents=True, exist_ok=True)
    quieten_ray_data()
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    rows = [{"tasks": pickle.dumps(bundle)} for bundle in bundles(tasks, cpus)]
    total = sum(len(task.samples) for task in tasks)
    bad = [{"key": key, "reason": reason} for key, reason in source.rejected]
    _stop_if_too_many(bad, total + len(bad), config.max_bad)
    records: dict[str, Record] = {}
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        write_shards_row,
        fn_kwargs={
            "read": source.read,
            "config": config,
            "directory": directory,
            "identity": identity,
        },
    )
    progress, done, size = Progress("shard", total, unit="images"), 0, 0
    for row in dataset.iter_rows():
        for record in json.loads(row["records"]):
            if reason := record.get("storage_error"):
                raise StorageError(
                    " ".join(f"{reason}; the same command resumes from here".split())
                )
            records[record["name"]] = record
            bad += record["quarantine"]
            _stop_if_too_many(bad, total + len(source.rejected), config.max_bad)
            images = record["count"] + len(record["quarantine"])
            done += images
            if record["reused"]:
                progress.first += images  # not counted in the rate
            else:
                size += record["bytes"]
        progress.update(done, **{"MiB/s": size / 2**20 / progress.elapsed})
    return build_manifest(source, config, [(task, records[task.name]) for task in tasks])


def _stop_if_too_many(bad: Sequence[dict[str, str]], total: int, max_bad: float) -> None:
    if len(bad) <= max_bad * total:
        return
    kinds = Counter(entry["reason"].partition(":")[0] for entry in bad).most_common(5)
    raise SourceError(
        f"{len(bad)} of {total} images cannot be used, more than shard.max_bad = {max_bad:g} "
        f"allows: {', '.join(f'{count} x {kind}' for kind, count in kinds)}; such as "
        + "; ".join(f"{entry['key']} ({entry['reason']})" for entry in bad[:3])
    )


def quieten_ray_data() -> None:
    """Turn off Ray Data's progress output. Its log file is complete; warnings reach the console."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"
    for handler in logging.getLogger("ray.data").handlers:
        if handler.level == logging.INFO:  # the console's
            handler.setLevel(logging.WARNING)


def build_manifest(
    source: Source, config: ShardConfig, results: list[tuple[ShardTask, Record]]
) -> Manifest:
    """Manifest of the written shards. Raises SourceError if a class has no readable train image."""
    splits: dict[str, dict[str, Any]] = {
        split: {"counts": [0] * len(source.class_names), "shards": []} for split in SPLITS
    }
    quarantine: list[dict[str, str]] = [
        {"key": key, "reason": reason} for key, reason in source.rejected
    ]
    for task, record in results:
        quarantine += [{"split": task.split, **entry} for entry in record["quarantine"]]
        if record["count"]:
            splits[task.split]["counts"][task.class_index] += record["count"]
            splits[task.split]["shards"].append(
                {
                    "path": f"{task.name}.tar",
                    "class": task.class_index,
                    **{key: record[key] for key in ("count", "bytes", "sha256")},
                }
            )
    if quarantine:
        first = quarantine[0]
        logger.warning(
            "%d of %d images cannot be used; see quarantine in the manifest (first: %s: %s)",
            len(quarantine),
            sum(len(task.samples) for task, _ in results) + len(source.rejected),
            first["key"],
            first["reason"],
        )
    for label, count in enumerate(splits["train"]["counts"]):
        if not count:
            name = source.class_names[label]
            raise SourceError(f"none of the train images of class {name!r} can be read")
    train = [(task, record) for task, record in results if task.split == "train"]
    mean, std = _statistics([record for _, record in train], config)
    _tell_imbalance(source.class_names, splits["train"]["counts"])
    by_class = []
    for label in range(len(source.class_names)):
        records = [record for task, record in train if task.class_index == label]
        by_class.append(dict(zip(("mean", "std"), _statistics(records, config), strict=True)))
    return {
        "class_names": list(source.class_names),
        "channels": config.channels,
        "image_size": config.image_size,
        "encoding": config.encoding,
        "mean": mean,
        "std": std,
        "by_class": by_class,
        "splits": splits,
        "quarantine": quarantine,
        "peak_rss_bytes": max(record["peak_rss_bytes"] for _, record in results),
    }


def _tell_imbalance(names: Sequence[str], counts: Sequence[int]) -> None:
    few, many = counts.index(min(counts)), counts.index(max(counts))
    if counts[many] >= 10 * counts[few]:
        logger.warning(
            "long-tailed: from %d train images (%s) to %d (%s) a class; every class has the same "
            "weight in distillation, and stores the same number of images unless "
            "--ipc_allocation is proportional",
            counts[few],
            names[few],
            counts[many],
            names[many],
        )


def _statistics(records: list[Record], config: ShardConfig) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of all pixels in [0, 1], from exact sums."""
    pixels = sum(record["count"] for record in records) * config.image_size**2
    mean, std = [], []
    for channel in range(config.channels):
        total = sum(record["sum"][channel] for record in records)
        squares = sum(record["sum_squares"][channel] for record in records)
        mean.append(total / pixels / 255)
        variance = (squares * pixels - total**2) / pixels**2  # exact integers: no cancellation
        std.append(variance**0.5 / 255 or 1.0)  # a constant channel is not scaled
    return mean, std
