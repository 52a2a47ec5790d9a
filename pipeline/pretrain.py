"""Stage pretrain: Ray Train trains the pool of extractors, its members divided over the workers.

Member i depends on (seed, i) alone. Each is one file, written when it is done: an interrupted stage
goes on with the members that are missing.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor
from upath import UPath

from ncfm.evaluate import accuracy
from ncfm.images import ImageSpec
from ncfm.models import ModelConfig, build_model
from ncfm.seeding import keyed_seed
from ncfm.train import EpochReport, train
from pipeline.config import PretrainConfig
from pipeline.data.batches import StoredImages
from pipeline.data.store import Store
from pipeline.progress import Progress, append_rows
from pipeline.stage import Manifest, peak_rss_bytes, write_atomic
from pipeline.workers import Workers, current_context, fit

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

PRETRAIN_VERSION = 2
"""To be raised when this stage's results change; see tests/unit/test_golden.py."""


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """What a worker needs to train its members of the pool."""

    store: Store
    directory: UPath
    model: ModelConfig
    config: PretrainConfig
    seed: int


def pretrain(job: PretrainJob, workers: Workers, *, storage: UPath, max_failures: int) -> Manifest:
    """Train the members that are not there yet; returns what the manifest says of the pool."""
    missing = [i for i in range(job.config.networks) if not member_path(job.directory, i).exists()]
    if missing:
        fit(
            pretrain_loop,
            {"job": job, "members": missing},
            workers,
            name=f"pretrain-{job.directory.name}",
            storage=storage,
            max_failures=max_failures,
        )
    return {"networks": job.config.networks}


def pretrain_loop(arguments: dict[str, Any]) -> None:
    """Train this worker's share of `members`."""
    job: PretrainJob = arguments["job"]
    context = current_context(arguments["device"])
    spec = job.store.spec
    train_images, val_images = (StoredImages(job.store, split) for split in ("train", "val"))
    mine = arguments["members"][context.rank :: context.world_size]
    progress = Progress("pretrain", len(mine) * job.config.training.epochs, unit="epochs")
    for done, member in enumerate(mine):
        if member_path(
            job.directory, member
        ).exists():  # trained before this worker was started again
            continue
        model = new_network(job.model, spec, keyed_seed(job.seed, "pool_network", member))
        initial = {name: value.clone() for name, value in model.state_dict().items()}
        rows: list[dict[str, Any]] = []

        def report(
            epoch: EpochReport,
            done: int = done,
            member: int = member,
            rows: list[dict[str, Any]] = rows,
        ) -> None:
            row = {"pretrain/loss": epoch.loss, "pretrain/accuracy": epoch.accuracy}
            rows.append(
                {
                    "stage": "pretrain",
                    "network": member,
                    "epoch": epoch.epoch,
                    "time": time.time(),
                    **row,
                }
            )
            if context.rank == 0:
                progress.update(
                    done * job.config.training.epochs + epoch.epoch + 1,
                    network=member,
                    loss=epoch.loss,
                )

        seed = keyed_seed(job.seed, "pool_training", member)
        train(
            model,
            train_images,
            spec,
            job.config.training,
            seed=seed,
            device=context.device,
            report=report,
        )
        rows[-1]["pretrain/val_accuracy"] = accuracy(model, val_images, spec, device=context.device)
        rows[-1]["peak_rss_bytes"] = peak_rss_bytes()
        append_rows(job.directory / f"metrics-{member:03d}.jsonl", rows, fresh=True)
        write_atomic(
            member_path(job.directory, member), pack_member(initial, model.cpu().state_dict())
        )


def new_network(model: ModelConfig, spec: ImageSpec, seed: int) -> Any:
    """A network of this architecture for these images, its initial weights from the seed."""
    return build_model(
        model,
        num_classes=spec.num_classes,
        channels=spec.channels,
        image_size=spec.image_size,
        seed=seed,
    )


def member_path(directory: UPath, member: int) -> UPath:
    """The file of one network of the pool."""
    return directory / f"network-{member:03d}.safetensors"


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


def load_members(directory: UPath, count: int) -> list[tuple[State, State]]:
    """The (initial, trained) states of the pool's first networks."""
    return [load_member(directory, member) for member in range(count)]
