"""The Hugging Face hub, by its own library and a stand-in server on loopback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Hub, serving
from PIL import Image
from test_export import synthetic
from upath import UPath

import ncfm
from pipeline.data.sources import SourceConfig, open_source
from pipeline.errors import SourceError, UsageError
from pipeline.stages.export import ExportConfig, push
from pipeline.stages.export_formats import export

ROOT = Path(__file__).parents[2]
NAMES = ["ash", "birch", "cedar"]


def python(code: str, hub: Hub, home: Path, **environment: str) -> str:
    """Run code in a process of its own: huggingface_hub reads its environment when imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = kept | {"HF_ENDPOINT": hub.address, "HF_HOME": str(home)} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PUSH = """
from upath import UPath
from pipeline.stages.export import push
store = UPath("memory://export")  # an object store
store.fs.put({path!r}, store.path, recursive=True)
for repository, directory in (("me/trees", UPath({path!r})), ("me/older", store)):
    push(directory, repository, dry_run=False, replaces="data/train-*.parquet")
"""
LOAD = """
import ncfm
ncfm.load("hf://me/trees").save({path!r})
"""


def test_an_export_is_pushed_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = synthetic(soft=True)
    path = tmp_path / "export"
    export(made, UPath(path), "parquet", name="thing")
    files = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert "synthetic.safetensors" in files
    push(UPath(path), "me/trees", dry_run=True, replaces="")
    text = capsys.readouterr().out
    for name, data in files.items():
        assert f"{len(data):,}  {name}\n" in text
    assert f"would upload {len(files)} files" in text
    with serving() as hub:
        hub.sets["me/older"] = {"data/train-00001-of-00002.parquet": b"old", "notes.txt": b"kept"}
        text = python(PUSH.format(path=str(path)), hub, tmp_path, HF_TOKEN="hf_x")
        assert f"uploaded: {hub.address}/datasets/me/trees" in text
        assert hub.sets == {"me/trees": files, "me/older": files | {"notes.txt": b"kept"}}
        assert hub.private == {"me/trees"}
        written = {token for m, p, token in hub.requests if m == "POST" and "/me/" in p}
        assert written == {"Bearer hf_x"}
        python(LOAD.format(path=str(tmp_path / "first")), hub, tmp_path)
        assert hub.fetched() == {"manifest.json", "synthetic.safetensors"}
    python(LOAD.format(path=str(tmp_path / "offline")), hub, tmp_path)  # from the hub's cache
    for name in ("first", "offline"):
        loaded = ncfm.load(tmp_path / name)
        assert loaded.images.equal(made.images)
        assert loaded.soft_labels is not None
        assert loaded.soft_labels.equal(made.soft_labels)
        assert (loaded.class_names, loaded.factor) == (made.class_names, made.factor)


def hub_parquet(seed: int) -> bytes:
    """As `datasets` writes it: 12 images, the last of them broken, in columns of odd names."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    images = []
    for pixels in np.random.default_rng(seed).integers(256, size=(12, 8, 8, 3), dtype=np.uint8):
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    images[-1] = {"bytes": b"broken", "path": None}
    features = {
        "raw": Value("binary"),  # could hold images, but is none
        "label": Value("int64"),  # has a usual name, but is no class
        "picture": ImageFeature(),
        "tree": ClassLabel(names=NAMES),
    }
    rows = {"raw": [b""] * 12, "label": [7] * 12, "picture": images, "tree": [0, 1, 2] * 4}
    Dataset.from_dict(rows, Features(features)).to_parquet(file := io.BytesIO())
    return file.getvalue()


OPEN = """
import hashlib, json
from pipeline.data.sources import SourceConfig, open_source
from pipeline.errors import SourceError
for path, subset in {sources!r}:
    try:
        source = open_source(SourceConfig(kind="hf", path=path, subset=subset))
    except SourceError as error:
        print(json.dumps(str(error)))
        continue
    samples = source.samples("train") + source.samples("val")
    whole = [sample for sample in samples if sample.where != (0, 11)]
    print(json.dumps([
        source.class_names, [[s.key, s.label] for s in samples], source.fingerprint(),
        [hashlib.sha1(source.read(s).tobytes()).hexdigest() for s in whole],
    ]))
"""


def test_a_data_set_of_the_hub_is_a_source(tmp_path: Path) -> None:
    parts = enumerate(("train", "test"))
    files = {f"plain/{part}-00000-of-00001.parquet": hub_parquet(n) for n, part in parts}
    other = {"large/train-00000-of-00001.parquet": b"not to be read", "README.md": b"#"}
    wrong = OPEN.format(sources=[("them/trees", None), ("them/nothing", None)])
    right = OPEN.format(sources=[("them/trees", "plain")])
    with serving() as hub:
        hub.sets["them/trees"] = files | other
        several, absent = python(wrong, hub, tmp_path / "a").splitlines()
        assert "several subsets: name one with --source.subset: large, plain" in several
        assert "cannot read source.path them/nothing: RepositoryNotFoundError: " in absent
        assert hub.fetched() == set()
        first = python(right, hub, tmp_path / "a")
        assert hub.fetched() == files.keys()
        again = python(right, hub, tmp_path / "b")  # another download of the same commit
    assert first == again == python(right, hub, tmp_path / "a")  # the last without the server
    names, samples, fingerprint, pixels = json.loads(first)
    assert (names, len(samples), len(pixels)) == (NAMES, 24, 22)
    assert len({*pixels}) == 22

    # A local copy, read without the network and in this process, is the same but for its versions.
    for name, data in files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    copy = open_source(SourceConfig(kind="hf", path=str(tmp_path / "copy")))
    train, val = copy.samples("train"), copy.samples("val")
    assert [[s.key.removeprefix("plain/"), s.label] for s in train + val] == samples
    assert [s.label for s in train] == [0, 1, 2] * 4
    assert copy.fingerprint() != fingerprint
    with pytest.raises(OSError, match="not an image format"):  # what the shard stage quarantines
        copy.read(train[11])


@pytest.mark.parametrize("push", ["trees", "me/trees@main", "https://x/me/trees"])
def test_push_takes_a_name_alone(push: str) -> None:
    with pytest.raises(ValueError, match=rf"export\.push must be owner/name, got '{push}'"):
        ExportConfig(push=push)


def test_what_is_no_data_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="neither a folder nor owner/name"):
        open_source(SourceConfig(kind="hf", path="s3://bucket/folder"))
    with pytest.raises(SourceError, match=r"has no \*\.parquet; .*refs/convert/parquet"):
        open_source(SourceConfig(kind="hf", path=str(tmp_path)))
    with pytest.raises(ValueError, match="expected owner/name or owner/name@revision, got 'x'"):
        ncfm.load("hf://x")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        ncfm.load("hf://me/trees")
    with pytest.raises(UsageError, match="needs the extra hf"):
        open_source(SourceConfig(kind="hf", path="me/trees"))
