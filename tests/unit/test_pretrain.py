"""A member of the pool: its snapshots, and its training that was cut off."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from upath import UPath

from ncfm.images import ImageSpec, InMemoryImages
from ncfm.models import ModelConfig
from ncfm.seeding import keyed_seed
from ncfm.train import EpochReport, TrainConfig, train
from pipeline.data.pool import Pool, load_trajectory, member_path, new_network
from pipeline.observe.progress import read_rows
from pipeline.stages.pretrain import PretrainConfig, PretrainJob, train_member

SPEC = ImageSpec(
    channels=3, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3, class_names=("a", "b", "c")
)
TRAINING = TrainConfig(epochs=5, batch_size=16, lr=0.05)


class KilledError(Exception):
    """The process ends here."""


def images() -> dict[str, InMemoryImages]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(60) % 3
    made[labels == 1] //= 2
    return {split: InMemoryImages(made, labels) for split in ("train", "val")}


def job(directory: Path, **changes: Any) -> PretrainJob:
    config = PretrainConfig(networks=2, training=TRAINING, snapshot_every=2)
    directory.mkdir(exist_ok=True)
    return PretrainJob(
        store=None,  # type: ignore[arg-type] # of the loop around it
        pool=Pool(directory=UPath(directory), models=(ModelConfig(depth=2, width=8),), networks=2),
        config=dataclasses.replace(config, **changes),
        seed=3,
        checkpoint_every_s=0,
    )


def train_it(job: PretrainJob, killed_in: int | None = None) -> list[int]:
    """Train member 1; returns the epochs that were done."""
    epochs = []

    def on_epoch(epoch: EpochReport) -> None:
        epochs.append(epoch.epoch)
        if epoch.epoch == killed_in:
            raise KilledError

    train_member(job, 1, images(), SPEC, torch.device("cpu"), on_epoch=on_epoch)
    return epochs


@pytest.mark.parametrize(
    ("every", "expected"),
    [(0, (0, 5)), (1, (0, 1, 2, 3, 4, 5)), (2, (0, 2, 4, 5)), (5, (0, 5)), (7, (0, 5))],
)
def test_the_epochs_of_snapshots(every: int, expected: tuple[int, ...]) -> None:
    config = PretrainConfig(training=TRAINING, snapshot_every=every)
    assert config.snapshot_epochs == expected


def test_snapshots_are_the_weights_after_their_epochs(tmp_path: Path) -> None:
    made = job(tmp_path / "pool")
    assert train_it(made) == [0, 1, 2, 3, 4]
    trajectory = load_trajectory(made.pool.directory, 1, made.config.snapshot_epochs)
    assert len(trajectory) == 4
    expected = {}
    model = new_network(made.pool.model(1), SPEC, keyed_seed(3, "pool_network", 1))
    expected[0] = {k: v.clone() for k, v in model.state_dict().items()}

    def keep(epoch: EpochReport) -> None:
        expected[epoch.epoch + 1] = {k: v.clone() for k, v in model.state_dict().items()}

    seed = keyed_seed(3, "pool_training", 1)
    train(model, images()["train"], SPEC, TRAINING, seed=seed, report=keep)
    for epoch, state in zip((0, 2, 4, 5), trajectory, strict=True):
        assert all(torch.equal(value, expected[epoch][name]) for name, value in state.items())
    assert not torch.equal(trajectory[1]["classifier.weight"], trajectory[2]["classifier.weight"])


def test_a_member_that_was_cut_off_goes_on_exactly(tmp_path: Path) -> None:
    whole, cut = job(tmp_path / "whole"), job(tmp_path / "cut")
    train_it(whole)
    with pytest.raises(KilledError):
        train_it(cut, killed_in=2)
    assert not member_path(cut.pool.directory, 1).exists()
    assert train_it(cut) == [2, 3, 4]  # two epochs had been saved
    trajectories = [load_trajectory(j.pool.directory, 1, (0, 2, 4, 5)) for j in (whole, cut)]
    for one, other in zip(*trajectories, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    rows = [read_rows(j.pool.directory / "metrics-001.jsonl") for j in (whole, cut)]
    assert [row["epoch"] for row in rows[1]] == [0, 1, 2, 3, 4]
    for key in ("pretrain/loss", "pretrain/accuracy", "pretrain/val_accuracy"):
        assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]]
    names = sorted(path.name for path in cut.pool.directory.iterdir())
    assert names == [  # and no checkpoint any more
        *("metrics-001.jsonl", "network-001.safetensors"),
        *("snapshot-001-0002.safetensors", "snapshot-001-0004.safetensors"),
    ]


def test_without_snapshots_there_are_two_states(tmp_path: Path) -> None:
    made = job(tmp_path / "pool", snapshot_every=0)
    train_it(made)
    assert [path.name for path in sorted(made.pool.directory.iterdir())] == [
        *("metrics-001.jsonl", "network-001.safetensors"),
    ]
    other = job(tmp_path / "other")
    train_it(other)
    both = [load_trajectory(j.pool.directory, 1, (0, 5)) for j in (made, other)]
    for one, same in zip(*both, strict=True):  # and snapshots do not change what is trained
        assert all(torch.equal(value, same[name]) for name, value in one.items())
