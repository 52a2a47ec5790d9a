"""Source builtin: crops of photographs from scikit-image's wheel."""

import hashlib
import random
from dataclasses import astuple
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pipeline.data.image_files import read_image
from pipeline.data.sources.source import Found, Sample, SampleList, Split
from pipeline.errors import SourceError

PHOTOGRAPHS = (  # public domain or CC0, all of them in scikit-image's wheel
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
    "rocket.jpg",
)
CROPS_PER_CLASS: dict[Split, int] = {"train": 200, "val": 50}
SMALLEST_CROP = 64  # pixels a side
SMALLEST_BLOCK = 75
Box = tuple[int, int, int, int]  # left, upper, right, lower

if TYPE_CHECKING:
    from pipeline.data.sources import SourceConfig

PATH: str | None = None
OPTIONS: tuple[str, ...] = ()


class BuiltinSource(SampleList):
    """Ten classes: square crops, of varied size and position, of ten photographs.

    A photograph is divided into a grid of blocks. Val crops lie inside blocks a knight's move
    apart, a fifth of the area spread over the picture; train crops lie outside those blocks. The
    splits share no pixel.
    """

    def __init__(self, selection_fraction: float = 0.0) -> None:
        samples: dict[Split, list[Sample]] = {split: [] for split in CROPS_PER_CLASS}
        versions: list[object] = []
        for label, name in enumerate(PHOTOGRAPHS):
            path = _photograph_path(name)
            versions.append(hashlib.sha256(path.read_bytes()).hexdigest())
            with Image.open(path) as photograph:
                size = photograph.size
            for split, part in samples.items():
                for number, box in enumerate(_crops(name, size, split)):
                    key = f"{split}/{Path(name).stem}/{number:03d}"
                    part.append(Sample(key, label, name, box))
                    versions.append(astuple(part[-1])[:4])
        names = [Path(name).stem for name in PHOTOGRAPHS]
        contents = Found(names, samples["train"], samples["val"], versions)
        super().__init__(contents, val_fraction=0, selection_fraction=selection_fraction)

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        """Read one crop."""
        left, upper, right, lower = sample.where
        return _photograph(sample.uri).crop((left, upper, right, lower))


def _crops(name: str, size: tuple[int, int], split: Split) -> list[Box]:
    """Crop rectangles of a split in a photograph of this (width, height)."""
    width, height = size
    blocks = min(8, min(size) // SMALLEST_BLOCK)  # along a side
    w, h = width // blocks, height // blocks
    cells = [(x, y) for y in range(blocks) for x in range(blocks) if (x + 2 * y) % 5 == 2]
    val = [(x * w, y * h, (x + 1) * w, (y + 1) * h) for x, y in cells]
    # Python guarantees the same random() for a string seed in every version; NumPy does not.
    uniform = random.Random(f"{name}/{split}").random
    boxes: list[Box] = []
    while len(boxes) < CROPS_PER_CLASS[split]:
        side = SMALLEST_CROP + int(uniform() * (min(w, h) - SMALLEST_CROP + 1))
        region = val[len(boxes) % len(val)] if split == "val" else (0, 0, width, height)
        left = region[0] + int(uniform() * (region[2] - region[0] - side + 1))
        upper = region[1] + int(uniform() * (region[3] - region[1] - side + 1))
        box = (left, upper, left + side, upper + side)
        if split == "val" or not any(_overlap(box, other) for other in val):
            boxes.append(box)
    return boxes


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _photograph_path(name: str) -> Path:
    # By path: skimage.data would download missing files.
    spec = find_spec("skimage")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        if (path := Path(place) / "data" / name).is_file():
            return path
    raise SourceError(
        f"the built-in photograph {name} is not in {places or 'this Python'}; "
        "the wheel of scikit-image 0.25 or later contains it"
    )


@lru_cache(maxsize=2)  # all crops of a shard are from one photograph
def _photograph(name: str) -> Image.Image:
    return read_image(_photograph_path(name).read_bytes())


def open_source(config: "SourceConfig") -> BuiltinSource:
    """See Kind."""
    return BuiltinSource(config.selection_fraction)
