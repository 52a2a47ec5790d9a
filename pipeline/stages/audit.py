"""Stage audit: fidelity of the distilled set to the real set, beside reference sets."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from upath import UPath

from ncfm import load
from ncfm.allocation import shared_or_each
from ncfm.discrepancy import CFSums, cf_from_sums
from ncfm.fidelity import (
    Moments,
    Nearest,
    cf_distance,
    frechet_distance,
    intrinsic_dimension,
    label_sharpness,
    neighbourhood,
)
from ncfm.formation import decode_tiles
from ncfm.images import to_unit
from ncfm.models import ModelConfig
from ncfm.seeding import keyed_seed
from pipeline.graph import Run, Stage, log
from pipeline.observe.preview import png, to_pixels
from pipeline.runtime.files import Manifest, write_atomic
from pipeline.runtime.identity import fingerprint, peak_rss_bytes
from pipeline.runtime.workers import Workers
from pipeline.stages.audit_pass import RealSide, pass_over_shards, real_side, train_pieces
from pipeline.stages.audit_sets import AuditJob, measure_sets, unpack
from pipeline.stages.distill import Distill
from pipeline.stages.network_stage import named_model
from pipeline.stages.pretrain import Pretrain
from pipeline.stages.shard import Shard

AUDIT_VERSION = 2
"""Raise when this stage's results change; see tests/integration/test_golden.py."""
SETS = ("distilled", "random", "random_same_factor", "held_out", "noise")
PAIRS = 8  # images shown with their nearest real ones

