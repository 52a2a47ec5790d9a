"""Stage pretrain: train the pool of feature extractors, one Ray task per member.

Member i depends only on (seed, i). Each is one file, written when it is trained, beside its
snapshots if any are kept: an interrupted stage resumes with the missing members, and a member with
the epoch after its last checkpoint.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load, save
from upath import UPath

from ncfm.augment import AugmentConfig
from ncfm.evaluate import accuracy
from ncfm.images import ImageSource, ImageSpec
from ncfm.models import ModelConfig, build_model
from ncfm.seeding import keyed_seed
from ncfm.train import EpochReport, TrainConfig, train
from pipeline.data.batches import StoredImages
from pipeline.data.pool import (
    Pool,
    State,
    contiguous,
    member_path,
    metrics_path,
    new_network,
    pack_member,
    snapshot_path,
)
from pipeline.data.store import Store
from pipeline.errors import UsageError
from pipeline.graph import Run, Stage
from pipeline.observe.progress import NETWORK_PROGRESS_S, Progress, append_rows, read_rows
from pipeline.runtime.files import Manifest, write_atomic
from pipeline.runtime.identity import fingerprint, peak_rss_bytes
from pipeline.runtime.tasks import MOST_THREADS, run_each
from pipeline.runtime.workers import Workers
from pipeline.stages.shard import Shard

PRETRAIN_VERSION = 2
"""Raise when this stage's results change; see tests/integration/test_golden.py."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The pool of feature extractors."""

    networks: int = 20
    """Networks in the pool (released code: 20)."""
    training: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            augment=AugmentConfig(strategy="color_crop", single=False), cutmix_prob=0.5
        )
    )
    """Training of each network; the defaults are the released code's."""
    snapshot_every: int = 0
    """Epochs between snapshots of each network, for distill.extractor `snapshot` and
    `snapshot_blend`. 0: only the initial and the trained weights, which are always kept."""
    models: tuple[str, ...] = ()
    """Architectures that the networks have in turn, named as for model.name, whose other options
    apply where it is named; empty: model.name alone."""

    def __post_init__(self) -> None:
        if self.networks < 1:
            raise ValueError(f"networks must be at least 1, got {self.networks}")
        if self.snapshot_every < 0:
            raise ValueError(f"snapshot_every must not be negative, got {self.snapshot_every}")
        for name in self.models:
            ModelConfig(name=name)  # raises ValueError if there is no such network
        if len(self.models) > self.networks:
            raise ValueError(
                f"models must be at most as many as networks, got {list(self.models)} for "
                f"{self.networks}"
            )

    @property
    def snapshot_epochs(self) -> tuple[int, ...]:
        """Epochs after which the weights are kept, from 0 to the last."""
        last = self.training.epochs
        return (*range(0, last, self.snapshot_every or last), last)


class Pretrain(Stage):
    """The pool of extractors, in the cache. A larger pool extends a smaller one."""

    name = "pretrain"

    def __init__(
        self,
        run: Run,
        *,
        model: ModelConfig | None = None,
        pretrain: PretrainConfig | None = None,
        seed: int | None = None,
    ) -> None:
        """The run's own pool, or a variant with the given model, options or seed."""
        super().__init__(run)
        self.pretrain, own = pretrain or run.config.pretrain, run.config.model
        names = self.pretrain.models or (own.name,)
        self.models = (model,) if model else tuple(own.named(name) for name in names)
        self.seed = run.config.seed if seed is None else seed

    @cached_property
    def directory(self) -> UPath:
        """See Stage."""
        identity = fingerprint(
            "pretrain",
            PRETRAIN_VERSION,
            self.run.stage(Shard).fingerprint,
            *self.models,
            self.pretrain.training,
            self.pretrain.snapshot_every,
            self.seed,
        )
        return self.config.cache("pretrain", identity)

    @property
    def pool(self) -> Pool:
        """The networks; once the stage is built, they are there."""
        networks = self.pretrain.networks
        return Pool(directory=self.directory, models=self.models, networks=networks)

    def identity(self) -> str:
        """See Stage."""
        return fingerprint(self.directory.name, self.pretrain.networks)

    def build(self) -> Manifest:
        """See Stage."""
        for model in self.models:
            check_model(self.run, model)
        runtime = self.config.runtime
        job = PretrainJob(
            store=self.run.stage(Shard).store,
            pool=self.pool,
            config=self.pretrain,
            seed=self.seed,
            checkpoint_every_s=runtime.checkpoint_every_s,
        )
        workers = self.run.workers(self.pretrain.networks, threads=MOST_THREADS)
        return pretrain(job, workers, max_failures=runtime.max_failures)


def check_model(run: Run, model: ModelConfig) -> None:
    """Raise UsageError if a network cannot be built for these images."""
    manifest = run.stage(Shard).manifest
    try:
        with torch.device("meta"):
            build_model(
                model,
                num_classes=len(manifest["class_names"]),
                channels=manifest["channels"],
                image_size=manifest["image_size"],
            )
    except ValueError as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """Inputs of a task that trains a member of the pool."""

    store: Store
    pool: Pool
    config: PretrainConfig
    seed: int
    checkpoint_every_s: float = 30.0
    """Seconds between two checkpoints of a member's training."""


