"""A source of small plain images that tell their class and number, sharded without Ray."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from upath import UPath

from pipeline.data.shards import ShardConfig, write_shard
from pipeline.data.sources import SPLITS, Sample, Source, Split
from pipeline.data.store import Store
from pipeline.stages.shard import build_manifest, plan

COUNTS = {"train": (100, 64, 7), "val": (5, 0, 3), "select": (0, 0, 0)}


class NumberedSource:
    """Plain images of 4 x 4 px whose colour tells the class and the number."""

    class_names = ("a", "b", "c")
    rejected = ()

    def samples(self, split: Split) -> list[Sample]:
        return [
            Sample(f"{split}/{label}/{number}", label, f"{label} {number}")
            for label, count in enumerate(COUNTS[split])
            for number in range(count)
        ]

    def fingerprint(self) -> str:
        return "numbered"

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        label, number = map(int, sample.uri.split())
        return Image.new("RGB", (4, 4), (label, number, 255))


def write_set(
    source: Source, config: ShardConfig, directory: Path | UPath, local: str | None = None
) -> Store:
    for split in SPLITS:
        (directory / split).mkdir(parents=True, exist_ok=True)
    results = [
        (task, write_shard(task, read=source.read, config=config, directory=directory, identity=""))
        for task in plan(source, config.samples_per_shard)
    ]
    return Store(UPath(directory), build_manifest(source, config, results), local)


def numbers(images: Tensor, label: int | None = None) -> list[int]:
    """The numbers of images of one class."""
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (3, 4, 4)
    assert (images == images[:, :, :1, :1]).all()
    assert (images[:, 2] == 255).all()
    if label is not None:
        assert (images[:, 0] == label).all()
    return images[:, 1, 0, 0].tolist()


def everything(store: Store, split: Split) -> tuple[Tensor, Tensor]:
    """All images and labels of a split, class by class."""
    found = store.images(split)
    labels = [torch.full((len(images),), c) for c, images in found.items()]
    return torch.cat([*found.values()]), torch.cat(labels)
