"""Synthetic set: initialisation, storage format, and use as a data set."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from upath import UPath

from ncfm.formation import decode, decode_tiles, encode
from ncfm.hub import download
from ncfm.images import ImageSource, ImageSpec, epoch_order, to_unit
from ncfm.tensor_files import file_sha256, read_tensors, write_tensors

FORMAT, VERSION = "ncfm-synthetic", 1
SHIPPED = Path(__file__).parent / "sets"
"""Sets that come with the package, a folder each."""
REQUIRED = ("factor", "channels", "image_size", "mean", "std", "class_names", "sha256")


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Storage format and initialisation of the synthetic images."""

    factor: int = 2
    """Multi-formation: each stored image holds factor x factor tiles, each used as a full image."""
    init: Literal["mix", "random", "noise"] = "mix"
    """`mix`: a different real image in every tile. `random`: one real image. `noise`: uniform."""
    choose: Literal["random", "confident", "spread"] = "random"
    """Real images for initialisation. `random`; `confident`: lowest loss under the pool's trained
    networks; `spread`: closest to the k-means centres of the first network's features."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        if self.init == "noise" and self.choose != "random":
            raise ValueError(
                f"choose applies to real images, which init 'noise' does not use, "
                f"got {self.choose!r}"
            )

    def real_images_needed(self, ipc: int) -> int:
        """Real images of a class needed to initialise ipc images."""
        return {"mix": ipc * self.factor**2, "random": ipc, "noise": 1}[self.init]


def initial_images(
    real: Tensor, ipc: int, config: SyntheticConfig, generator: torch.Generator
) -> Tensor:
    """Initial synthetic images of one class, (ipc, C, H, W) float32 in [0, 1], from real images
    (N, C, H, W).

    A class with fewer real images than needed repeats them.
    """
    if len(real) == 0:
        raise ValueError("a class without a real image cannot be initialised")
    if config.init == "noise":
        return torch.rand((ipc, *real.shape[1:]), generator=generator)
    needed = config.real_images_needed(ipc)
    chosen = to_unit(real[torch.arange(needed) % len(real)])
    return encode(chosen, config.factor) if config.init == "mix" else chosen


class DecodedDataset(Dataset[tuple[Tensor, Tensor]]):
    """The decoded images of a synthetic set: (image (C, H, W) in [0, 1], label) pairs."""

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.labels[index]


@dataclass(frozen=True)
class DecodedImages:
    """An ImageSource that decodes stored images (N, C, H, W) on the fly; one label per decoded
    image.
    """

    stored: Tensor
    labels: Tensor
    factor: int

    def __len__(self) -> int:
        return len(self.stored) * self.factor**2

    def epoch(
        self, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ImageSource.epoch."""
        for index in epoch_order(len(self), generator).split(batch_size):
            yield decode_tiles(self.stored, self.factor, index), self.labels[index]


