"""What `plan` predicts, against what runs really took."""

import json
from pathlib import Path

import pytest

from ncfm.images import ImageSpec
from pipeline.assignment import ClassCost
from pipeline.checkpoint import load_checkpoint
from pipeline.config import PRESETS, UsageError, parse_command
from pipeline.plan import GPUS, Plan, gpu_step_s, make_plan, shard_bytes, told
from pipeline.probe import forward_flops
from pipeline.progress import read_rows
from pipeline.stages import Run

PRESET = """
[shard]
image_size = 32
[model]
width = 32
[pretrain]
networks = 2
[pretrain.training]
epochs = 1
[distill]
num_steps = 24
real_batch = 64
calibration = 0.0
[frequencies]
num_freqs = 256
num_components = 16
[runtime]
log_every = 4
"""


def runner(folder: Path, *options: str) -> Run:
    preset = folder / "plan.toml"
    preset.write_text(PRESET)
    storage = ["--storage_path", str(folder / "runs")]
    return Run(parse_command(["plan", "--config", str(preset), *storage, *options]))


def plan(found: Run) -> Plan:
    return make_plan(found.config, found.source, found.toml)


@pytest.fixture(scope="module")
def measured(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A distillation by two workers."""
    folder = tmp_path_factory.mktemp("plan")
    found = runner(folder, "--num_workers", "2")
    found.start()
    _ = found.distilled
    return found


def test_shards_and_memory_are_as_predicted(measured: Run) -> None:
    predicted = plan(runner(measured.directory.parent.parent, "--num_workers", "2"))
    shards = sum(s["bytes"] for part in measured.shards["splits"].values() for s in part["shards"])
    assert predicted.shard_bytes == pytest.approx(shards, rel=0.25)
    final = load_checkpoint(measured.distill_job().checkpoints)
    assert final is not None
    assert predicted.memory == pytest.approx(int(final["peak_rss_bytes"]), rel=0.25)
    rows = [r for r in read_rows(measured.directory / "metrics.jsonl") if r["stage"] == "distill"]
    sent = sorted(row["distill/bytes_per_step"] for row in rows)[len(rows) // 2]
    assert predicted.network_bytes == pytest.approx(sent, rel=0.25)


@pytest.mark.long
def test_seconds_a_step_are_as_predicted(measured: Run) -> None:
    predicted = plan(runner(measured.directory.parent.parent, "--num_workers", "2"))
    rows = [r for r in read_rows(measured.directory / "metrics.jsonl") if r["stage"] == "distill"]
    steps = sorted(row["distill/step_s"] for row in rows[1:])  # the first interval warms up
    assert predicted.step_s == pytest.approx(steps[len(steps) // 2], rel=0.25)


def test_jpeg_shards_are_smaller_and_said_so(tmp_path: Path) -> None:
    png, jpeg = (
        runner(tmp_path, "--shard.encoding", encoding, "--shard.image_size", "64")
        for encoding in ("png", "jpeg")
    )
    assert shard_bytes(jpeg.config, jpeg.source) < 0.8 * shard_bytes(png.config, png.source)


@pytest.mark.parametrize(("sampler", "seconds"), [("gaussian", 0.73), ("psi", 1.33)])
def test_the_table_gives_the_papers_time_for_the_papers_cell(sampler: str, seconds: float) -> None:
    preset = str(PRESETS / "cifar100_ipc10.toml")
    config = parse_command(["--config", preset, "--frequencies.sampler", sampler]).config
    spec = ImageSpec(
        channels=3,
        image_size=32,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        class_names=tuple(map(str, range(100))),
    )
    cost = ClassCost.of(500, 10 * 2**2, calibrated=True)
    flops = 100 * (cost.shared + cost.own) * forward_flops(config, spec)
    assert gpu_step_s("A100", config, flops) == pytest.approx(seconds, rel=0.01)


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.plan.GPUS", {"X": GPUS["A100"]})
    with pytest.raises(UsageError, match="'A100' is not in the table: X"):
        plan(runner(tmp_path, "--plan.gpu", "A100"))
    before = {path.name for path in tmp_path.iterdir()}
    found = runner(tmp_path, "--plan.gpu", "X", "--num_workers", "1")
    text = told(plan(found), found.config)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert "not measured by us" in text
    assert all(len(line) < 160 for line in text.splitlines())
    json.dumps(text)
