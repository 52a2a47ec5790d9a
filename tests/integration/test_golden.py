"""The results of the tiny run are those on record; those of the other stages are checked where they
are made (`golden.check`).
"""

import hashlib
import json
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import load_file

import ncfm
from pipeline.stages.distill import DISTILL_VERSION
from pipeline.stages.networks import EVALUATE_VERSION
from pipeline.stages.pretrain import PRETRAIN_VERSION
from pipeline.stages.shard import SHARD_VERSION


def test_shards(tiny: tuple[Path, Path]) -> None:
    shards = Path(json.loads((tiny[1] / "stages.json").read_text())["shard"]["directory"])
    tars = sorted(shards.rglob("*.tar"))
    assert tars
    hashes = [int(hashlib.sha256(tar.read_bytes()).hexdigest()[:12], 16) for tar in tars]
    golden.check("shard", SHARD_VERSION, {"sha256": hashes}, tolerance=0)


def test_networks(tiny: tuple[Path, Path]) -> None:
    pool = Path(json.loads((tiny[1] / "stages.json").read_text())["pretrain"]["directory"])
    (first, *_) = sorted(pool.glob("network-*.safetensors"))
    values = {name: golden.moments(tensor) for name, tensor in load_file(first).items()}
    golden.check("pretrain", PRETRAIN_VERSION, values, tolerance=1e-3)


def test_distilled_images(tiny: tuple[Path, Path]) -> None:
    images = ncfm.load(tiny[1] / "distilled").images
    values = {str(c): golden.moments(image) for c, image in enumerate(images)}
    golden.check("distill", DISTILL_VERSION, values, tolerance=1e-3)


def test_accuracies(tiny: tuple[Path, Path]) -> None:
    rows = json.loads((tiny[1] / "evaluation.json").read_text())["rows"]
    values = {row["set"]: [*row["accuracy"], *row["per_class"]] for row in rows}
    golden.check("evaluate", EVALUATE_VERSION, values, tolerance=0.03)


def test_other_results_and_an_unrecorded_version_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UPDATE_GOLDEN", raising=False)
    monkeypatch.setattr(golden, "GOLDEN", tmp_path / "golden.json")
    values = {"mean": [1.0, 2.0]}
    golden.GOLDEN.write_text(json.dumps({"some-stage": {"version": 1, "values": values}}))
    golden.check("some-stage", 1, {"mean": [1.0, 2.0005]}, tolerance=1e-3)
    with pytest.raises(pytest.fail.Exception, match="raise SOME_STAGE_VERSION"):
        golden.check("some-stage", 1, {"mean": [1.0, 2.1]}, tolerance=1e-3)
    with pytest.raises(pytest.fail.Exception, match="SOME_STAGE_VERSION is new"):
        golden.check("some-stage", 2, values, tolerance=1e-3)
    monkeypatch.setenv("UPDATE_GOLDEN", "1")
    golden.check("some-stage", 2, values, tolerance=1e-3)
    monkeypatch.delenv("UPDATE_GOLDEN")
    golden.check("some-stage", 2, values, tolerance=1e-3)


def test_moments_tell_the_order() -> None:
    values = torch.arange(6.0)
    mean, std, weighted = golden.moments(values)
    assert golden.moments(values.flip(0))[:2] == pytest.approx([mean, std])
    assert golden.moments(values.flip(0))[2] != pytest.approx(weighted)
