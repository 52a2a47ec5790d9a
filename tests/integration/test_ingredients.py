"""Trajectories of two architectures, chosen images and a psi between classes together, in one
process without Ray.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered import NumberedSource, write_set
from upath import UPath

from ncfm.train import TrainConfig
from pipeline.cli import parse_command
from pipeline.config import RunConfig
from pipeline.data.pool import Pool
from pipeline.data.shards import ShardConfig
from pipeline.data.store import Store
from pipeline.observe.progress import read_rows
from pipeline.runtime.checkpoint import load_checkpoint
from pipeline.stages.distill_loop import DistillJob, Loop
from pipeline.stages.evaluate import EvaluationTask, SetName
from pipeline.stages.pretrain import PretrainJob, pretrain_member

OPTIONS = [
    *("--shard.image_size", "16", "--model.depth", "2", "--model.width", "16", "--ipc", "2"),
    *("--ipc_allocation", "proportional"),
    *("--pretrain.networks", "2", "--pretrain.training.epochs", "4"),
    *("--pretrain.models", '["convnet", "timm/test_resnet"]'),
    *("--pretrain.snapshot_every", "2", "--distill.num_steps", "6", "--distill.real_batch", "20"),
    *("--distill.extractor", "snapshot_blend", "--distill.calibration_ahead", "[0,2]"),
    *("--distill.easy_fraction", "0.5", "--synthetic.choose", "spread"),
    *("--distill.calibration", "1", "--runtime.log_every", "2"),
    *("--frequencies.sampler", "psi", "--frequencies.objective", "between_classes"),
    *("--frequencies.per_network", "true", "--frequencies.num_freqs", "64"),
    *("--frequencies.num_components", "4"),
]


def pool_of(config: RunConfig, directory: Path) -> Pool:
    models = tuple(config.model.named(name) for name in config.pretrain.models)
    return Pool(directory=UPath(directory), models=models, networks=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Store, Path]:
    """The configuration, the real images, and the pool's directory."""
    folder = tmp_path_factory.mktemp("ingredients")
    store = write_set(NumberedSource(), ShardConfig(image_size=16), folder / "set")
    config, pool = parse_command(OPTIONS).config, folder / "pool"
    pool.mkdir()
    job = PretrainJob(
        store=store,
        pool=pool_of(config, pool),
        config=config.pretrain,
        seed=config.seed,
    )
    for member in (0, 1):
        pretrain_member((job, member), 1, "cpu")
    return config, store, pool


def loop(trained: tuple[RunConfig, Store, Path], folder: Path, **changes: Any) -> Loop:
    config, store, pool = trained
    folder.mkdir(exist_ok=True)
    arguments: dict[str, Any] = {
        "synthetic": config.synthetic,
        "distill": config.distill,
        "frequencies": config.frequencies,
    } | changes
    return Loop(
        DistillJob(
            store=store,
            pool=pool_of(config, pool),
            snapshot_epochs=config.pretrain.snapshot_epochs,
            checkpoints=UPath(folder / "checkpoints"),
            metrics=UPath(folder / "metrics.jsonl"),
            augment=config.augment,
            runtime=config.runtime,
            ipc=config.stored(store.counts("train")),
            seed=config.seed,
            **arguments,
        ),
        "cpu",
    )


