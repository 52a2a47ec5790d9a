"""Audit statistics of the real images, in one Ray Data pass.

CF sums of each class, feature moments, and the nearest real image of every image of every set.
Shards are summed in order, each by one thread: the result does not depend on the number of workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor
from upath import UPath

from ncfm.discrepancy import CFSums
from ncfm.fidelity import Moments, Nearest, nearest
from ncfm.images import InMemoryImages
from ncfm.seeding import keyed_generator
from pipeline.data.store import Store
from pipeline.runtime.workers import Workers
from pipeline.stages.audit_sets import AuditJob, Extractors, shrunk, unpack
from pipeline.stages.shard import quieten_ray_data


class Piece(NamedTuple):
    """The images of one shard: a slice of its class."""

    label: int
    start: int
    size: int

    def images(self, store: Store) -> Tensor:
        """(N, C, H, W) uint8, a view of the memory map."""
        class_images = store.images("train", [self.label])[self.label]
        return class_images[self.start : self.start + self.size]


def train_pieces(store: Store) -> list[Piece]:
    """The training images, one piece per shard."""
    pieces, ends = list[Piece](), [0] * store.spec.num_classes
    for entry in store.manifest["splits"]["train"]["shards"]:
        label, count = entry["class"], entry["count"]
        pieces.append(Piece(label, ends[label], count))
        ends[label] += count
    return pieces


class ShardPass:
    """Ray Data actor: the contribution of one shard of real images."""

    def __init__(self, job: AuditJob, sets: UPath, device: str) -> None:
        self.job, self.extractors = job, Extractors(job, device)
        tensors = unpack(sets.read_bytes())
        self.pixels = {key: value for key, value in tensors.items() if key.endswith("/pixels")}
        self.pieces = train_pieces(job.store)
        self.starts = list(accumulate((piece.size for piece in self.pieces), initial=0))
        generator = keyed_generator(job.seed, "audit_samples")
        chosen = torch.randperm(self.starts[-1], generator=generator)[: job.config.samples]
        self.sampled = torch.zeros(self.starts[-1], dtype=torch.bool)
        self.sampled[chosen] = True

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """{"shard": [index]} -> {"shard", "data": safetensors}."""
        (place,) = batch["shard"].tolist()
        piece, start = self.pieces[place], self.starts[place]
        images = piece.images(self.job.store)
        labels = torch.full((piece.size,), piece.label)
        sampled = self.sampled[start : start + piece.size]
        tensors: dict[str, Tensor] = {}
        for e in range(len(self.job.extractors)):
            statistics = self.extractors.measure(InMemoryImages(images, labels), e)
            features = statistics.pop("features")
            moments = Moments.of(features)
            tensors |= {f"{e}/{key}": value[piece.label] for key, value in statistics.items()}
            tensors[f"{e}/total"], tensors[f"{e}/products"] = moments.total, moments.products
            tensors[f"{e}/sample"] = features[sampled]
        real = shrunk(images)
        tensors["sample_pixels"], tensors["sample_labels"] = real[sampled], labels[sampled]
        for key, pixels in self.pixels.items():
            if len(pixels):
                near = nearest(pixels, real, start)
                tensors[f"{key}/distance"], tensors[f"{key}/place"] = near
        data = np.frombuffer(save_tensors(tensors), dtype=np.uint8)
        return {"shard": [place], "data": [data.tobytes()]}


@dataclass(frozen=True)
class RealSide:
    """Statistics of the real images."""

    cf: list[list[CFSums]]  # [extractor][class]
    moments: list[Moments]  # [extractor]
    samples: list[Tensor]  # [extractor]: projected features (S, d)
    pixels: Tensor  # (S, P), of the same images
    labels: Tensor  # (S,)
    nearest: dict[str, Nearest]  # by "<set>/<draw>/pixels"


def pass_over_shards(job: AuditJob, sets: UPath, workers: Workers) -> list[dict[str, Tensor]]:
    """The contribution of each shard, in order, from one Ray Data pass over the training images."""
    import ray

    quieten_ray_data()
    count = len(train_pieces(job.store))
    rows = ray.data.from_items([{"shard": place} for place in range(count)]).map_batches(
        ShardPass,
        fn_constructor_kwargs={"job": job, "sets": sets, "device": workers.device},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers.count, count)),
        num_gpus=1 if workers.use_gpu else 0,
    )
    parts = {int(row["shard"]): unpack(row["data"]) for row in rows.iter_rows()}
    return [parts[place] for place in range(count)]


def real_side(job: AuditJob, parts: Sequence[Mapping[str, Tensor]]) -> RealSide:
    """Sum the contributions of all shards, in order."""
    pieces = train_pieces(job.store)
    count = len(job.extractors)
    zero = torch.zeros((), dtype=torch.float64)
    cf = [[CFSums(zero, zero, zero)] * job.store.spec.num_classes for _ in range(count)]
    moments: list[Moments] = []
    for e in range(count):
        total = Moments(0, zero, zero)
        for piece, part in zip(pieces, parts, strict=True):
            shard_cf = CFSums(part[f"{e}/cos"], part[f"{e}/sin"], part[f"{e}/size"])
            cf[e][piece.label] = cf[e][piece.label] + shard_cf
            total = total.plus(Moments(piece.size, part[f"{e}/total"], part[f"{e}/products"]))
        moments.append(total)
    near: dict[str, Nearest] = {}
    for part in parts:
        for key in (k.removesuffix("/distance") for k in part if k.endswith("/distance")):
            candidate = Nearest(part[f"{key}/distance"], part[f"{key}/place"])
            near[key] = near[key].less(candidate) if key in near else candidate
    return RealSide(
        cf=cf,
        moments=moments,
        samples=[torch.cat([part[f"{e}/sample"] for part in parts]) for e in range(count)],
        pixels=torch.cat([part["sample_pixels"] for part in parts]),
        labels=torch.cat([part["sample_labels"] for part in parts]),
        nearest=near,
    )
