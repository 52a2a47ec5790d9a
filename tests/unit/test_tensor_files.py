"""Safetensors files written from, and read as, memory maps."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from upath import UPath

import ncfm
from ncfm.images import ImageSpec
from ncfm.synthetic import SyntheticSet
from ncfm.tensor_files import file_sha256, read_tensors, write_tensors

TENSORS = {
    "images": torch.rand(5, 3, 4, 4),
    "labels": torch.arange(5),
    "soft_labels": torch.rand(20, 10).T.contiguous().T,  # its memory is not in its order
    "half": torch.rand(3).bfloat16(),
}


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, place: str) -> None:
    path = UPath(tmp_path if place == "disk" else "memory://tensor-files") / "x.safetensors"
    path.parent.mkdir(exist_ok=True, parents=True)
    expected = save({name: value.contiguous() for name, value in TENSORS.items()})
    digest = write_tensors(path, TENSORS)
    assert path.read_bytes() == expected
    assert digest == file_sha256(path) == hashlib.sha256(expected).hexdigest()
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())


ANONYMOUS = """
import re, sys, torch
from pathlib import Path
from ncfm.tensor_files import read_tensors, write_tensors
def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1]) / 1024
path = Path(sys.argv[1])
mapped = torch.from_file(str(path / "raw"), shared=True, size=2**26)  # 256 MiB
mapped.fill_(0.5)
before = anonymous()
write_tensors(path / "x.safetensors", {"images": mapped})
read = read_tensors(path / "x.safetensors")["images"]
assert float(read.sum()) == 2**25
print(anonymous() - before)
read.clone()
kept = read.clone()
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells RssAnon")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown, copied = map(float, done.stdout.split())
    assert grown < 64, "MiB, where a copy takes 256"
    assert copied > 250  # negative control


def test_a_set_can_be_saved_where_it_was_loaded_from(tmp_path: Path) -> None:
    spec = ImageSpec(channels=1, image_size=4, mean=(0.5,), std=(0.5,), class_names=("cat", "dog"))
    made = SyntheticSet(torch.rand(2, 1, 4, 4), torch.arange(2), 1, spec)
    made.save(tmp_path)
    loaded = ncfm.load(tmp_path)
    loaded.save(tmp_path)
    again = ncfm.load(tmp_path)
    assert torch.equal(again.images, made.images)
    assert torch.equal(loaded.images, made.images)
