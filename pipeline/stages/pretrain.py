"""Stage pretrain: the pool of extractors, each of its members trained in a Ray task.

Member i depends on (seed, i) alone. Each is one file, written when it is done, beside its snapshots
if any are kept: an interrupted stage goes on with the members that are missing, and inside one of
them with the epoch after its last checkpoint.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from upath import UPath

from ncfm.augment import AugmentConfig
from ncfm.evaluate import accuracy
from ncfm.images import ImageSource, ImageSpec
from ncfm.models import ModelConfig, build_model
from ncfm.seeding import keyed_seed
from ncfm.train import EpochReport, TrainConfig, train
from pipeline.data.batches import StoredImages
from pipeline.data.store import Store
from pipeline.graph import Run, Stage
from pipeline.observe.progress import Progress, append_rows, read_rows
from pipeline.runtime.files import Manifest, write_atomic
from pipeline.runtime.identity import fingerprint, peak_rss_bytes
from pipeline.runtime.tasks import MOST_THREADS, run_each
from pipeline.runtime.workers import Workers
from pipeline.stages.shard import Shard

State = dict[str, Tensor]

PROGRESS_S = 30.0  # between two lines about a network: many are trained at once

PRETRAIN_VERSION = 2
"""To be raised when this stage's results change; see tests/integration/test_golden.py."""


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
    """Training of one of them; the defaults are the released code's."""
    snapshot_every: int = 0
    """Keep a snapshot of every network each so many epochs, the initial and the trained one
    included, for distill.extractor `snapshot` and `snapshot_blend`. 0: these two alone."""

    def __post_init__(self) -> None:
        if self.networks < 1:
            raise ValueError(f"networks must be at least 1, got {self.networks}")
        if self.snapshot_every < 0:
            raise ValueError(f"snapshot_every must not be negative, got {self.snapshot_every}")

    @property
    def snapshot_epochs(self) -> tuple[int, ...]:
        """Epochs of training after which the weights are kept, from 0 to the last."""
        last = self.training.epochs
        return (*range(0, last, self.snapshot_every or last), last)


class Pretrain(Stage):
    """The pool of extractors, in the cache. A larger pool adds to a smaller one."""

    name = "pretrain"

    def __init__(
        self,
        run: Run,
        *,
        model: ModelConfig | None = None,
        pretrain: PretrainConfig | None = None,
        seed: int | None = None,
    ) -> None:
        """The run's own pool, or another one that differs in what is given."""
        super().__init__(run)
        self.model, self.pretrain = model or run.config.model, pretrain or run.config.pretrain
        self.seed = run.config.seed if seed is None else seed

    @cached_property
    def directory(self) -> UPath:
        """See Stage."""
        identity = fingerprint(
            "pretrain",
            PRETRAIN_VERSION,
            self.run.stage(Shard).fingerprint,
            self.model,
            self.pretrain.training,
            self.pretrain.snapshot_every,
            self.seed,
        )
        return self.config.cache("pretrain", identity)

    def identity(self) -> str:
        """See Stage."""
        return fingerprint(self.directory.name, self.pretrain.networks)

    def build(self) -> Manifest:
        """See Stage."""
        runtime = self.config.runtime
        job = PretrainJob(
            store=self.run.stage(Shard).store,
            directory=self.directory,
            model=self.model,
            config=self.pretrain,
            seed=self.seed,
            checkpoint_every_s=runtime.checkpoint_every_s,
        )
        workers = self.run.workers(self.pretrain.networks, threads=MOST_THREADS)
        return pretrain(job, workers, max_failures=runtime.max_failures)


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """What a worker needs to train its members of the pool."""

    store: Store
    directory: UPath
    model: ModelConfig
    config: PretrainConfig
    seed: int
    checkpoint_every_s: float = 30.0
    """Seconds between two checkpoints of a member's training."""


def pretrain(job: PretrainJob, workers: Workers, *, max_failures: int) -> Manifest:
    """Train the members that are not there yet; returns what the manifest says of the pool."""
    members = range(job.config.networks)
    missing = {i: (job, i) for i in members if not member_path(job.directory, i).exists()}
    progress = Progress("pretrain", len(missing), unit="networks")
    peak = 0
    for done, (_, result) in enumerate(
        run_each(pretrain_member, missing, workers, max_retries=max_failures), start=1
    ):
        peak = max(peak, result["peak_rss_bytes"])
        progress.update(done, accuracy=result["val_accuracy"])
    return {"networks": job.config.networks, "peak_rss_bytes": peak}


