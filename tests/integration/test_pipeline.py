"""All stages together, small, on a real Ray cluster."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from tiny import run, stage

import ncfm
from pipeline.errors import WorkerError
from pipeline.observe.progress import read_rows
from pipeline.stages.curate import CURATE_VERSION

ROOT = Path(__file__).parents[2]


def test_the_run_directory_is_complete(tiny: tuple[Path, Path]) -> None:
    directory = tiny[1]
    made = ncfm.load(directory / "distilled")
    assert made.images.shape == (10, 3, 16, 16)
    assert made.provenance["config"]["distill"]["num_steps"] == 6
    assert made.provenance["seed"] == 0
    assert {"torch", "ray", "git"} <= made.provenance["versions"].keys()
    assert not torch.equal(made.images, ncfm.load(directory / "initial").images)
    assert len(list((directory / "distilled" / "images").glob("*/*.png"))) == 10
    assert (directory / "distilled" / "preview.png").stat().st_size > 1000
    rows = json.loads((directory / "evaluation.json").read_text())["rows"]
    assert [row["set"] for row in rows] == [
        "distilled",
        "random",
        "random_same_factor",
        "herding",
        "whole",
    ]
    for row in rows:
        assert len(row["accuracy"]) == 2
        assert all(0 <= value <= 1 for value in row["accuracy"])
        assert row["mean"] == pytest.approx(sum(row["accuracy"]) / 2)
    metrics = read_rows(directory / "metrics.jsonl")
    assert [row["step"] for row in metrics if row["stage"] == "distill"] == [2, 4, 6]
    assert {row["network"] for row in metrics if row["stage"] == "pretrain"} == {0, 1}
    assert "<html" in (directory / "report.html").read_text()
    assert (directory / "config.toml").read_text().startswith('name = "tiny"')


def test_the_same_command_reuses_everything(tiny: tuple[Path, Path]) -> None:
    folder, directory = tiny
    before = (directory / "distilled" / "synthetic.safetensors").stat().st_mtime_ns
    _, stages = run(folder, "--num_workers", "2")
    assert all(stages[name]["reused"] for name in ("shard", "pretrain", "distill", "evaluate"))
    assert (directory / "distilled" / "synthetic.safetensors").stat().st_mtime_ns == before


TWO_NODES = """
import os, sys
from pathlib import Path
from pipeline.runtime.workers import set_ray_environment
set_ray_environment()
import ray
from ray.cluster_utils import Cluster
from tiny import run

