"""The audit: the order of sets that one knows, and the same numbers however many workers."""

import dataclasses
import json
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from numbered import everything
from tiny import copied, stage
from upath import UPath

import ncfm
from ncfm.models import ModelConfig
from pipeline.data.pool import Pool, member_path, new_network, pack_member
from pipeline.data.store import Store
from pipeline.runtime.workers import Workers
from pipeline.stages.audit import AUDIT_VERSION, AuditConfig, audit, summarise
from pipeline.stages.audit_pass import ShardPass, real_side
from pipeline.stages.audit_sets import AuditJob, Extractors, measure_sets, unpack

AUDIT = AuditConfig(num_freqs=128, feature_dim=32, samples=200, draws=2)


@pytest.fixture(scope="module")
def job(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> AuditJob:
    """With an extractor of random weights: the order of the sets must not need training."""
    (manifest_path,) = (tiny[0] / "runs" / "cache").glob("shard-*/manifest.json")
    manifest = json.loads(manifest_path.read_text())
    model, pool = ModelConfig(depth=2, width=16), UPath(tmp_path_factory.mktemp("pool"))
    store = Store(UPath(manifest_path.parent), manifest)
    state = new_network(model, store.spec, seed=1).state_dict()
    member_path(pool, 0).write_bytes(pack_member(state, {k: v.clone() for k, v in state.items()}))
    return AuditJob(
        store=store,
        distilled=UPath(tiny[1] / "distilled"),
        extractors=(Pool(directory=pool, models=(model,), networks=1),),
        config=AUDIT,
        ipc=(1,) * 10,
        factor=2,
        seed=0,
    )


def values(content: dict, measure: str) -> dict[str, float]:
    return {row["set"]: row["value"] for row in content["rows"] if row["measure"] == measure}


def in_process(job: AuditJob, folder: Path) -> dict:
    """The audit without Ray: what a worker does, shard by shard."""
    sets = UPath(folder / "sets.safetensors")
    sets.write_bytes(measure_sets(job, "cpu"))
    worker = ShardPass(job, sets, "cpu")
    parts = [
        unpack(worker({"shard": np.array([place])})["data"][0])
        for place in range(len(worker.starts) - 1)
    ]
    return summarise(job, unpack(sets.read_bytes()), real_side(job, parts))


@pytest.fixture(scope="module")
def content(job: AuditJob, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return audit(job, Workers(1, False), directory=UPath(tmp_path_factory.mktemp("one")))


def test_the_audit_is_the_same_on_one_and_three_workers(
    job: AuditJob, content: dict, tmp_path: Path
) -> None:
    other = audit(job, Workers(3, False), directory=UPath(tmp_path))
    assert other | {"peak_rss_bytes": 0} == content | {"peak_rss_bytes": 0}  # to the last bit
    found = {f"{row['set']} {row['measure']}": row["value"] for row in content["rows"]}
    golden.check("audit", AUDIT_VERSION, found, tolerance=0.02)
    assert (tmp_path / "nearest.png").stat().st_size > 100


@pytest.mark.parametrize("measure", ["ncfd", "frechet", "coverage", "nearest_real"])
def test_real_images_score_best_and_noise_worst(content: dict, measure: str) -> None:
    found = values(content, measure)
    sign = 1 if measure in ("ncfd", "frechet", "nearest_real") else -1
    order = [sign * found[name] for name in ("random", "held_out", "noise")]
    assert order[0] < order[2]
    assert order[1] < order[2]


def test_a_set_that_is_part_noise_lies_between(job: AuditJob, tmp_path: Path) -> None:
    """Three constructed sets in place of the distilled one: real, half noise, noise."""
    real, labels = everything(job.store, "train")
    chosen = torch.cat([(labels == c).nonzero().flatten()[:4] for c in range(10)])
    images = real[chosen].float() / 255
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for i, share in enumerate((0.0, 0.5, 1.0)):
        mixed = (1 - share) * images + share * noise
        made = ncfm.SyntheticSet(mixed, labels[chosen], 1, job.store.spec)
        made.save(tmp_path / str(i))
        part = dataclasses.replace(job, distilled=UPath(tmp_path / str(i)), ipc=(4,) * 10, factor=1)
        content = in_process(part, tmp_path / str(i))
        found.append({m: values(content, m)["distilled"] for m in ("ncfd", "frechet", "coverage")})
        if share == 0:
            assert values(content, "nearest_real")["distilled"] == pytest.approx(0, abs=1e-5)
    for measure, sign in (("ncfd", 1), ("frechet", 1), ("coverage", -1)):
        ordered = [sign * entry[measure] for entry in found]
        assert ordered[0] < ordered[1] < ordered[2], measure


def test_the_sums_of_the_pass_are_those_of_all_images(job: AuditJob, content: dict) -> None:
    """Against one computation over the whole set, in float64."""
    from ncfm.discrepancy import empirical_cf
    from ncfm.fidelity import cf_distance

    extractors = Extractors(job, "cpu")
    synthetic = ncfm.load(job.distilled)
    real, (images, labels) = job.store.images("train"), synthetic.decode()
    t = extractors.frequencies[0]

    def features(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            raw = extractors.networks[0].features(job.store.spec.normalize(x))
        return torch.nn.functional.normalize(raw, dim=1)

    for c in (0, 7):
        whole = empirical_cf(features(real[c].float() / 255), t)
        mine = empirical_cf(features(images[labels == c]), t)
        found = content["per_class_ncfd"]["convnet"]["distilled"][c]
        assert found == pytest.approx(cf_distance(whole, mine).ncfd, abs=1e-4)


def test_the_stage_writes_every_measure_beside_its_references(tiny: tuple[Path, Path]) -> None:
    folder, directory = copied(tiny, "audited")
    options = ["--audit.num_freqs", "64", "--audit.draws", "2", "--audit.samples", "100"]
    stage(folder, directory, "audit", *options)
    found = json.loads((directory / "audit.json").read_text())
    for measure in ("ncfd", "amplitude", "phase", "frechet", "precision", "recall", "coverage"):
        assert set(values(found, measure)) == {
            "distilled", "random", "random_same_factor", "held_out", "noise",
        }  # fmt: skip
    assert "real" in values(found, "intrinsic_dimension")
    assert found["images"]["distilled"] == found["images"]["random"] == 40
    assert len(list((directory / "audit").glob("nearest.*"))) == 2
    assert stage(folder, directory, "audit", *options)["reused"]
