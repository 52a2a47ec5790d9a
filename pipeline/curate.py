"""Curation: the distilled set once more, with soft labels from the pool; a set of its own."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from upath import UPath

from ncfm import load
from ncfm.curation import CurateConfig
from ncfm.curation import curate as add_soft_labels
from ncfm.images import ImageSpec
from ncfm.models import Classifier, ModelConfig
from pipeline.directories import replaced
from pipeline.pretrain import load_member, new_network
from pipeline.stage import Manifest, peak_rss_bytes
from pipeline.workers import Workers

CURATE_VERSION = 1
"""To be raised when this stage's results change; see tests/integration/test_golden.py."""


@dataclass(frozen=True, kw_only=True)
class CurateJob:
    """Which set is given soft labels, and by which networks."""

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
        made = add_soft_labels(synthetic, teachers, self.config, device=device)
        provenance = {**synthetic.provenance, "curation": dataclasses.asdict(self.config)}
        with replaced(self.curated, last="manifest.json") as new:
            dataclasses.replace(made, provenance=provenance).save(new)
        return {"peak_rss_bytes": peak_rss_bytes()}


def pool_networks(
    pool: UPath, count: int, model: ModelConfig, spec: ImageSpec
) -> Iterator[Classifier]:
    """The first networks of a pool, trained, one after the other in the same module."""
    network = new_network(model, spec, seed=0)  # its weights are the pool's
    for member in range(count):
        network.load_state_dict(load_member(pool, member)[1])
        yield network


def curate(job: CurateJob, workers: Workers) -> Manifest:
    """Make the soft labels in a Ray task."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if workers.use_gpu else 0)(CurateJob.run)
    result: Manifest = ray.get(task.remote(job, workers.device))
    return result
