"""Curation: the distilled set once more, with soft labels from the pool; a set of its own."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from upath import UPath

from ncfm import load
from ncfm.curation import CurateConfig
from ncfm.curation import curate as add_soft_labels
from ncfm.models import Classifier, ModelConfig
from ncfm.synthetic import SyntheticSet
from pipeline.pretrain import load_member, new_network
from pipeline.stage import Manifest, peak_rss_bytes
from pipeline.workers import Workers


@dataclass(frozen=True, kw_only=True)
class CurateJob:
    """Which set is given soft labels, and by which networks."""

    distilled: UPath
    curated: UPath
    pool: UPath
    networks: int
    model: ModelConfig
    config: CurateConfig

    def run(self) -> Manifest:
        """Write the set with soft labels; runs inside a Ray task."""
        synthetic = load(self.distilled)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        made = add_soft_labels(synthetic, self._teachers(synthetic), self.config, device=device)
        provenance = {**synthetic.provenance, "curation": dataclasses.asdict(self.config)}
        dataclasses.replace(made, provenance=provenance).save(self.curated)
        return {"peak_rss_bytes": peak_rss_bytes()}

    def _teachers(self, synthetic: SyntheticSet) -> Iterator[Classifier]:
        network = new_network(self.model, synthetic.spec, seed=0)  # its weights are the pool's
        for member in range(min(self.config.networks, self.networks)):
            network.load_state_dict(load_member(self.pool, member)[1])
            yield network


def curate(job: CurateJob, workers: Workers) -> Manifest:
    """Make the soft labels in a Ray task, where a GPU is if there is any."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if workers.use_gpu else 0)(CurateJob.run)
    result: Manifest = ray.get(task.remote(job))
    return result
