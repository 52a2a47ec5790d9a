"""What `plan` predicts, against what runs really took."""

import os
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from upath import UPath

from ncfm.images import ImageSpec
from pipeline.cli import PRESETS, parse_command
from pipeline.errors import UsageError
from pipeline.graph import Run
from pipeline.observe.progress import read_rows
from pipeline.runtime.assignment import ClassCost
from pipeline.runtime.checkpoint import load_checkpoint
from pipeline.stages.cluster_plan import Figure, Sizes, cluster_figures, cluster_lines
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


def figures(folder: Path, *options: str) -> dict[str, Figure]:
    """What is planned for a cluster, by name."""
    options = ("--plan.nodes", "1", "--plan.gpus_per_node", "2", *options)
    config = parse_command(["plan", "--config", str(folder / "tiny.toml"), *options]).config
    sizes = Sizes.of(config, [200] * 10, 2500)
    return {figure.name: figure for figure in cluster_figures(config, sizes)}


def test_a_clusters_bytes_are_those_of_a_run(tiny: tuple[Path, Path]) -> None:
    """Computed for two workers, against the files and the metrics of the tiny run, within 10 %."""
    folder, directory = tiny
    planned = figures(folder)
    cache = folder / "runs" / "cache"
    store = sum(path.stat().st_size for path in cache.glob("*store*/**/*.u8"))
    assert planned["store, each node"].value == store
    newest = max((directory / "checkpoints").glob("*/step-*"))
    written = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    psi = 3 * 4 * parameters_of_psi(directory)  # its weights and moments, the same for any data
    assert planned["checkpoint, shared"].value == pytest.approx(written - psi, rel=0.1)
    rows = [r for r in read_rows(directory / "metrics.jsonl") if r["stage"] == "distill"]
    sent = statistics.median(row["distill/bytes_per_step"] for row in rows)
    assert planned["network, a step"].value == pytest.approx(sent, rel=0.1)


def parameters_of_psi(directory: Path) -> int:
    state = load_checkpoint(UPath(next((directory / "checkpoints").iterdir())))
    assert state is not None
    return sum(tensor.numel() for name, tensor in state.items() if name.startswith("psi/"))


def test_what_does_not_fit_is_said_with_what_mends_it(tiny: tuple[Path, Path]) -> None:
    fits = cluster_lines(list(figures(tiny[0]).values()))
    assert fits.endswith("[plan] all of it fits")
    small = figures(tiny[0], "--plan.disk_gib_per_node", "0.001")
    assert "set runtime.local_directory" in small["store, each node"].problem
    large = figures(tiny[0], "--ipc", "2000000", "--plan.gpu", "l4")
    text = cluster_lines(list(large.values()))
    assert "GPU memory, a worker does not fit: a GPU has 24 GB: more plan.nodes" in text
    with pytest.raises(UsageError, match=r"a100, h100, h200, l4, got 'tpu'"):
        figures(tiny[0], "--plan.gpu", "tpu")


def test_imagenet_on_64_gpus_needs_no_images(capsys: pytest.CaptureFixture[str]) -> None:
    preset = str(PRESETS / "imagenet1k_ipc10.toml")
    options = ["--plan.nodes", "8", "--plan.gpus_per_node", "8", "--plan.gpu", "h100"]
    Run(parse_command(["plan", "--config", preset, *options])).perform(("plan",))
    lines = capsys.readouterr().out.splitlines()
    for name, formula in (
        ("shards, shared", "N 1,331,167"),
        ("store, each node", "N x 3HW"),
        ("checkpoint, shared", "C x IPC x 3HW"),
        ("GPU memory, a worker", "160 stored images x 3HW"),
        ("memory, a worker", "pool"),
        ("network, a step", "(2K + 1)"),
        ("step", "passes"),
        ("pretraining", "60 epochs x 1 networks"),
        ("distillation", "10,000 steps"),
        ("evaluation", "300 epochs"),
    ):
        (line,) = [line for line in lines if line.startswith(f"[plan] {name}  ")]
        assert formula in line
    assert "all of it fits" in lines[-1]


def test_a_run_without_room_for_its_store_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    found = Run(parse_command(["--storage_path", str(tmp_path / "runs")]))
    with pytest.raises(UsageError, match=r"2,500 decoded images will need 0\.01 GiB in .*lower"):
        found.perform(("shard",))
    assert not (tmp_path / "runs").exists()
    free.free = 2**33
    found.stage(Shard).check()  # negative control
