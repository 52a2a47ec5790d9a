"""Safetensors files that are larger than memory: written from memory maps, read as such.

The library's own `save` makes one byte string of all tensors, and its `load` needs another.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor
from upath import UPath

BLOCK_BYTES = 2**24
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
"""What they are called in the file."""


def write_tensors(path: Path | UPath, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, the same bytes as the library's; returns its SHA-256.

    Memory does not grow with the tensors where these are memory maps and the file is local. A local
    file is written beside and then renamed, for the old one may be mapped by these very tensors.
    Raises OSError, as writing a file does.
    """
    if not isinstance(path, Path):
        return _write(path, tensors)
    beside = path.with_name(f".{path.name}.new")
    digest = _write(beside, tensors)
    beside.replace(path)
    return digest


def _write(path: Path | UPath, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in _blocks(tensors):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        flat = tensors[name].detach().contiguous().view(-1).view(torch.uint8)
        for block in flat.split(BLOCK_BYTES):
            yield block.numpy().tobytes()


def read_tensors(path: Path | UPath) -> dict[str, Tensor]:
    """The tensors of a safetensors file: memory maps if it is local, so that only what is used is
    read, and it is not kept.
    """
    if not isinstance(path, Path):
        return load(path.read_bytes())
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no mapping


def file_sha256(path: Path | UPath) -> str:
    """The SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