def pretrain(job: PretrainJob, workers: Workers, *, max_failures: int) -> Manifest:
    """Train the missing members; returns the pool's manifest entries."""
    members = range(job.config.networks)
    missing = {i: (job, i) for i in members if not member_path(job.pool.directory, i).exists()}
    progress = Progress("pretrain", len(missing), unit="networks")
    peak = 0
    for done, (_, result) in enumerate(
        run_each(pretrain_member, missing, workers, max_retries=max_failures), start=1
    ):
        peak = max(peak, result["peak_rss_bytes"])
        progress.update(done, accuracy=result["val_accuracy"])
    return {"networks": job.config.networks, "peak_rss_bytes": peak}


def pretrain_member(task: tuple[PretrainJob, int], threads: int, device: str) -> dict[str, Any]:
    """Train one member, as a Ray task. The result does not depend on the number of threads."""
    torch.set_num_threads(1)  # per operation: threads share a batch instead
    job, member = task
    if member_path(job.pool.directory, member).exists():  # its worker died after writing it
        return _result(read_rows(metrics_path(job.pool.directory, member))[-1])
    images = {split: StoredImages(job.store, split) for split in ("train", "val")}
    return train_member(job, member, images, job.store.spec, torch.device(device), threads=threads)


def train_member(
    job: PretrainJob,
    member: int,
    images: Mapping[str, ImageSource],
    spec: ImageSpec,
    device: torch.device,
    *,
    threads: int = 1,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> dict[str, Any]:
    """Train a member, resuming from its last checkpoint, and write its files; returns its val
    accuracy and peak memory.
    """
    model = new_network(job.pool.model(member), spec, keyed_seed(job.seed, "pool_network", member))
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    record = _Record(job, member, model)

    def report(epoch: EpochReport) -> None:
        record.add(epoch)
        if on_epoch is not None:
            on_epoch(epoch)

    train(
        model,
        images["train"],
        spec,
        job.config.training,
        seed=keyed_seed(job.seed, "pool_training", member),
        device=device,
        report=report,
        save=record.save,
        resume=record.state,
        threads=threads,
        on_batch=record.tell,
    )
    tested = accuracy(model, images["val"], spec, device=device, threads=threads)
    last = {"pretrain/val_accuracy": tested, "peak_rss_bytes": peak_rss_bytes()}
    record.end(last, pack_member(initial, model.cpu().state_dict()))
    return _result(last)


def _result(last: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "val_accuracy": last["pretrain/val_accuracy"],
        "peak_rss_bytes": last["peak_rss_bytes"],
    }


class _Record:
    """Files of a member's training: metric rows, snapshots, and its last checkpoint."""

    def __init__(self, job: PretrainJob, member: int, model: Any) -> None:
        self.job, self.member, self.model = job, member, model
        self.metrics = metrics_path(job.pool.directory, member)
        self.checkpoint = job.pool.directory / f"training-{member:03d}.safetensors"
        self.state = load(self.checkpoint.read_bytes()) if self.checkpoint.exists() else None
        done = 0 if self.state is None else int(self.state["epoch"])
        self.rows = [row for row in read_rows(self.metrics) if row["epoch"] < done]
        self.saved_at = time.monotonic()
        name, epochs = f"pretrain network {member}", job.config.training.epochs
        self.progress = Progress(
            name, epochs, unit="epochs", done=done, interval=NETWORK_PROGRESS_S
        )

    def tell(self, epochs: float) -> None:
        """Print progress, rate-limited."""
        self.progress.update(round(epochs, 2))

    def add(self, epoch: EpochReport) -> None:
        """Add the epoch's metric row; write a snapshot if one is due."""
        row = {"stage": "pretrain", "network": self.member, "epoch": epoch.epoch}
        row |= {"time": time.time(), "pretrain/loss": epoch.loss}
        self.rows.append({**row, "pretrain/accuracy": epoch.accuracy})
        # The first and last weights are in the member's own file.
        if epoch.epoch + 1 in self.job.config.snapshot_epochs[1:-1]:
            path = snapshot_path(self.job.pool.directory, self.member, epoch.epoch + 1)
            write_atomic(path, save(contiguous(self.model.state_dict())))

    def save(self, state: State) -> None:
        """Write a checkpoint if one is due."""
        if time.monotonic() - self.saved_at >= self.job.checkpoint_every_s:
            append_rows(self.metrics, self.rows, fresh=True)
            write_atomic(self.checkpoint, save(contiguous(state)))
            self.saved_at = time.monotonic()

    def end(self, last: Mapping[str, Any], member: bytes) -> None:
        """Write the member and its final metrics; remove the checkpoint."""
        self.rows[-1] |= last
        append_rows(self.metrics, self.rows, fresh=True)
        write_atomic(member_path(self.job.pool.directory, self.member), member)
        self.checkpoint.unlink(missing_ok=True)
