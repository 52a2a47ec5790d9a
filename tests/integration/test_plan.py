"""What `plan` predicts, against what runs really took."""

import os
import statistics
from pathlib import Path

import pytest

from ncfm.images import ImageSpec
from pipeline.cli import PRESETS, parse_command
from pipeline.errors import UsageError
from pipeline.graph import Run
from pipeline.observe.progress import read_rows
from pipeline.runtime.assignment import ClassCost
from pipeline.runtime.checkpoint import load_checkpoint
from pipeline.stages.distill import Distill
from pipeline.stages.plan import GPUS, estimate, estimate_lines, gpu_step_s, shard_bytes
from pipeline.stages.probe import Answer, Request, forward_flops
from pipeline.stages.shard import Shard

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


@pytest.mark.long
def test_disk_memory_network_and_time_are_as_predicted(ray_cluster: str, tmp_path: Path) -> None:
    """A distillation by two workers."""
    found = runner(tmp_path, "--num_workers", "2")
    found.start()
    distill, shards = found.stage(Distill), found.stage(Shard)
    _ = distill.manifest
    predicted = estimate(found.config, found.source)
    final = load_checkpoint(distill.job.checkpoints)
    assert final is not None
    splits = shards.manifest["splits"].values()
    made = sum(entry["bytes"] for part in splits for entry in part["shards"])
    assert predicted.shard_bytes == pytest.approx(made, rel=0.25)
    assert predicted.memory == pytest.approx(int(final["peak_rss_bytes"]), rel=0.25)
    rows = [r for r in read_rows(found.directory / "metrics.jsonl") if r["stage"] == "distill"]
    sent = statistics.median(row["distill/bytes_per_step"] for row in rows)
    assert predicted.network_bytes == pytest.approx(sent, rel=0.25)
    seconds = statistics.median(row["distill/step_s"] for row in rows[1:])  # the first warms up
    assert predicted.step_s == pytest.approx(seconds, rel=0.25)


def test_jpeg_shards_are_smaller_and_said_so(tmp_path: Path) -> None:
    png, jpeg = (
        runner(tmp_path, "--shard.encoding", encoding, "--shard.image_size", "64")
        for encoding in ("png", "jpeg")
    )
    assert shard_bytes(jpeg.config, jpeg.source) < 0.8 * shard_bytes(png.config, png.source)


@pytest.mark.parametrize(("sampler", "seconds"), [("gaussian", 0.73), ("psi", 1.33)])
def test_the_table_gives_the_papers_time_for_the_papers_cell(sampler: str, seconds: float) -> None:
    preset = str(PRESETS / "cifar100_ipc10.toml")
    config = parse_command(
        ["--config", preset, "--source.path", "x", "--frequencies.sampler", sampler]
    ).config
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
    answer = Answer(
        step_s=1.0,
        whole=True,
        train_image_s=1e-3,
        memory=2**30,
        working=2**28,
        gpu_memory=None,
        pass_flops=10**8,
    )
    asked: list[tuple[Request, int]] = []

    def answers(request: Request, count: int) -> list[Answer]:
        asked.append((request, count))
        return [answer] * count

    monkeypatch.setattr("pipeline.stages.plan.run_probes", answers)
    monkeypatch.setattr("pipeline.stages.plan.GPUS", {"X": GPUS["A100"]})
    wrong = runner(tmp_path, "--plan.gpu", "A100")
    with pytest.raises(UsageError, match="'A100' is not in the table: X"):
        estimate(wrong.config, wrong.source)
    before = {path.name for path in tmp_path.iterdir()}
    found = runner(tmp_path, "--num_workers", "5")
    plan = estimate(found.config, found.source)
    assert asked[0][0].real == [64, 64], "each of five workers has two classes"
    assert plan.distill_s == 24 * 1.0
    assert plan.memory == 2**30, "the pages of the store are the kernel's cache"
    assert plan.store_bytes == 2500 * 3 * 32**2
    assert (asked[-1][0].device, asked[-1][1]) == ("cpu", min(5, len(os.sched_getaffinity(0))))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    for options, device in (((), "cuda"), (("--use_gpu", "false"), "cpu")):
        found = runner(tmp_path, "--num_workers", "5", *options)
        plan = estimate(found.config, found.source)
        assert (plan.use_gpu, asked[-1][0].device) == (device == "cuda", device)
    assert asked[-2][1] == 3, "a probe on every GPU, not five on three"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = runner(tmp_path, "--plan.gpu", "X", "--num_workers", "1")
    plan = estimate(found.config, found.source)
    assert (plan.use_gpu, plan.gpu_memory) == (True, 2**28)
    assert "not measured by us; too low" in estimate_lines(plan, found.config)
    assert {path.name for path in tmp_path.iterdir()} == before
