"""Stage audit: how faithful the distilled set is to the whole real set, beside sets that one knows.

A Ray Data pass over the shards adds up what adds: CF statistics of every class, moments of
features, and for every image of every set the nearest real one. Shards are summed in their order,
each by one thread, so a result does not depend on how many workers made the pass.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from upath import UPath

from ncfm import load
from ncfm.baselines import random_set
from ncfm.discrepancy import CFSums, cf_from_sums, cf_sums
from ncfm.fidelity import (
    Moments,
    Nearest,
    cf_distance,
    frechet_distance,
    intrinsic_dimension,
    label_sharpness,
    nearest,
    neighbourhood,
)
from ncfm.formation import decode_tiles
from ncfm.images import ImageSource, InMemoryImages, epoch_order, to_unit
from ncfm.models import ModelConfig
from ncfm.seeding import keyed_generator
from ncfm.synthetic import SyntheticSet
from pipeline.audit_config import AuditConfig
from pipeline.data.batches import ClassBatches
from pipeline.data.store import Store
from pipeline.pretrain import load_member, new_network
from pipeline.preview import png, to_pixels
from pipeline.shard import quieten_ray_data
from pipeline.stage import Manifest, peak_rss_bytes, write_atomic
from pipeline.workers import Workers

AUDIT_VERSION = 2
"""To be raised when this stage's results change; see tests/integration/test_golden.py."""
SETS = ("distilled", "random", "random_same_factor", "held_out", "noise")
BATCH = 256  # images through an extractor at a time
PIXELS = 32  # px to which images are shrunk before pixels are compared
PAIRS = 8  # images shown beside their nearest real ones

# Measure -> which way is better; None: neither, to be compared with the real value.
MEASURES: dict[str, str | None] = {
    "ncfd": "lower",
    "amplitude": "lower",
    "phase": "lower",
    "frechet": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
    "intrinsic_dimension": None,
    "label_sharpness": None,
    "nearest_real": None,
    "nearest_real_least": None,
}


@dataclass(frozen=True, kw_only=True)
class AuditJob:
    """What is compared, and by which extractors."""

    store: Store
    distilled: UPath
    extractors: tuple[tuple[ModelConfig, UPath], ...]  # network, the pool that holds it
    config: AuditConfig
    ipc: int
    factor: int
    seed: int

    def sets(self) -> Iterator[tuple[str, int, ImageSource]]:
        """(set, draw, images): the distilled set, and draws of as many images as it decodes to."""
        synthetic = load(self.distilled)
        yield "distilled", 0, synthetic.source()
        spec, each = self.store.spec, self.ipc * self.factor**2
        classes = range(spec.num_classes)
        train = ClassBatches(self.store, classes, self.seed)
        val = ClassBatches(self.store, classes, self.seed, split="val")
        counts = self.store.counts("val")
        for draw in range(self.config.draws):
            random = [train.batch(c, draw, each, purpose="audit_random") for c in classes]
            yield "random", draw, InMemoryImages(*_labelled(random))
            packed = [
                random_set(images, self.ipc, seed=self.seed, class_index=c, factor=self.factor)
                for c, images in enumerate(random)
            ]
            stored, labels = _labelled(packed)
            same_factor = SyntheticSet(stored, labels, self.factor, spec)
            yield "random_same_factor", draw, same_factor.source()
            real = [
                val.batch(c, draw, each, purpose="audit_held_out")
                if counts[c]
                else torch.empty(0, spec.channels, spec.image_size, spec.image_size).byte()
                for c in classes
            ]
            yield "held_out", draw, InMemoryImages(*_labelled(real))
            generator = keyed_generator(self.seed, "audit_noise", draw)
            noise = torch.rand((each, *synthetic.images.shape[1:]), generator=generator)
            yield "noise", draw, SameForAll(noise, spec.num_classes)


