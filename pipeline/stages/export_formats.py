"""Export formats of a distilled set (ImageFolder, WebDataset, Parquet), and its data card."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from upath import UPath

from ncfm import SyntheticSet
from pipeline.observe.preview import png, to_pixels
from pipeline.runtime.directories import folder_names, replaced
from pipeline.runtime.files import write_atomic
from pipeline.stages.export import Format

PER_FILE = 10_000  # images per tar or Parquet file
FILES: dict[Format, str] = {
    "imagefolder": "train/**",
    "webdataset": "train-*.tar",
    "parquet": "data/train-*.parquet",
}
"""Format -> pattern of the files with the images."""


@dataclass(frozen=True)
class Example:
    """One training image."""

    key: str
    png: bytes  # full size, 8 bits per channel: at most 1/510 from the distilled value
    label: int
    soft_label: list[float] | None


def examples(synthetic: SyntheticSet) -> Iterator[Example]:
    """The decoded images of a set, for training."""
    images, labels = synthetic.decode()
    soft = synthetic.soft_labels
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        yield Example(f"{i:06d}", _png(image), label, None if soft is None else soft[i].tolist())


def _png(image: Tensor) -> bytes:
    return png(to_pixels(image) if image.shape[0] == 3 else to_pixels(image)[..., 0])


def export(
    synthetic: SyntheticSet,
    directory: UPath,
    to: Format,
    *,
    name: str,
    rows: Sequence[Mapping[str, Any]] = (),
) -> UPath:
    """Write the set, also as `ncfm.load` reads it, and its README.md, replacing the directory's
    contents; returns the directory.

    `rows`: rows of evaluation.json, for the card.
    """
    writer = {"imagefolder": _imagefolder, "webdataset": _webdataset, "parquet": _parquet}[to]
    with replaced(directory, last="README.md") as new:
        writer(synthetic, new)
        synthetic.save(new)
        write_atomic(new / "README.md", data_card(synthetic, to, name=name, rows=rows))
    return directory


def _imagefolder(synthetic: SyntheticSet, directory: UPath) -> None:
    folders = folder_names(synthetic.class_names)
    for example in examples(synthetic):
        path = directory / "train" / folders[example.label] / f"{example.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, example.png, durable=False)


def _webdataset(synthetic: SyntheticSet, directory: UPath) -> None:
    for number, part in enumerate(_parts(synthetic)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for example in part:
                members = {"png": example.png, "cls": str(example.label).encode()}
                if example.soft_label is not None:
                    members["json"] = json.dumps({"soft_label": example.soft_label}).encode()
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{example.key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        write_atomic(directory / f"train-{number:06d}.tar", buffer.getvalue())
    write_atomic(directory / "classes.txt", "".join(f"{n}\n" for n in synthetic.class_names))


def _parquet(synthetic: SyntheticSet, directory: UPath) -> None:
    columns = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
    ]
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(synthetic.class_names), "_type": "ClassLabel"},
    }
    if synthetic.soft_labels is not None:
        columns.append(("soft_label", pa.list_(pa.float32())))
        features["soft_label"] = {
            "feature": {"dtype": "float32", "_type": "Value"},
            "_type": "Sequence",
        }
    schema = pa.schema(
        columns, metadata={"huggingface": json.dumps({"info": {"features": features}})}
    )
    parts = list(_parts(synthetic))
    (directory / "data").mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        rows = [
            {
                "image": {"bytes": example.png, "path": f"{example.key}.png"},
                "label": example.label,
                "soft_label": example.soft_label,
            }
            for example in part
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
        path = directory / "data" / f"train-{number:05d}-of-{len(parts):05d}.parquet"
        write_atomic(path, buffer.getvalue())


def _parts(synthetic: SyntheticSet) -> Iterator[list[Example]]:
    part: list[Example] = []
    for example in examples(synthetic):
        part.append(example)
        if len(part) == PER_FILE:
            yield part
            part = []
    if part:
        yield part


# ------------------------------------------------------------------ the card

_LOAD = {
    "imagefolder": 'torchvision.datasets.ImageFolder("train")  # labels: folders in their order',
    "webdataset": 'webdataset.WebDataset("train-000000.tar").decode("pil").to_tuple("png", "cls")',
    "parquet": 'datasets.load_dataset("parquet", data_files="data/*.parquet", split="train")',
}


def data_card(
    synthetic: SyntheticSet,
    to: Format,
    *,
    name: str,
    rows: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Data card (README.md) for the Hugging Face hub: YAML metadata, then the text.

    The license is "unknown": it depends on that of the real images.
    """
    count = len(synthetic.labels) * synthetic.factor**2
    header = {
        "pretty_name": f"{name}, distilled",
        "license": "unknown",
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", "synthetic", "ncfm"],
        "size_categories": [_size_category(count)],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": FILES[to]}]}
        ],
    }
    # JSON values are valid YAML, whatever characters a name has.
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    lines = [
        f"---\n{yaml}\n---\n",
        f"# {name}, distilled\n",
        "Learned images, not photographs, that replace a whole data set for training a network. "
        "Made by neural characteristic function matching (NCFM, arXiv 2502.20653).\n",
        f"```python\n{_LOAD[to]}\n```\n",
        "`ncfm.load` (package ncfm-ray) reads the same images in full precision, from a copy of "
        "this folder or from `hf://OWNER/NAME`.\n",
        "| | |\n|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in _facts(synthetic, to).items()),
    ]
    if rows:
        lines += [
            "\nAccuracy (%) of fresh networks trained on each set, after their last epoch, on "
            "held-out images:\n",
            "| Trained on | Network | Accuracy | Runs |\n|---|---|---|---|",
            *(
                f"| {_cell(row['set'])} | {_cell(row['network'])} "
                f"| {100 * row['mean']:.1f} ± {100 * row['std']:.1f} | {len(row['accuracy'])} |"
                for row in rows
            ),
        ]
    lines.append(
        "\nLimits: the images inherit the biases and private content of the real set; they replace "
        "it for training only.\n"
    )
    return "\n".join(lines)


def _facts(synthetic: SyntheticSet, to: Format) -> dict[str, object]:
    """The card's table of facts."""
    spec, provenance = synthetic.spec, synthetic.provenance
    count, versions = len(synthetic.labels) * synthetic.factor**2, provenance.get("versions", {})
    return {
        "Classes": f"{spec.num_classes}: {', '.join(spec.class_names[:20])}"
        + (" ..." if spec.num_classes > 20 else ""),
        "Images": f"{count} of {spec.image_size} x {spec.image_size} pixels, "
        f"{spec.channels} channels, made from {len(synthetic.labels)} stored ones "
        f"({synthetic.factor} x {synthetic.factor} tiles each, enlarged)",
        "Normalisation": f"subtract {_numbers(spec.mean)}, divide by {_numbers(spec.std)} "
        "(channels in [0, 1], of the real training images)",
        "Labels": "hard and soft"
        if synthetic.soft_labels is not None and to != "imagefolder"
        else "hard",
        "Rounding": "8-bit PNG: at most 1/510 from the distilled value",
        "Seed": provenance.get("seed", "unknown"),
        "Made by": provenance.get("command", "unknown"),
        "Code": versions.get("git", "unknown"),
    }


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _size_category(count: int) -> str:
    """The hub's size category."""
    for limit, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M")):
        if count < limit:
            return name
    return "1M<n<10M"