def test_a_run_that_was_cut_off_goes_on_exactly(
    trained: tuple[RunConfig, Store, Path], tmp_path: Path
) -> None:
    names = sorted(path.name for path in trained[2].glob("*.safetensors"))
    assert names == [
        *("network-000.safetensors", "network-001.safetensors"),
        *("snapshot-000-0002.safetensors", "snapshot-001-0002.safetensors"),
    ]
    changes = {"distill": dataclasses.replace(trained[0].distill, schedule="cosine")}
    whole = loop(trained, tmp_path / "whole", **changes)
    assert len(whole.distiller.frequencies.samplers) == 2
    assert [len(images) for images in whole.distiller.images.values()] == [3, 2, 1]
    whole.run()
    rows = read_rows(UPath(tmp_path / "whole" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"distill/ncfd", "distill/calibration", "distill/psi_objective"} <= set(rows[0])
    loop(trained, tmp_path / "cut", **changes).run(until=3)
    resumed = loop(trained, tmp_path / "cut", **changes)
    assert resumed.distiller.step == 3
    resumed.run()
    states = [load_checkpoint(UPath(tmp_path / name / "checkpoints")) for name in ("whole", "cut")]
    assert states[0] is not None
    assert states[1] is not None
    for name, value in states[0].items():
        if name != "peak_rss_bytes":
            assert torch.equal(value, states[1][name]), name
    assert any(name.startswith("psi_optimizer/1.") for name in states[0])


@pytest.mark.parametrize(("told_at", "steps"), [((), [0, 6]), ((2, 4, 6), [0, 2, 6])])
def test_a_reclaimed_node_leaves_one_checkpoint_at_once(
    trained: tuple[RunConfig, Store, Path],
    tmp_path: Path,
    told_at: tuple[int, ...],
    steps: list[int],
) -> None:
    """Half a minute is far away; `preempted` is asked at steps 2, 4 and 6. Others follow as they
    can be afforded, which is none here.
    """
    job, asked = loop(trained, tmp_path / "run").job, iter((2, 4, 6))
    runtime = dataclasses.replace(job.runtime, checkpoint_share=1e-6)
    job = dataclasses.replace(job, runtime=runtime)
    Loop(job, "cpu", lambda: next(asked) in told_at).run()
    assert [int(path.name[5:]) for path in sorted(job.checkpoints.glob("step-*"))] == steps


def test_batches_and_first_images_are_of_easy_images(
    trained: tuple[RunConfig, Store, Path], tmp_path: Path
) -> None:
    """Of 100, 64 and 7 images half are easy; they are plain, and so are the tiles of the first
    synthetic images.
    """
    made = loop(trained, tmp_path / "run")
    assert [cost.shared for cost in made.costs] == [20, 20, 4]
    for c, count in enumerate((50, 32, 4)):
        easy = {
            tuple(image[:, 0, 0].tolist()) for image in made.real.images(c)[made.real.allowed(c)]
        }
        assert len(easy) == count
        drawn = [made.real.batch(c, step, 20) for step in range(30)]
        assert {tuple(image[:, 0, 0].tolist()) for batch in drawn for image in batch} == easy
        tiles = (made.distiller.images[c].detach() * 255).round()[:, :, ::8, ::8].int()
        assert {tuple(pixel.tolist()) for pixel in tiles.permute(0, 2, 3, 1).flatten(0, 2)} <= easy


def test_a_network_learns_from_labels_of_every_view(
    trained: tuple[RunConfig, Store, Path], tmp_path: Path
) -> None:
    """Beside hard labels of the same images; all else is the same."""
    config, store, pool = trained

    def task(name: SetName, **curate: Any) -> EvaluationTask:
        return EvaluationTask(
            set=name,
            repeat=0,
            identity="some",
            store=store,
            distilled=UPath(tmp_path),
            pool=pool_of(config, pool),
            curate=dataclasses.replace(config.curate, **curate),
            model=config.model,
            training=TrainConfig(epochs=4, batch_size=4),
            hard_epochs=1,
            ipc=(3, 3, 3),
            factor=2,
            seed=0,
        )

    hard, views = task("random"), task("random_soft_views", keep_class=False)
    assert hard.result_path(UPath(tmp_path)) != views.result_path(UPath(tmp_path))
    images = [made.random_images([0, 1, 2]).images for made in (hard, views)]
    assert torch.equal(*images)
    assert (hard.label_bytes(), views.label_bytes()) == (0, 2 * 3 * 9 * 3)
    results = [made.run() for made in (hard, views)]
    assert all(0 <= result["accuracy"] <= 1 for result in results)
    labels = views._view_labels("cpu")
    found = labels(torch.randn(5, 3, 16, 16), torch.eye(3)[[0, 1, 2, 0, 1]])
    torch.testing.assert_close(found.sum(1), torch.ones(5))
    assert len(labels.teachers) == 2
