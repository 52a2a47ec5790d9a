"""A long-tailed set, its stored images in proportion to the train images, through all stages."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered import everything
from PIL import Image
from tiny import run, stage
from torch import Tensor

import ncfm
from pipeline.cli import parse_command
from pipeline.graph import Run
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.plan import Plan, cluster_figures

TRAIN, VAL = {"head": 60, "middle": 12, "tail": 3}, 4
STORED = (12, 2, 1)  # of 15: after one each, 60 / 1.5, ..., 60 / 11.5 before 12 / 1.5, 60 / 12.5
PROPORTIONAL = ("--ipc", "5", "--ipc_allocation", "proportional")


def options(data: Path) -> list[str]:
    return [
        *("--source.kind", "folder", "--source.path", str(data), *PROPORTIONAL),
        *("--curate.soft_labels", "true", "--curate.per_view", "true", "--curate.networks", "1"),
        *("--frequencies.sampler", "psi", "--distill.calibration", "1"),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise around a colour of the class: no two are equal."""
    folder, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    for label, (name, count) in enumerate(TRAIN.items()):
        for split, images in (("train", count), ("val", VAL)):
            (folder / split / name).mkdir(parents=True)
            for number in range(images):
                noise = torch.randint(0, 128, (16, 16, 3), generator=generator)
                noise[..., label] += 127
                path = folder / split / name / f"{number}.png"
                Image.fromarray(noise.byte().numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def finished(
    ray_cluster: str, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(folder, run directory) of a run on two workers."""
    folder = tmp_path_factory.mktemp("long_tail")
    directory, _ = run(folder, *options(data), "--num_workers", "2")
    return folder, directory


def rows_of(directory: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((directory / "evaluation.json").read_text())["rows"]
    return rows


def test_the_set_and_all_that_shows_it(finished: tuple[Path, Path]) -> None:
    directory = finished[1]
    for name in ("initial", "distilled", "curated"):
        made = ncfm.load(directory / name)
        manifest = json.loads((directory / name / "manifest.json").read_text())
        assert manifest["images_per_class"] == [12, 2, 1]
        assert made.images.shape == (15, 3, 16, 16)
        assert made.labels.tolist() == [0] * 12 + [1] * 2 + [2]
    means = made.images.mean((2, 3))  # each image is of its class: its own channel is brightest
    assert means.argmax(1).tolist() == made.labels.tolist()
    assert made.soft_labels is not None
    assert made.soft_labels.shape == (60, 3)
    pngs = Counter(path.parent.name for path in (directory / "distilled/images").glob("*/*.png"))
    assert pngs == {"head": 10, "middle": 2, "tail": 1}  # at most ten of a class
    rows = {row["set"]: row for row in rows_of(directory)}
    for name, row in rows.items():
        whole = name == "whole"
        assert row["images_per_class"] == (25 if whole else 5)
        assert row["images_of_a_class"] == ([3, 60] if whole else [1, 12])
    # 60 decoded images of 3 classes: a float32 each, or a float16 in each of two epochs.
    labels = [row.get("label_bytes") for row in rows.values()]
    assert labels[:3] == [None, 4 * 60 * 3, 2 * 2 * 60 * 3]
    page = (directory / "report.html").read_text()
    assert "1 to 12 stored images per class" in " ".join(page.split())
    assert "3 to 60 per class" in page


def test_one_worker_gives_the_same_bits(
    finished: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    other, _ = run(tmp_path, *options(data), "--num_workers", "1")
    sets = [ncfm.load(directory / "distilled") for directory in (finished[1], other)]
    assert torch.equal(sets[0].images, sets[1].images)
    assert rows_of(finished[1]) == rows_of(other)
    others = ["--ipc_allocation", "equal", "--name", "equal"]  # negative control
    equal, stages = run(tmp_path, *options(data), *others, "--num_workers", "1")
    assert not stages["distill"]["reused"]
    assert ncfm.load(equal / "distilled").labels.bincount().tolist() == [5, 5, 5]
    assert "images_of_a_class" not in rows_of(equal)[0]


def test_an_interrupted_run_goes_on_exactly(finished: tuple[Path, Path], data: Path) -> None:
    folder, directory = finished
    cut_off = [*options(data), "--name", "cut", "--num_workers", "2"]
    cut, _ = run(folder, *cut_off, "--runtime.checkpoint_every_s", "0")
    (cut / "distill" / "manifest.json").unlink()
    next((cut / "checkpoints").glob("*/step-00000006/checkpoint.json")).unlink()
    resumed, stages = run(folder, *cut_off[:-1], "1")  # on fewer workers
    assert not stages["distill"]["reused"]
    sets = [ncfm.load(each / "distilled").images for each in (resumed, directory)]
    assert torch.equal(*sets)


def images_of(task: Any) -> tuple[Tensor, Tensor]:
    ((images, labels),) = task.training_set("cpu").epoch(1000, None)
    return images, labels


def test_baselines_have_as_many_real_images_of_each_class(
    finished: tuple[Path, Path], data: Path
) -> None:
    folder, _ = finished
    preset = ["--config", str(folder / "tiny.toml"), "--storage_path", str(folder / "runs")]
    stages = Run(parse_command(["evaluate", *preset, *options(data)])).stage(Evaluate)
    tasks = {task.set: task for task in stages.tasks if task.repeat == 0}
    real, classes = everything(tasks["random"].store, "train")
    for name in ("random", "random_soft", "herding"):
        images, labels = images_of(tasks[name])
        hard = labels if labels.ndim == 1 else torch.tensor([0] * 12 + [1] * 2 + [2])
        assert hard.bincount().tolist() == list(STORED)
        same = (images[:, None] - real[None] / 255).abs().amax((2, 3, 4)) < 1e-6
        assert same.any(1).all(), "each is a real image"
        assert len(set(same.int().argmax(1).tolist())) == 15, "no two are the same"
        assert torch.equal(classes[same.int().argmax(1)], hard)
    assert images_of(tasks["random_same_factor"])[1].bincount().tolist() == [48, 8, 4]


def test_the_other_stages(
    finished: tuple[Path, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, directory = finished
    usual = options(data)
    stage(folder, directory, "shard", *usual)
    assert "3 classes (head, middle, tail): 75 train, 12 val images" in capsys.readouterr().out
    audit = stage(folder, directory, "audit", *usual, "--audit.draws", "1", "--audit.samples", "9")
    images = dict.fromkeys(("distilled", "random_same_factor", "noise"), 60)
    # The tail has 3 train images for its 4 decoded ones, and each class 4 to hold out.
    assert audit["images"] == images | {"random": 59, "held_out": 12}
    steps = ["--continual.steps", "[3]", "--continual.repeats", "1"]
    assert stage(folder, directory, "continual", *usual, *steps)["rows"]
    grid = ["--search_proxy.widths", "[4]", "--search_proxy.depths", "[1,2,3]"]
    norms = ["--search_proxy.norms", '["instance"]', "--search_proxy.repeats", "1"]
    assert stage(folder, directory, "search-proxy", *usual, *grid, *norms)["sets"]
    stage(folder, directory, "export", *usual, "--export.to", "imagefolder")
    files = Counter(path.parent.name for path in directory.glob("export/*/train/*/*.png"))
    assert files == {"head": 48, "middle": 8, "tail": 4}
    stage(folder, directory, "tune", *usual, "--source.selection_fraction", "0.3", *TUNED)
    (trial,) = json.loads((directory / "tune/results.json").read_text())["trials"]
    assert trial["stored_bytes"] == 15 * 3 * 16 * 16


TUNED = ["--tune.space", '{"distill.lr": {"choice": [0.01]}}', "--tune.samples", "1",
    "--tune.epochs", "1", "--tune.rungs", "[1.0]"]  # fmt: skip


def test_plan_counts_the_stored_images(data: Path, tmp_path: Path) -> None:
    sized = ["--shard.image_size", "16", "--plan.nodes", "1", "--plan.gpus_per_node", "2"]
    command = parse_command(["plan", *options(data), *sized, "--storage_path", str(tmp_path)])
    plan = Plan(Run(command))
    figures = {figure.name: figure for figure in cluster_figures(command.config, plan._sizes())}
    assert figures["checkpoint, shared"].value == 4 * 3 * 15 * 3 * 16 * 16
    # One worker has the head, the other both others.
    assert "12 stored images x 3HW" in figures["GPU memory, a worker"].formula