def pretrain_member(task: tuple[PretrainJob, int], threads: int, device: str) -> dict[str, Any]:
    """Train one member, as a Ray task. The threads make no difference to the result."""
    torch.set_num_threads(1)  # of an operation: parts of a batch are what threads share
    job, member = task
    if member_path(job.directory, member).exists():  # the worker died after it had written it
        return _result(read_rows(metrics_path(job.directory, member))[-1])
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
    """Train a member, or go on from its last checkpoint, and write its files; returns its accuracy
    on val and the memory that it took.
    """
    model = new_network(job.model, spec, keyed_seed(job.seed, "pool_network", member))
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    kept_epochs = job.config.snapshot_epochs[1:-1]  # the others are in the member's own file
    metrics = metrics_path(job.directory, member)
    checkpoint = job.directory / f"training-{member:03d}.safetensors"
    state = load(checkpoint.read_bytes()) if checkpoint.exists() else None
    done = 0 if state is None else int(state["epoch"])
    rows = [row for row in read_rows(metrics) if row["epoch"] < done]
    saved_at = time.monotonic()
    epochs, name = job.config.training.epochs, f"pretrain network {member}"
    progress = Progress(name, epochs, unit="epochs", done=done, interval=PROGRESS_S)

    def report(epoch: EpochReport) -> None:
        row = {"stage": "pretrain", "network": member, "epoch": epoch.epoch, "time": time.time()}
        row |= {"pretrain/loss": epoch.loss, "pretrain/accuracy": epoch.accuracy}
        rows.append(row)
        if epoch.epoch + 1 in kept_epochs:
            path = snapshot_path(job.directory, member, epoch.epoch + 1)
            write_atomic(path, save(_contiguous(model.state_dict())))
        if on_epoch is not None:
            on_epoch(epoch)

    def save_checkpoint(state: State) -> None:
        nonlocal saved_at
        if time.monotonic() - saved_at < job.checkpoint_every_s:
            return
        append_rows(metrics, rows, fresh=True)
        write_atomic(checkpoint, save(_contiguous(state)))
        saved_at = time.monotonic()

    seed = keyed_seed(job.seed, "pool_training", member)
    train(
        model,
        images["train"],
        spec,
        job.config.training,
        seed=seed,
        device=device,
        report=report,
        save=save_checkpoint,
        resume=state,
        threads=threads,
        on_batch=lambda epochs_done: progress.update(round(epochs_done, 2)),
    )
    tested = accuracy(model, images["val"], spec, device=device, threads=threads)
    rows[-1]["pretrain/val_accuracy"] = tested
    rows[-1]["peak_rss_bytes"] = peak_rss_bytes()
    append_rows(metrics, rows, fresh=True)
    write_atomic(member_path(job.directory, member), pack_member(initial, model.cpu().state_dict()))
    checkpoint.unlink(missing_ok=True)
    return _result(rows[-1])


def _result(last: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "val_accuracy": last["pretrain/val_accuracy"],
        "peak_rss_bytes": last["peak_rss_bytes"],
    }


def new_network(model: ModelConfig, spec: ImageSpec, seed: int) -> Any:
    """A network of this architecture for these images, its initial weights from the seed."""
    return build_model(
        model,
        num_classes=spec.num_classes,
        channels=spec.channels,
        image_size=spec.image_size,
        seed=seed,
    )


def metrics_path(directory: UPath, member: int) -> UPath:
    """The rows of the training of one network of the pool, an epoch each."""
    return directory / f"metrics-{member:03d}.jsonl"


def member_path(directory: UPath, member: int) -> UPath:
    """The file of one network of the pool."""
    return directory / f"network-{member:03d}.safetensors"


def snapshot_path(directory: UPath, member: int, epoch: int) -> UPath:
    """The file of a network's weights after so many epochs, neither its first nor its last."""
    return directory / f"snapshot-{member:03d}-{epoch:04d}.safetensors"


def _contiguous(state: Mapping[str, Tensor]) -> State:
    return {name: value.contiguous() for name, value in state.items()}


def pack_member(initial: State, trained: State) -> bytes:
    """Both states of a network as one safetensors file."""
    return save(
        {
            f"{kind}/{name}": value.contiguous()
            for kind, state in (("initial", initial), ("trained", trained))
            for name, value in state.items()
        }
    )


def load_member(directory: UPath, member: int) -> tuple[State, State]:
    """The (initial, trained) states of one network of the pool."""
    tensors = load(member_path(directory, member).read_bytes())
    initial, trained = (
        {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(kind)}
        for kind in ("initial", "trained")
    )
    return initial, trained


def load_trajectory(directory: UPath, member: int, epochs: Sequence[int]) -> list[State]:
    """The states of one network of the pool after these epochs, from 0 to the last."""
    initial, trained = load_member(directory, member)
    between = (snapshot_path(directory, member, epoch).read_bytes() for epoch in epochs[1:-1])
    return [initial, *map(load, between), trained]
