"""Stage curate: a copy of the distilled set with soft labels from the pool's networks."""

import dataclasses
from dataclasses import dataclass

from upath import UPath

from ncfm import load
from ncfm.curation import CurateConfig
from ncfm.curation import curate as add_soft_labels
from pipeline.data.pool import Pool
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
            pool=self.run.stage(Pretrain).pool,
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
    pool: Pool
    config: CurateConfig

    def run(self, device: str) -> Manifest:
        """Write the set with soft labels; runs inside a Ray task."""
        synthetic = load(self.distilled)
        teachers = self.pool.teachers(self.config.networks, synthetic.spec)
        curated = add_soft_labels(synthetic, teachers, self.config, device=device)
        provenance = {**synthetic.provenance, "curation": dataclasses.asdict(self.config)}
        with replaced(self.curated, last="manifest.json") as new:
            dataclasses.replace(curated, provenance=provenance).save(new)
        return {"peak_rss_bytes": peak_rss_bytes()}


def curate(job: CurateJob, workers: Workers) -> Manifest:
    """Compute the soft labels in a Ray task."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if workers.use_gpu else 0)(CurateJob.run)
    result: Manifest = ray.get(task.remote(job, workers.device))
    return result