@dataclass(frozen=True)
class SyntheticSet:
    """Stored images (N, C, H, W) float32 in [0, 1], labels (N,), and metadata."""

    images: Tensor
    labels: Tensor
    factor: int
    spec: ImageSpec
    provenance: Mapping[str, Any] = field(default_factory=dict)
    soft_labels: Tensor | None = None
    """A distribution over the classes for each decoded image, (N * factor^2, classes), or None."""

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or len(self.images) != len(self.labels):
            raise ValueError(
                f"images {tuple(self.images.shape)} do not fit labels {tuple(self.labels.shape)}"
            )
        decoded = (len(self.images) * self.factor**2, self.spec.num_classes)
        if self.soft_labels is not None and self.soft_labels.shape != decoded:
            raise ValueError(
                f"soft_labels must be {decoded}, got shape {tuple(self.soft_labels.shape)}"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label."""
        return self.spec.class_names

    def decode(self) -> tuple[Tensor, Tensor]:
        """All images at full size, (N * factor^2, C, H, W) in [0, 1], and their labels (paper:
        multi-formation).
        """
        return decode(self.images, self.factor), self._labels(soft=False)

    def of_classes(self, classes: Iterable[int]) -> "SyntheticSet":
        """The subset of some classes; labels are unchanged."""
        own = torch.isin(self.labels, torch.tensor(list(classes)))
        soft = self.soft_labels
        if soft is not None:
            soft = soft[own.repeat_interleave(self.factor**2)]
        return replace(self, images=self.images[own], labels=self.labels[own], soft_labels=soft)

    def source(self, *, soft: bool = False, device: torch.device | str = "cpu") -> ImageSource:
        """An ImageSource of the decoded images, decoding one batch at a time on the device; `soft`
        as in `dataset`.
        """
        return DecodedImages(self.images.to(device), self._labels(soft), self.factor)

    def _labels(self, soft: bool) -> Tensor:
        if not soft:
            return self.labels.repeat_interleave(self.factor**2)
        if self.soft_labels is None:
            raise ValueError("this synthetic set has no soft labels; ncfm.curation adds them")
        return self.soft_labels

    def dataset(
        self, transform: Callable[[Tensor], Tensor] | None = None, *, soft: bool = False
    ) -> Dataset[tuple[Tensor, Tensor]]:
        """A torch Dataset of decoded images and labels; `transform` is applied to each image (C, H,
        W) in [0, 1]. With `soft`, a label is a distribution (classes,), as for cross_entropy;
        ValueError if the set has none.
        """
        labels = self._labels(soft)
        return DecodedDataset(decode(self.images, self.factor), labels, transform)

    def save(self, directory: str | Path | UPath) -> None:
        """Write synthetic.safetensors and, last, manifest.json; creates the directory.

        An existing manifest is removed first: it describes other data.
        """
        path = UPath(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "manifest.json").unlink(missing_ok=True)
        tensors = {"images": self.images, "labels": self.labels}
        if self.soft_labels is not None:
            tensors["soft_labels"] = self.soft_labels
        sha256 = write_tensors(path / "synthetic.safetensors", tensors)
        counts = torch.bincount(self.labels, minlength=self.spec.num_classes).tolist()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "shape": list(self.images.shape),
            "factor": self.factor,
            "soft_labels": self.soft_labels is not None,
            "images_per_class": counts[0] if len(set(counts)) == 1 else counts,
            "channels": self.spec.channels,
            "image_size": self.spec.image_size,
            "mean": self.spec.mean,
            "std": self.spec.std,
            "class_names": self.spec.class_names,
            "labels": self.labels.tolist(),
            "sha256": {"synthetic.safetensors": sha256},
            "provenance": dict(self.provenance),
        }
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def load_synthetic(directory: str | Path | UPath) -> SyntheticSet:
    """Load a set written by `SyntheticSet.save`; one that comes with the package, by its name
    (fashionmnist-ipc1, fashionmnist-ipc10); or one of the Hugging Face hub: hf://owner/name,
    hf://owner/name@revision (needs the package huggingface_hub).

    The images of a local set are a memory map of the file. Raises FileNotFoundError if there is no
    set, ValueError if it has another format or its bytes have changed.
    """
    if str(directory).startswith("hf://"):
        name = str(directory).removeprefix("hf://").removeprefix("datasets/")
        directory = download(name, ["manifest.json", "synthetic.safetensors"])
    path = UPath(directory)
    shipped = SHIPPED / str(directory)
    if (shipped / "manifest.json").exists() and not path.exists():
        path = UPath(shipped)
    if not (path / "manifest.json").exists():
        names = ", ".join(sorted(p.parent.name for p in SHIPPED.glob("*/manifest.json")))
        raise FileNotFoundError(
            f"no synthetic set at {path}: it has no manifest.json; with the package come {names}"
        )
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'manifest.json'} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path / 'manifest.json'} is not the manifest of a synthetic set")
    if manifest.get("format") != FORMAT or manifest.get("version", 0) > VERSION:
        stored = f"{manifest.get('format')!r} version {manifest.get('version')}"
        raise ValueError(
            f"{path} holds {stored}; this version reads {FORMAT!r} up to version {VERSION}"
        )
    if missing := [key for key in REQUIRED if key not in manifest]:
        raise ValueError(f"{path / 'manifest.json'} lacks {', '.join(missing)}")
    if file_sha256(path / "synthetic.safetensors") != manifest["sha256"]["synthetic.safetensors"]:
        raise ValueError(
            f"{path / 'synthetic.safetensors'} is not the file its manifest describes: "
            "damaged or replaced"
        )
    tensors = read_tensors(path / "synthetic.safetensors")
    if absent := {"images", "labels"} - tensors.keys():
        raise ValueError(f"{path / 'synthetic.safetensors'} lacks {', '.join(sorted(absent))}")
    spec = ImageSpec(
        channels=manifest["channels"],
        image_size=manifest["image_size"],
        mean=tuple(manifest["mean"]),
        std=tuple(manifest["std"]),
        class_names=tuple(manifest["class_names"]),
    )
    return SyntheticSet(
        tensors["images"],
        tensors["labels"],
        manifest["factor"],
        spec,
        manifest.get("provenance", {}),
        tensors.get("soft_labels"),
    )
