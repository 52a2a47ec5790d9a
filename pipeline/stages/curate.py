"""Stage curate: a copy of the distilled set with soft labels from the pool's networks."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from upath import UPath

from ncfm import load
from ncfm.curation import CurateConfig
from ncfm.curation import curate as add_soft_labels
from ncfm.images import ImageSpec
from ncfm.models import Classifier, ModelConfig
from pipeline.data.pool import load_member, new_network
from pipeline.graph import Stage
from pipeline.runtime.directories import replaced
from pipeline.runtime.files import Manifest
from pipeline.runtime.identity import fingerprint, peak_rss_bytes
from pipeline.runtime.workers import Workers
from pipeline.stages.distill import Distill, set_content
from pipeline.stages.pretrain import Pretrain

CURATE_VERSION = 1
"""Raise when this stage's results change; see tests/integration/test_golden.py."""


class Curate(Stage):
    """The distilled set with soft labels, beside the original in the run's directory."""

    name = "curate"

    @property
    def directory(self) -> UPath:
        """See Stage."""
        return self.run.directory / "curation"

    def identity(self) -> str:
        """See Stage."""
        distilled = self.run.stage(Distill).fingerprint
        return fingerprint("curate", CURATE_VERSION, distilled, self.config.curate)

    def build(self) -> Manifest:
        """See Stage."""
        job = CurateJob(
            distilled=self.run.directory / "distilled",
            curated=self.run.directory / "curated",
            pool=self.run.stage(Pretrain).directory,
            networks=self.config.pretrain.networks,
            model=self.config.model,
            config=self.config.curate,
        )
        return curate(job, self.run.workers(1))

    def content(self) -> str:
        """See Distill.content."""
        _ = self.manifest
        return set_content(self.run.directory / "curated")


@dataclass(frozen=True, kw_only=True)
class CurateJob:
    """Inputs of the soft-label task."""

    distilled: UPath
    curated: UPath
    pool: UPath
    networks: int
    model: ModelConfig
    config: CurateConfig

    def run(self, device: str) -> Manifest:
        """Write the set with soft labels; runs inside a Ray task."""
        synthetic = load(self.distilled)
        count = min(self.config.networks, self.networks)
        teachers = pool_networks(self.pool, count, self.model, synthetic.spec)
        curated = add_soft_labels(synthetic, teachers, self.config, device=device)
        provenance = {**synthetic.provenance, "curation": dataclasses.asdict(self.config)}
        with replaced(self.curated, last="manifest.json") as new:
            dataclasses.replace(curated, provenance=provenance).save(new)
        return {"peak_rss_bytes": peak_rss_bytes()}


def pool_networks(
    pool: UPath, count: int, model: ModelConfig, spec: ImageSpec
) -> Iterator[Classifier]:
    """The first `count` trained networks of a pool, loaded in turn into one module."""
    network = new_network(model, spec, seed=0)  # weights are loaded below
    for member in range(count):
        network.load_state_dict(load_member(pool, member)[1])
        yield network


def curate(job: CurateJob, workers: Workers) -> Manifest:
    """Compute the soft labels in a Ray task."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if workers.use_gpu else 0)(CurateJob.run)
    result: Manifest = ray.get(task.remote(job, workers.device))
    return result