@dataclass(frozen=True)
class SameForAll:
    """An ImageSource of the same images for every class, kept once."""

    images: Tensor
    classes: int

    def __len__(self) -> int:
        return self.classes * len(self.images)

    def epoch(
        self, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ImageSource.epoch."""
        for index in epoch_order(len(self), generator).split(batch_size):
            yield self.images[index % len(self.images)], index // len(self.images)


def _labelled(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images class by class, and their labels."""
    labels = [torch.full((len(part),), c) for c, part in enumerate(images)]
    return torch.cat(list(images)), torch.cat(labels)


class Extractors:
    """The networks of an audit, with their frequencies and projections."""

    def __init__(self, job: AuditJob, device: str) -> None:
        self.job, self.spec, self.device = job, job.store.spec, device
        self.networks, self.frequencies, self.projections = [], [], []
        for place, (model, pool) in enumerate(job.extractors):
            network = new_network(model, self.spec, seed=0)  # its weights are the pool's
            network.load_state_dict(load_member(pool, 0)[1])
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
        """What the extractor of that place sees: CF sums of each class, (C, K) and (C, 1) float64,
        and projected features (M, d).
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
                found = cf_sums(x[(labels == c).to(x.device)], t)
                for name, value in found._asdict().items():
                    sums[name][c] += value.double().cpu()
        width = self.projections[place].shape[1]
        return {**sums, "features": torch.cat([torch.empty(0, width), *projected])}


def shrunk(images: Tensor) -> Tensor:
    """Pixels (M, P) in [0, 1] of images shrunk to at most 32 px, divided by sqrt(P): a distance is
    then the root mean square difference of the pixels.
    """
    size = min(PIXELS, images.shape[-1])
    pixels = F.interpolate(to_unit(images), size=(size, size), mode="area").flatten(1)
    scaled: Tensor = pixels.double() / pixels.shape[1] ** 0.5
    return scaled


def measure_sets(job: AuditJob, device: str) -> bytes:
    """All sets as the extractors see them: safetensors of "<set>/<draw>/<extractor>/<what>" and
    "<set>/<draw>/pixels", "labels". Runs inside a Ray task.
    """
    extractors, tensors = Extractors(job, device), {}
    for name, draw, source in job.sets():
        parts = [(shrunk(images), labels) for images, labels in source.epoch(BATCH, None)]
        tensors[f"{name}/{draw}/pixels"] = torch.cat([pixels for pixels, _ in parts])
        tensors[f"{name}/{draw}/labels"] = torch.cat([labels for _, labels in parts])
        for place in range(len(job.extractors)):
            found = extractors.measure(source, place)
            tensors |= {f"{name}/{draw}/{place}/{key}": value for key, value in found.items()}
    return save_tensors(tensors)


def unpack(data: bytes) -> dict[str, Tensor]:
    """The tensors of safetensors bytes, each in memory of its own: where a tensor lies decides how
    its sums are rounded.
    """
    return {key: value.clone() for key, value in load_tensors(data).items()}


class Piece(NamedTuple):
    """The images of one shard: a part of its class."""

    label: int
    start: int
    size: int

    def images(self, store: Store) -> Tensor:
        """(N, C, H, W) uint8, in memory when they are read."""
        whole = store.images("train", [self.label])[self.label]
        return whole[self.start : self.start + self.size]


def train_pieces(store: Store) -> list[Piece]:
    """The train images, shard by shard."""
    pieces, ends = list[Piece](), [0] * store.spec.num_classes
    for entry in store.manifest["splits"]["train"]["shards"]:
        label, count = entry["class"], entry["count"]
        pieces.append(Piece(label, ends[label], count))
        ends[label] += count
    return pieces


class ShardPass:
    """Ray Data's worker: what one shard of real images adds."""

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
        """{"shard": [place]} -> {"shard", "data": safetensors}."""
        (place,) = batch["shard"].tolist()
        piece, start = self.pieces[place], self.starts[place]
        images = piece.images(self.job.store)
        labels = torch.full((piece.size,), piece.label)
        sampled = self.sampled[start : start + piece.size]
        tensors: dict[str, Tensor] = {}
        for e in range(len(self.job.extractors)):
            found = self.extractors.measure(InMemoryImages(images, labels), e)
            features = found.pop("features")
            moments = Moments.of(features)
            tensors |= {f"{e}/{key}": value[piece.label] for key, value in found.items()}
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
    """What the pass over the real images found."""

    cf: list[list[CFSums]]  # of each extractor, of each class
    moments: list[Moments]  # of each extractor
    samples: list[Tensor]  # of each extractor: projected features (S, d)
    pixels: Tensor  # (S, P), of the same images
    labels: Tensor  # (S,)
    nearest: dict[str, Nearest]  # of each "<set>/<draw>/pixels"


def pass_over_shards(job: AuditJob, sets: UPath, workers: Workers) -> list[dict[str, Tensor]]:
    """One Ray Data pass over all real training images; what each shard adds, in their order."""
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
    found = {int(row["shard"]): unpack(row["data"]) for row in rows.iter_rows()}
    return [found[place] for place in range(count)]


def real_side(job: AuditJob, parts: Sequence[Mapping[str, Tensor]]) -> RealSide:
    """The parts of all shards, added up in their order."""
    pieces = train_pieces(job.store)
    count = len(job.extractors)
    zero = torch.zeros((), dtype=torch.float64)
    cf = [[CFSums(zero, zero, zero)] * job.store.spec.num_classes for _ in range(count)]
    moments: list[Moments] = []
    for e in range(count):
        total = Moments(0, zero, zero)
        for piece, part in zip(pieces, parts, strict=True):
            mine = CFSums(part[f"{e}/cos"], part[f"{e}/sin"], part[f"{e}/size"])
            cf[e][piece.label] = cf[e][piece.label] + mine
            total = total.plus(Moments(piece.size, part[f"{e}/total"], part[f"{e}/products"]))
        moments.append(total)
    near: dict[str, Nearest] = {}
    for part in parts:
        for key in (k.removesuffix("/distance") for k in part if k.endswith("/distance")):
            mine_near = Nearest(part[f"{key}/distance"], part[f"{key}/place"])
            near[key] = near[key].less(mine_near) if key in near else mine_near
    return RealSide(
        cf=cf,
        moments=moments,
        samples=[torch.cat([part[f"{e}/sample"] for part in parts]) for e in range(count)],
        pixels=torch.cat([part["sample_pixels"] for part in parts]),
        labels=torch.cat([part["sample_labels"] for part in parts]),
        nearest=near,
    )


def audit(job: AuditJob, workers: Workers, *, directory: UPath) -> Manifest:
    """The content of audit.json, and nearest.png in the directory."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if workers.use_gpu else 0)(measure_sets)
    path = directory / "sets.safetensors"  # for workers that are started again, too
    write_atomic(path, ray.get(task.remote(job, workers.device)))
    real = real_side(job, pass_over_shards(job, path, workers))
    content = summarise(job, unpack(path.read_bytes()), real)
    path.unlink()
    _write_pairs(job, real.nearest["distilled/0/pixels"], directory)
    return content


def summarise(job: AuditJob, sets: Mapping[str, Tensor], real: RealSide) -> Manifest:
    """{"rows", "per_class_ncfd", "images", "real_images", "sampled"} from what `measure_sets` found
    in the sets and the pass in the real images.
    """
    keys = [key.removesuffix("/pixels") for key in sets if key.endswith("/pixels")]
    values: dict[tuple[str, str, str], list[float]] = {}  # (measure, extractor, set) -> draws
    per_class: dict[str, dict[str, Tensor]] = {}
    for key in sorted(keys):
        name = key.partition("/")[0]
        mine = {k.removeprefix(f"{key}/"): v for k, v in sets.items() if k.startswith(f"{key}/")}
        for measure, value in _pixel_measures(mine, real.nearest.get(f"{key}/pixels")).items():
            values.setdefault((measure, "", name), []).append(value)
        for e, (model, _) in enumerate(job.extractors):
            found, by_class = _feature_measures(mine, real, e, job.config.neighbours)
            for measure, value in found.items():
                values.setdefault((measure, model.name, name), []).append(value)
            classes = per_class.setdefault(model.name, {})
            classes[name] = classes.get(name, torch.zeros(())) + by_class / (
                1 if name == "distilled" else job.config.draws
            )
    for measure, value in _pixel_measures(
        {"pixels": real.pixels, "labels": real.labels}, None
    ).items():
        values[(measure, "", "real")] = [value]
    return {
        "rows": [
            _row(measure, extractor, name, drawn)
            for measure in MEASURES
            for (m, extractor, name), drawn in values.items()
            if m == measure
        ],
        "per_class_ncfd": {
            extractor: {name: value.tolist() for name, value in found.items()}
            for extractor, found in per_class.items()
        },
        "images": {key.partition("/")[0]: len(sets[f"{key}/labels"]) for key in sorted(keys)},
        "real_images": sum(job.store.counts("train")),
        "sampled": len(real.labels),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _row(measure: str, extractor: str, name: str, drawn: Sequence[float]) -> dict[str, Any]:
    values = torch.tensor(drawn, dtype=torch.float64)
    finite = bool(values.isfinite().all())
    return {
        "measure": measure,
        "better": MEASURES[measure],
        "extractor": extractor,
        "set": name,
        "value": float(values.mean()) if finite else None,
        "std": float(values.std()) if finite and len(values) > 1 else None,
        "draws": len(values),
    }


def _pixel_measures(mine: Mapping[str, Tensor], near: Nearest | None) -> dict[str, float]:
    found = {
        "intrinsic_dimension": intrinsic_dimension(mine["pixels"]),
        "label_sharpness": label_sharpness(mine["pixels"], mine["labels"]),
    }
    if near is not None:
        found["nearest_real"] = float(near.distance.mean())
        found["nearest_real_least"] = float(near.distance.min())
    return found


def _feature_measures(
    mine: Mapping[str, Tensor], real: RealSide, e: int, k: int
) -> tuple[dict[str, float], Tensor]:
    """The measures, and the NCFD of each class (C,), nan where a set has no image of it."""
    by_class = []
    for c, whole in enumerate(real.cf[e]):
        sums = CFSums(mine[f"{e}/cos"][c], mine[f"{e}/sin"][c], mine[f"{e}/size"][c])
        if float(sums.size) and float(whole.size):
            by_class.append(cf_distance(cf_from_sums(whole), cf_from_sums(sums)))
        else:
            by_class.append(cf_distance(*[cf_from_sums(whole)] * 2)._replace(ncfd=float("nan")))
    known = torch.tensor([list(d) for d in by_class], dtype=torch.float64)
    mean = known[~known[:, 0].isnan()].mean(0).tolist()
    features = mine[f"{e}/features"].double()
    found = dict(zip(("ncfd", "amplitude", "phase"), mean, strict=True))
    if len(features) > 1 and len(real.samples[e]) > 1:
        found["frechet"] = frechet_distance(real.moments[e], Moments.of(features))
        found |= neighbourhood(real.samples[e].double(), features, k)._asdict()
    return found, known[:, 0]


def _write_pairs(job: AuditJob, near: Nearest, directory: UPath) -> None:
    """nearest.png: the synthetic images that are nearest to a real one, above that one."""
    synthetic = load(job.distilled)
    order = near.distance.argsort(stable=True)[:PAIRS]
    images = decode_tiles(synthetic.images, synthetic.factor, order)
    pieces = train_pieces(job.store)
    starts = list(accumulate((piece.size for piece in pieces), initial=0))
    columns = []
    for image, m in zip(images, order.tolist(), strict=True):
        index = int(near.place[m])
        place = next(p for p in range(len(pieces)) if index < starts[p + 1])
        real = to_unit(pieces[place].images(job.store)[index - starts[place]])
        columns.append(torch.cat([image, real], dim=1))
    write_atomic(directory / "nearest.png", png(to_pixels(torch.cat(columns, dim=2))))
    distances = near.distance[order].tolist()
    write_atomic(directory / "nearest.json", json.dumps({"distance": distances}))


def audit_table(content: Mapping[str, Any]) -> str:
    """The measures as text: a row each, a column a set."""
    rows = content["rows"]
    names = ["real", *SETS]
    lines = [["measure", "extractor", "better", *names]]
    for key in dict.fromkeys((row["measure"], row["extractor"]) for row in rows):
        mine = {row["set"]: row for row in rows if (row["measure"], row["extractor"]) == key}
        values = [
            "" if name not in mine or mine[name]["value"] is None else f"{mine[name]['value']:.4g}"
            for name in names
        ]
        lines.append([*key, MEASURES[key[0]] or "", *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
