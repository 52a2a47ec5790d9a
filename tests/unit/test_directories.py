"""Directories that are replaced as a whole, and directories named after classes."""

import uuid
from pathlib import Path

import pytest
import torch
from upath import UPath

import ncfm
from ncfm.images import ImageSpec
from ncfm.synthetic import SyntheticSet
from pipeline.runtime.directories import MAX_NAME_BYTES, folder_names
from pipeline.stages.distill import write_set
from pipeline.stages.export_formats import export


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    """A local disk, and an object store's interface."""
    return UPath(tmp_path) if request.param == "disk" else UPath(f"memory://{uuid.uuid4().hex}/run")


def synthetic(ipc: int, names: tuple[str, ...] = ("cat", "dog")) -> SyntheticSet:
    spec = ImageSpec(channels=1, image_size=4, mean=(0.5,), std=(0.5,), class_names=names)
    images = torch.rand(ipc * len(names), 1, 4, 4, generator=torch.Generator().manual_seed(ipc))
    return SyntheticSet(images, torch.arange(len(names)).repeat_interleave(ipc), 1, spec)


def files(directory: UPath) -> list[str]:
    start = len(str(directory).rstrip("/")) + 1
    return sorted(str(p)[start:] for p in directory.rglob("*") if p.is_file())


def test_a_set_that_shrinks_leaves_no_picture_behind(folder: UPath) -> None:
    write_set(folder / "distilled", synthetic(3))
    assert sum("images/" in name for name in files(folder / "distilled")) == 6
    write_set(folder / "distilled", synthetic(1))
    expected = ["images/cat/0.png", "images/dog/0.png", "manifest.json", "preview.png"]
    assert files(folder / "distilled") == [*expected, "synthetic.safetensors"]
    assert torch.equal(ncfm.load(folder / "distilled").images, synthetic(1).images)
    assert [path.name for path in folder.iterdir()] == ["distilled"]


@pytest.mark.parametrize("to", ["imagefolder", "webdataset", "parquet"])
def test_an_export_that_shrinks_leaves_no_file_behind(
    folder: UPath, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setattr(
        "pipeline.stages.export_formats.PER_FILE", 2
    )  # several files of each format
    export(synthetic(3), folder / "new", to, name="thing")  # type: ignore[arg-type]
    large = files(folder / "new")
    export(synthetic(1), folder / "new", to, name="thing")  # type: ignore[arg-type]
    export(synthetic(1), folder / "control", to, name="thing")  # type: ignore[arg-type]
    assert files(folder / "new") == files(folder / "control")
    assert len(large) > len(files(folder / "new"))


def test_an_interruption_leaves_the_old_or_nothing(
    folder: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk the old content; on an object store no manifest, so nothing that could be read."""
    write_set(folder / "set", synthetic(3))

    def interrupted(_: SyntheticSet, directory: UPath) -> None:
        (directory / "synthetic.safetensors").write_bytes(b"of another set")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticSet, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_set(folder / "set", synthetic(1))
    if isinstance(folder, Path):
        assert torch.equal(ncfm.load(folder / "set").images, synthetic(3).images)
    else:
        with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
            ncfm.load(folder / "set")
    write_set(folder / "set", synthetic(1))
    assert torch.equal(ncfm.load(folder / "set").images, synthetic(1).images)


def test_saving_removes_the_old_manifest_first(folder: UPath) -> None:
    """Cut off after the data, the set is absent, rather than damaged."""
    synthetic(3).save(folder / "set")
    damaged = SyntheticSet(*_fields(synthetic(1)), provenance={"not": object()})
    with pytest.raises(TypeError):
        damaged.save(folder / "set")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        ncfm.load(folder / "set")


def _fields(made: SyntheticSet) -> tuple[torch.Tensor, torch.Tensor, int, ImageSpec]:
    return made.images, made.labels, made.factor, made.spec


NAMES = ("x" * 300, "ö" * 300, "a/b", "a_b", "A_b", "nul\0", "..")


def test_every_class_has_a_folder_of_its_own(tmp_path: Path) -> None:
    write_set(UPath(tmp_path / "set"), synthetic(2, NAMES))
    folders = list((tmp_path / "set" / "images").iterdir())
    assert len(folders) == len(NAMES)
    assert all(len(list(path.iterdir())) == 2 for path in folders)


def test_folders_of_names_that_clash_have_numbers() -> None:
    assert folder_names(["cat", "dog"]) == ["cat", "dog"]
    assert folder_names(["a/b", "a:b"]) == ["0000 a_b", "0001 a_b"]
    assert folder_names(["Cat", "cat"]) == ["0000 Cat", "0001 cat"]
    assert folder_names(["..", "x"]) == ["0000", "0001 x"]
    assert folder_names(["e\u0301", "\u00e9"]) == ["0000 e\u0301", "0001 \u00e9"]  # one on a Mac


def test_long_names_are_cut_and_stay_apart() -> None:
    one, other = folder_names(["ö" * 300 + "1", "ö" * 300 + "2"])
    assert one != other
    assert all(len(name.encode()) <= MAX_NAME_BYTES + 5 for name in (one, other))
    assert folder_names(["ö" * 300, "cat"])[0] == "ö" * (MAX_NAME_BYTES // 2)