folder = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
try:
    for node in ("one", "two"):
        cluster.add_node(num_cpus=1, env_vars={"NODE_DISK": str(folder / node)})
    os.environ["RAY_ADDRESS"] = cluster.address
    run(folder, "--num_workers", "2", "--runtime.local_directory", "$NODE_DISK/scratch")
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def on_two_nodes(folder: Path) -> Path:
    """A tiny run on a cluster of its own, of two nodes with a CPU and a disk each."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-c", TWO_NODES, str(folder)]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parent)
    for node in ("one", "two"):
        (store,) = (folder / node / "scratch").glob("ncfm-store-*")
        assert sorted(path.name for path in store.glob("*/*.u8"))
    assert not list((folder / "runs" / "cache").glob("ncfm-store-*"))
    return folder / "runs" / "tiny"


@pytest.mark.parametrize("workers", ["1 worker", "4 workers", "2 nodes"])
def test_every_cluster_gives_the_same(
    tiny: tuple[Path, Path], tmp_path: Path, workers: str
) -> None:
    """Invariant 1, from nothing, with two workers of one node: the bytes of shards and networks,
    the images, the accuracies.
    """
    folder, directory = tiny
    if workers == "2 nodes":
        other = on_two_nodes(tmp_path)
        stages = json.loads((other / "stages.json").read_text())
    else:
        other, stages = run(tmp_path, "--num_workers", workers[0])
    assert not any(stage.get("reused") for stage in stages.values())
    for pattern in ("shard-*/**/*.tar", "pretrain-*/network-*.safetensors"):
        files = [
            {path.relative_to(root): path.read_bytes() for path in root.glob(pattern)}
            for root in (folder / "runs" / "cache", tmp_path / "runs" / "cache")
        ]
        assert files[1]
        assert {path: files[0].get(path) for path in files[1]} == files[1]
    images = [ncfm.load(d / "distilled").images for d in (directory, other)]
    assert torch.equal(*images)
    rows = [json.loads((d / "evaluation.json").read_text())["rows"] for d in (directory, other)]
    assert rows[0] == rows[1]


def test_a_store_that_cannot_be_made_ends_the_run_in_one_line(tiny: tuple[Path, Path]) -> None:
    directory = str(tiny[0] / "tiny.toml" / "below")
    options = ("--runtime.local_directory", directory, "--runtime.max_failures", "3")
    with pytest.raises(WorkerError) as caught:
        run(tiny[0], "--name", "no-disk", *options)
    line = str(caught.value)
    assert f"cannot write the store of real images in {directory}/ncfm-store-" in line
    assert "Not a directory; " in line
    assert "\n" not in line
    assert not (tiny[0] / "runs" / "no-disk" / "distilled").exists()


def test_a_changed_option_redoes_what_depends_on_it(tiny: tuple[Path, Path]) -> None:
    folder, _ = tiny
    _, stages = run(folder, "--name", "changed", "--distill.lr", "0.03", "--evaluate.repeats", "1")
    assert stages["shard"]["reused"]
    assert stages["pretrain"]["reused"]
    assert not stages["distill"]["reused"]
    rows = json.loads((folder / "runs" / "changed" / "evaluation.json").read_text())["rows"]
    baseline = json.loads((folder / "runs" / "tiny" / "evaluation.json").read_text())["rows"]
    assert [r["accuracy"][0] for r in rows[1:]] == [r["accuracy"][0] for r in baseline[1:]]


def test_snapshots_of_the_pools_training(tiny: tuple[Path, Path]) -> None:
    folder, directory = tiny
    options = [
        *("--pretrain.snapshot_every", "1", "--pretrain.training.epochs", "2"),
        *("--distill.extractor", "snapshot", "--distill.calibration_ahead", "[0,1]"),
        *("--distill.objective", "mmd_raw", "--distill.loss_weight", "1", "--num_workers", "2"),
        *("--synthetic.choose", "spread", "--distill.easy_fraction", "0.5"),
    ]
    named = directory.with_name("trajectories")
    made = stage(folder, named, "distill", *options)
    assert made["workers"] == 2
    rows = [row for row in read_rows(named / "metrics.jsonl") if row["stage"] == "distill"]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"distill/mmd_raw", "distill/calibration"} <= set(rows[0])
    pool = json.loads((named / "stages.json").read_text())["pretrain"]["directory"]
    assert sorted(path.name for path in Path(pool).glob("snapshot-*")) == [
        *("snapshot-000-0001.safetensors", "snapshot-001-0001.safetensors"),
    ]
    other = stage(folder, directory.with_name("one"), "distill", *options, "--num_workers", "1")
    assert other["workers"] == 1
    first, second = (
        ncfm.load(folder / "runs" / name / "distilled") for name in (named.name, "one")
    )
    assert torch.equal(first.images, second.images)


def test_soft_labels_are_a_set_of_their_own(tiny: tuple[Path, Path]) -> None:
    folder, directory = tiny
    curated, stages = run(folder, "--num_workers", "2", "--curate.soft_labels", "true",
        "--curate.per_view", "true")  # fmt: skip
    assert curated == directory
    assert stages["distill"]["reused"]
    hard, soft = (ncfm.load(directory / name) for name in ("distilled", "curated"))
    assert hard.soft_labels is None
    assert torch.equal(hard.images, soft.images)
    assert soft.soft_labels is not None
    assert soft.soft_labels.shape == (40, 10)
    torch.testing.assert_close(soft.soft_labels.sum(1), torch.ones(40))
    values = {"soft_labels": golden.moments(soft.soft_labels)}
    golden.check("curate", CURATE_VERSION, values, tolerance=1e-3)
    rows = json.loads((directory / "evaluation.json").read_text())["rows"]
    sets = ["distilled", "distilled_soft", "distilled_soft_views"]
    assert [row["set"] for row in rows[:3]] == sets
    # 10 classes, 40 decoded images: a float32 each, or a float16 in each of the two epochs
    assert [row.get("label_bytes") for row in rows[:3]] == [None, 4 * 400, 2 * 2 * 400]
    assert "with soft labels" in (directory / "report.html").read_text()


def test_an_interrupted_run_goes_on_exactly(
    tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 2: stopped after 4 of 6 steps and started again: the same, bit for bit."""
    folder, directory = tiny
    cut, _ = run(folder, "--name", "cut", "--num_workers", "2", "--runtime.checkpoint_every_s", "0")
    (cut / "distill" / "manifest.json").unlink()  # as if it had been killed after step 4
    next((cut / "checkpoints").glob("*/step-00000006/checkpoint.json")).unlink()
    resumed, stages = run(folder, "--name", "cut", "--num_workers", "2")
    assert not stages["distill"]["reused"]
    assert torch.equal(
        ncfm.load(resumed / "distilled").images, ncfm.load(directory / "distilled").images
    )
    steps = [
        row["step"] for row in read_rows(resumed / "metrics.jsonl") if row["stage"] == "distill"
    ]
    assert steps == [2, 4, 6]


def test_the_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very lines of the README that use a set; those that make one are in
    tests/unit/test_api.py.
    """
    blocks: list[str] = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    (use,) = [block for block in blocks if "ncfm.load" in block]
    monkeypatch.chdir(tmp_path)
    assert len([line for line in use.splitlines() if line.strip()]) <= 10
    exec(compile(use, "README.md", "exec"), {})