# Measure -> which direction is better; None: compare with the value of the real set.
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
class AuditConfig:
    """Comparison of the distilled set with the real one."""

    networks: tuple[str, ...] = ()
    """Extractors, named as for model.name, trained on the real images from a seed that distillation
    does not use; empty: the run's own model."""
    num_freqs: int = 1024
    """Frequencies t ~ N(0, I) of the characteristic functions of normalised features."""
    feature_dim: int = 256
    """Random orthonormal directions that features are projected on for moments and neighbours;
    characteristic functions use the full features."""
    neighbours: int = 5
    """k of precision, recall, density and coverage (literature: 3 to 5)."""
    samples: int = 2000
    """Real images used for the neighbour measures; moments and CFs use all."""
    draws: int = 3
    """Draws of each random reference set; their spread is the noise level."""

    def __post_init__(self) -> None:
        for name in ("num_freqs", "feature_dim", "neighbours", "samples", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class UnseenExtractor(Pretrain):
    """A pool of one network that distillation has not used."""

    recorded = False

    def __init__(self, run: Run, model: ModelConfig) -> None:
        pretrain = dataclasses.replace(run.config.pretrain, networks=1, snapshot_every=0, models=())
        seed = keyed_seed(run.config.seed, "audit_extractor")
        super().__init__(run, model=model, pretrain=pretrain, seed=seed)

    @property
    def label(self) -> str:
        """See Stage."""
        return f"extractor {self.models[0].name}"


class Audit(Stage):
    """Fidelity of the distilled set to the real set, written to audit.json."""

    name = "audit"

    @cached_property
    def _extractors(self) -> list[UnseenExtractor]:
        names = self.config.audit.networks or (self.config.model.name,)
        return [UnseenExtractor(self.run, named_model(self.run, name)) for name in names]

    @property
    def _ipc(self) -> tuple[int, ...]:
        return self.config.stored(self.run.stage(Shard).store.counts("train"))

    def identity(self) -> str:
        """See Stage."""
        cfg = self.config
        for extractor in self._extractors:
            _ = extractor.manifest
        return fingerprint(
            "audit",
            AUDIT_VERSION,
            self.run.stage(Distill).content(),
            [extractor.directory.name for extractor in self._extractors],
            cfg.audit,
            [shared_or_each(self._ipc), cfg.synthetic.factor, cfg.seed],
        )

    def build(self) -> Manifest:
        """See Stage."""
        cfg, shards = self.config, self.run.stage(Shard)
        job = AuditJob(
            store=shards.store,
            distilled=self.run.directory / "distilled",
            extractors=tuple(each.pool for each in self._extractors),
            config=cfg.audit,
            ipc=self._ipc,
            factor=cfg.synthetic.factor,
            seed=cfg.seed,
        )
        workers = self.run.workers(len(shards.manifest["splits"]["train"]["shards"]))
        return audit(job, workers, directory=self.directory)

    def summarise(self, manifest: Manifest) -> None:
        """See Stage."""
        write_atomic(self.run.directory / "audit.json", json.dumps(manifest, indent=1))
        log(audit_table(manifest))


def audit(job: AuditJob, workers: Workers, *, directory: UPath) -> Manifest:
    """The content of audit.json; writes nearest.png to the directory."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if workers.use_gpu else 0)(measure_sets)
    path = directory / "sets.safetensors"  # a file, so that restarted workers find it
    write_atomic(path, ray.get(task.remote(job, workers.device)))
    real = real_side(job, pass_over_shards(job, path, workers))
    content = summarise(job, unpack(path.read_bytes()), real)
    path.unlink()
    _write_pairs(job, real.nearest["distilled/0/pixels"], directory)
    return content


def summarise(job: AuditJob, sets: Mapping[str, Tensor], real: RealSide) -> Manifest:
    """{"rows", "per_class_ncfd", "images", "real_images", "sampled"} from the statistics of the
    sets (`measure_sets`) and of the real images.
    """
    keys = [key.removesuffix("/pixels") for key in sets if key.endswith("/pixels")]
    values: dict[tuple[str, str, str], list[float]] = {}  # (measure, extractor, set) -> draws
    per_class: dict[str, dict[str, Tensor]] = {}
    for key in sorted(keys):
        name = key.partition("/")[0]
        own = {k.removeprefix(f"{key}/"): v for k, v in sets.items() if k.startswith(f"{key}/")}
        for measure, value in _pixel_measures(own, real.nearest.get(f"{key}/pixels")).items():
            values.setdefault((measure, "", name), []).append(value)
        for e, pool in enumerate(job.extractors):
            extractor = pool.models[0].name
            measured, by_class = _feature_measures(own, real, e, job.config.neighbours)
            for measure, value in measured.items():
                values.setdefault((measure, extractor, name), []).append(value)
            classes = per_class.setdefault(extractor, {})
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
            extractor: {name: value.tolist() for name, value in by_set.items()}
            for extractor, by_set in per_class.items()
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


def _pixel_measures(own: Mapping[str, Tensor], near: Nearest | None) -> dict[str, float]:
    measured = {
        "intrinsic_dimension": intrinsic_dimension(own["pixels"]),
        "label_sharpness": label_sharpness(own["pixels"], own["labels"]),
    }
    if near is not None:
        measured["nearest_real"] = float(near.distance.mean())
        measured["nearest_real_least"] = float(near.distance.min())
    return measured


def _feature_measures(
    own: Mapping[str, Tensor], real: RealSide, e: int, k: int
) -> tuple[dict[str, float], Tensor]:
    """Feature measures, and the NCFD of each class (C,), nan where a set has no image of it."""
    by_class = []
    for c, whole in enumerate(real.cf[e]):
        sums = CFSums(own[f"{e}/cos"][c], own[f"{e}/sin"][c], own[f"{e}/size"][c])
        if float(sums.size) and float(whole.size):
            by_class.append(cf_distance(cf_from_sums(whole), cf_from_sums(sums)))
        else:
            by_class.append(cf_distance(*[cf_from_sums(whole)] * 2)._replace(ncfd=float("nan")))
    known = torch.tensor([list(d) for d in by_class], dtype=torch.float64)
    mean = known[~known[:, 0].isnan()].mean(0).tolist()
    features = own[f"{e}/features"].double()
    measured = dict(zip(("ncfd", "amplitude", "phase"), mean, strict=True))
    if len(features) > 1 and len(real.samples[e]) > 1:
        measured["frechet"] = frechet_distance(real.moments[e], Moments.of(features))
        measured |= neighbourhood(real.samples[e].double(), features, k)._asdict()
    return measured, known[:, 0]


def _write_pairs(job: AuditJob, near: Nearest, directory: UPath) -> None:
    """Write nearest.png: the synthetic images closest to a real image, each above that image."""
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
    """The measures as text: one row per measure, one column per set."""
    rows = content["rows"]
    names = ["real", *SETS]
    lines = [["measure", "extractor", "better", *names]]
    for key in dict.fromkeys((row["measure"], row["extractor"]) for row in rows):
        by_set = {row["set"]: row for row in rows if (row["measure"], row["extractor"]) == key}
        known = {name: row["value"] for name, row in by_set.items() if row["value"] is not None}
        values = [f"{known[name]:.4g}" if name in known else "" for name in names]
        lines.append([*key, MEASURES[key[0]] or "", *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
