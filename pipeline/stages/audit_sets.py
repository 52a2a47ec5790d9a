"""Sets of an audit: the distilled set and the reference sets, and their measurements."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from upath import UPath

from ncfm import load
from ncfm.baselines import random_set
from ncfm.discrepancy import cf_sums
from ncfm.images import ImageSource, InMemoryImages, epoch_order, to_unit
from ncfm.seeding import keyed_generator
from ncfm.synthetic import SyntheticSet
from pipeline.data.batches import ClassBatches
from pipeline.data.pool import Pool
from pipeline.data.store import Store

if TYPE_CHECKING:
    from pipeline.stages.audit import AuditConfig

BATCH = 256  # images per forward pass
PIXELS = 32  # px; images are shrunk to it before pixels are compared


@dataclass(frozen=True, kw_only=True)
class AuditJob:
    """Inputs of an audit: the sets' sources and the extractors."""

    store: Store
    distilled: UPath
    extractors: tuple[Pool, ...]  # the first network of each
    config: "AuditConfig"
    ipc: tuple[int, ...]  # stored images of each class
    factor: int
    seed: int

    def sets(self) -> Iterator[tuple[str, int, ImageSource]]:
        """(set, draw, images): the distilled set, and reference sets of its decoded size."""
        synthetic = load(self.distilled)
        yield "distilled", 0, synthetic.source()
        spec, each = self.store.spec, [n * self.factor**2 for n in self.ipc]
        classes = range(spec.num_classes)
        train = ClassBatches(self.store, classes, self.seed)
        val = ClassBatches(self.store, classes, self.seed, split="val")
        counts = self.store.counts("val")
        for draw in range(self.config.draws):
            random = [train.batch(c, draw, each[c], purpose="audit_random") for c in classes]
            yield "random", draw, InMemoryImages(*_labelled(random))
            packed = [
                random_set(images, self.ipc[c], seed=self.seed, class_index=c, factor=self.factor)
                for c, images in enumerate(random)
            ]
            stored, labels = _labelled(packed)
            same_factor = SyntheticSet(stored, labels, self.factor, spec)
            yield "random_same_factor", draw, same_factor.source()
            real = [
                val.batch(c, draw, each[c], purpose="audit_held_out")
                if counts[c]
                else torch.empty(0, spec.channels, spec.image_size, spec.image_size).byte()
                for c in classes
            ]
            yield "held_out", draw, InMemoryImages(*_labelled(real))
            generator = keyed_generator(self.seed, "audit_noise", draw)
            noise = torch.rand((max(each), *synthetic.images.shape[1:]), generator=generator)
            yield "noise", draw, SameForAll(noise, each)


@dataclass(frozen=True)
class SameForAll:
    """An ImageSource of the same images for every class, stored once: the first so many."""

    images: Tensor
    counts: Sequence[int]  # of each class

    def __len__(self) -> int:
        return sum(self.counts)

    def epoch(
        self, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ImageSource.epoch."""
        counts = torch.tensor(self.counts)
        ends = counts.cumsum(0)
        for index in epoch_order(len(self), generator).split(batch_size):
            labels = torch.searchsorted(ends, index, right=True)
            yield self.images[index - (ends - counts)[labels]], labels


def _labelled(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate the images of each class, with labels."""
    labels = [torch.full((len(part),), c) for c, part in enumerate(images)]
    return torch.cat(list(images)), torch.cat(labels)


class Extractors:
    """The audit's networks, with their frequencies and projections."""

    def __init__(self, job: AuditJob, device: str) -> None:
        self.job, self.spec, self.device = job, job.store.spec, device
        self.networks, self.frequencies, self.projections = [], [], []
        for place, pool in enumerate(job.extractors):
            network = pool.trained(0, self.spec)
            self.networks.append(network.to(self.device).eval())
            dim = network.num_features
            t = torch.randn(
                job.config.num_freqs, dim, generator=keyed_generator(job.seed, "audit_t", place)
            )
            directions = torch.randn(
                dim,
                min(dim, job.config.feature_dim),
                generator=keyed_generator(job.seed, "audit_projection", place),
            )
            self.frequencies.append(t.to(self.device))
            self.projections.append(torch.linalg.qr(directions).Q.to(self.device))

    @torch.no_grad()
    def measure(self, source: ImageSource, place: int) -> dict[str, Tensor]:
        """Measurements by extractor `place`: CF sums of each class, (C, K) and (C, 1) float64, and
        projected features (M, d).
        """
        classes, t = self.spec.num_classes, self.frequencies[place]
        sums = {
            "cos": torch.zeros(classes, len(t), dtype=torch.float64),
            "sin": torch.zeros(classes, len(t), dtype=torch.float64),
            "size": torch.zeros(classes, 1, dtype=torch.float64),
        }
        projected = []
        for images, labels in source.epoch(BATCH, None):
            if not len(images):
                continue
            part = to_unit(images.to(self.device))
            x = F.normalize(self.networks[place].features(self.spec.normalize(part)), dim=1)
            projected.append((x @ self.projections[place]).cpu())
            for c in labels.unique().tolist():
                class_sums = cf_sums(x[(labels == c).to(x.device)], t)
                for name, value in class_sums._asdict().items():
                    sums[name][c] += value.double().cpu()
        width = self.projections[place].shape[1]
        return {**sums, "features": torch.cat([torch.empty(0, width), *projected])}


def shrunk(images: Tensor) -> Tensor:
    """Pixels (M, P) in [0, 1] of images shrunk to at most 32 px, divided by sqrt(P), so that
    Euclidean distances are root mean square pixel differences.
    """
    size = min(PIXELS, images.shape[-1])
    pixels = F.interpolate(to_unit(images), size=(size, size), mode="area").flatten(1)
    scaled: Tensor = pixels.double() / pixels.shape[1] ** 0.5
    return scaled


def measure_sets(job: AuditJob, device: str) -> bytes:
    """Measure all sets: safetensors of "<set>/<draw>/<extractor>/<statistic>" and
    "<set>/<draw>/pixels", "labels". Runs inside a Ray task.
    """
    extractors, tensors = Extractors(job, device), {}
    for name, draw, source in job.sets():
        parts = [(shrunk(images), labels) for images, labels in source.epoch(BATCH, None)]
        tensors[f"{name}/{draw}/pixels"] = torch.cat([pixels for pixels, _ in parts])
        tensors[f"{name}/{draw}/labels"] = torch.cat([labels for _, labels in parts])
        for place in range(len(job.extractors)):
            statistics = extractors.measure(source, place)
            tensors |= {f"{name}/{draw}/{place}/{key}": v for key, v in statistics.items()}
    return save_tensors(tensors)


def unpack(data: bytes) -> dict[str, Tensor]:
    """Load safetensors bytes, copying each tensor: its alignment affects how sums are rounded."""
    return {key: value.clone() for key, value in load_tensors(data).items()}
