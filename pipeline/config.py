"""Configuration of a run, composed of the stages' own dataclasses."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upath import UPath

from ncfm.allocation import Allocation, allocate
from ncfm.augment import AugmentConfig
from ncfm.curation import CurateConfig
from ncfm.distill import DistillConfig
from ncfm.frequencies import FrequencyConfig
from ncfm.models import ModelConfig
from ncfm.synthetic import SyntheticConfig
from pipeline.data.shards import ShardConfig
from pipeline.data.sources import SourceConfig
from pipeline.methods import MethodName, method_changes
from pipeline.observe.tracking import TrackingConfig
from pipeline.runtime.config import RuntimeConfig
from pipeline.runtime.identity import dotted
from pipeline.stages.audit import AuditConfig
from pipeline.stages.continual import ContinualConfig
from pipeline.stages.export import ExportConfig
from pipeline.stages.plan import PlanConfig
from pipeline.stages.pretrain import PretrainConfig
from pipeline.stages.protocols import EvaluateConfig
from pipeline.stages.search_proxy import SearchProxyConfig
from pipeline.stages.tuning.search_space import TuneConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of a run."""

    name: str | None = None
    """Directory of the run below storage_path; default: the preset's name, else the source's kind.
    """
    storage_path: str = "runs"
    """Directory, or URI of an object store, for runs and their cache."""
    seed: int = 0
    """Seed of all random draws of the run."""
    ipc: int = 1
    """Stored synthetic images per class."""
    ipc_allocation: Allocation = "equal"
    """`equal`: every class stores ipc images. `proportional`: ipc x classes images in all, dealt in
    proportion to the train images of a class, at least one each: an image goes to the class with
    the largest train / (stored + 1/2). The learning rates of a method are those of ipc."""
    method: MethodName | None = None
    """A published method: sets its hyperparameters in distill, frequencies, synthetic and augment,
    for this ipc and shard.image_size; other given options override them. dm: mean features of
    random networks. dance: of trained networks, with their cross-entropy. tgdd: of snapshots, with
    a later snapshot's cross-entropy. ncfm, ncfm_psi: characteristic functions at fixed and at
    learned frequencies. None: no method's settings."""
    num_workers: int | None = None
    """Workers per stage; default: one per GPU, or one per CPU without GPUs."""
    use_gpu: bool | None = None
    """Whether each worker uses a GPU; default: if the cluster has one. On an autoscaling cluster,
    true requests num_workers GPUs and waits for them."""
    source: SourceConfig = field(default_factory=SourceConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network of the pool and of the evaluation."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    frequencies: FrequencyConfig = field(default_factory=FrequencyConfig)
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(strategy="color_crop_cutout", single=False)
    )
    """Siamese augmentation in distillation; the default is the released code's."""
    curate: CurateConfig = field(default_factory=CurateConfig)
    """Soft labels, evaluated as separate sets."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    search_proxy: SearchProxyConfig = field(default_factory=SearchProxyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if self.ipc < 1:
            raise ValueError(f"ipc must be at least 1, got {self.ipc}")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.synthetic.factor > self.shard.image_size:
            raise ValueError(
                f"synthetic.factor must not exceed shard.image_size, "
                f"got {self.synthetic.factor} > {self.shard.image_size}"
            )
        if self.distill.extractor != "blend" and not self.pretrain.snapshot_every:
            raise ValueError(
                f"distill.extractor {self.distill.extractor!r} needs snapshots of the pool's "
                "training: set pretrain.snapshot_every, got 0"
            )
        if self.name is not None and (
            not self.name or "/" in self.name or self.name in ("cache", ".", "..")
        ):
            raise ValueError(
                f"name must be a plain directory name other than 'cache', got {self.name!r}"
            )
        try:
            UPath(self.storage_path)
        except ValueError as error:
            raise ValueError(f"storage_path {self.storage_path}: {error}") from error

    def method_changes(self) -> list[str]:
        """The options whose values differ from the configured method, if any."""
        if self.method is None:
            return []
        options = dotted(dataclasses.asdict(self))
        sizes = {"ipc": self.ipc, "image_size": self.shard.image_size}
        return method_changes(self.method, options, **sizes)

    def stored(self, train: Sequence[int]) -> tuple[int, ...]:
        """Stored images of each class, from the train images of each."""
        return allocate(train, self.ipc, self.ipc_allocation)

    @property
    def storage(self) -> UPath:
        """storage_path, absolute if local. Listings of an object store are not cached, since many
        processes write to it.
        """
        path = UPath(self.storage_path)
        if isinstance(path, Path):
            return path.absolute()
        return UPath(path, use_listings_cache=False)

    @property
    def run_directory(self) -> UPath:
        """<storage_path>/<name>."""
        return self.storage / (self.name or self.source.kind)

    @property
    def ray_storage(self) -> UPath:
        """Directory of the files of Ray Train and Ray Tune."""
        return self.storage / "cache" / "ray"

    def cache(self, stage: str, fingerprint: str) -> UPath:
        """<storage_path>/cache/<stage>-<fingerprint>, shared by all runs of one storage path."""
        return self.storage / "cache" / f"{stage}-{fingerprint}"
