"""Source torchvision: CIFAR, MNIST and SVHN through torchvision, optionally downloaded."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torchvision import datasets

from pipeline.data.sources.packed import torchvision_root
from pipeline.data.sources.source import Found, Sample, SampleList
from pipeline.errors import SourceError

if TYPE_CHECKING:
    from pipeline.data.sources import SourceConfig

PATH = "the directory in which torchvision keeps its data sets"
OPTIONS = ("name", "download")


class TorchvisionSource(SampleList):
    """CIFAR10, CIFAR100, MNIST, FashionMNIST or SVHN, with the official test split as val.

    torchvision loads the whole set in the driver; samples carry their pixels.
    """

    def __init__(
        self,
        name: str,
        root: str,
        download: bool,
        val_fraction: float,
        selection_fraction: float = 0.0,
    ) -> None:
        def load(root: Path, train: bool) -> tuple[list[str], list[Sample]]:
            part = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
            data = getattr(datasets, name)(root, **part, download=download)
            pixels, labels = np.asarray(data.data), getattr(data, "targets", ())
            if name == "SVHN":
                pixels, labels = pixels.transpose(0, 2, 3, 1), data.labels
            names = getattr(data, "classes", [str(digit) for digit in range(10)])
            sample = partial(Sample, uri=name, where=pixels.shape[1:])
            key = f"{'train' if train else 'test'}/{{:05d}}".format
            return names, [
                sample(key(number), int(label), data=image.tobytes())
                for number, (image, label) in enumerate(zip(pixels, labels, strict=True))
            ]

        try:
            with torchvision_root(Path(root), name) as laid_out:
                (names, train), (_, val) = load(laid_out, True), load(laid_out, False)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split()).removesuffix(
                " You can use download=True to download it"
            )
            raise SourceError(
                f"torchvision finds no {name} in {root} ({reason}); "
                "--source.download true downloads it"
            ) from error
        contents = Found(names, train, val, [name, len(train), len(val)])
        super().__init__(contents, val_fraction=val_fraction, selection_fraction=selection_fraction)

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        """Convert the sample's pixels."""
        return Image.fromarray(np.frombuffer(sample.data, np.uint8).reshape(sample.where))


def open_source(config: "SourceConfig") -> TorchvisionSource:
    """See Kind."""
    assert config.path is not None
    assert config.name is not None
    fractions = (config.val_fraction, config.selection_fraction)
    return TorchvisionSource(config.name, config.path, config.download, *fractions)
