"""Stage plan: estimate a run's disk, memory, network traffic and time before starting it.

Nothing is written and no cluster is joined. A sample of the source's images is encoded, and probes
run a few steps on random images of the right shapes, one probe per worker that this machine would
have. For another machine's GPU the time comes from a table.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.data.pool import new_network
from pipeline.data.shards import TAR_OVERHEAD, encode, square
from pipeline.data.sources import SPLITS, Source
from pipeline.errors import StageError, UsageError
from pipeline.graph import Action, log
from pipeline.observe.reporting.tables import duration, memory
from pipeline.runtime.assignment import assign, most_workers, step_costs
from pipeline.runtime.collectives import predicted_bytes
from pipeline.runtime.workers import available_cores
from pipeline.stages.cluster_plan import PAPER_A100, Sizes, cluster_figures, cluster_lines
from pipeline.stages.probe import Answer, Request, image_spec, run_probes

if TYPE_CHECKING:
    from pipeline.config import RunConfig

ENCODED = 128
"""Images of the source that are encoded to estimate the shard size."""

SMALLEST_STEP = 0.05
"""Fraction of the table's FLOP below which the estimate is marked as too low."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Estimate of a run's resources."""

    nodes: int | None = None
    """Estimate by formulas for a cluster of this many nodes, instead of measuring this machine."""
    gpus_per_node: int = 8
    """With `nodes`: GPUs per node."""
    disk_gib_per_node: float | None = None
    """With `nodes`: disk for the store per node, GiB; None: not checked."""
    classes: int | None = None
    """With `nodes`: number of classes, for a data set that is not available."""
    images: int | None = None
    """With `nodes`: number of images of that data set."""
    gpu: str | None = None
    """With `nodes`: a100, h100, h200 or l4. Else predict for this GPU from a table, not probing
    this machine."""
    probe_s: float = 60.0
    """Approximate time limit of the step probe, seconds."""
    max_steps: int = 5
    """Timed steps, after one warm-up step."""

    def __post_init__(self) -> None:
        if not self.probe_s > 0:
            raise ValueError(f"plan.probe_s must be positive, got {self.probe_s}")
        for name in ("max_steps", "nodes", "gpus_per_node", "classes", "images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"plan.{name} must be at least 1, got {value}")
        if (self.classes is None) != (self.images is None):
            raise ValueError(
                f"plan.classes and plan.images go together, got {self.classes}, {self.images}"
            )


class Plan(Action):
    """Print the estimated resources of a run; nothing is started or written."""

    name = "plan"
    writes = False

    def check(self) -> None:
        """See Action."""
        if models := self.config.pretrain.models:
            raise UsageError(
                "plan estimates a pool of model.name alone: leave out pretrain.models, got "
                f"{', '.join(models)}"
            )
        if self.config.plan.nodes is None or self.config.plan.classes is None:
            _ = self.run.source

    def perform(self) -> None:
        """See Action."""
        if self.config.plan.nodes is None:
            log(estimate_lines(estimate(self.config, self.run.source), self.config))
        else:
            log(cluster_lines(cluster_figures(self.config, self._sizes())))

    def _sizes(self) -> Sizes:
        """Sizes from plan.classes and plan.images, or else from the source."""
        plan = self.config.plan
        if plan.classes is not None and plan.images is not None:
            each = plan.images // plan.classes
            return Sizes.of(self.config, [each] * plan.classes, plan.images)
        source = self.run.source
        images = sum(len(source.samples(split)) for split in SPLITS)
        return Sizes.of(self.config, train_counts(source), images)


GPUS = {"A100": PAPER_A100}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated resources of a run. Bytes, seconds."""

    images: int
    shard_bytes: int
    store_bytes: int  # upper bound per node, which stores the classes of its workers
    workers: int
    use_gpu: bool
    memory: int  # per distillation worker, without the store's pages in the page cache
    gpu_memory: int | None  # without pools, up to GPU_SHARE of the free memory; None: no GPU
    network_bytes: int  # per step, all workers, without metrics
    step_s: float
    step_source: str
    distill_s: float
    pretrain_s: float
    evaluate_s: float


def estimate(config: "RunConfig", source: Source) -> Estimate:
    """Probe this machine and estimate. Raises UsageError for a GPU that is not in the table."""
    _check_gpu(config)
    counts = train_counts(source)
    ipc = config.stored(counts)
    costs = step_costs(config.distill, config.synthetic.factor, ipc, counts)
    cpus = available_cores()
    gpus = torch.cuda.device_count()
    use_gpu = config.plan.gpu is not None or (gpus > 0 and config.use_gpu is not False)
    probe_gpus = gpus > 0 and config.use_gpu is not False
    here = gpus if probe_gpus else cpus
    workers = config.num_workers or min(here, most_workers(costs))
    groups = assign(costs, workers)
    busiest = max(groups, key=lambda group: group.cost(costs))
    real_per_class = [max(1, int(costs[c].shared) // len(busiest.ranks)) for c in busiest.classes]
    answers = run_probes(
        Request(
            config=config,
            classes=len(counts),
            real=real_per_class,
            stored=[ipc[c] for c in busiest.classes],
            threads=1,
            seconds=config.plan.probe_s,
            device="cuda" if probe_gpus else "cpu",
        ),
        count=min(workers, here),
    )
    slowest = max(answers, key=lambda answer: answer.step_s)
    passes = max(group.cost(costs) for group in groups)
    step_s, step_source = _step_time(config, slowest, passes)
    spec = image_spec(config, len(counts))
    trained = config.pretrain.networks * config.pretrain.training.epochs * sum(counts)
    speed = step_s / slowest.step_s  # another machine is assumed to train at the ratio of steps
    images = sum(len(source.samples(split)) for split in SPLITS)
    return Estimate(
        images=images,
        store_bytes=images * config.shard.channels * config.shard.image_size**2,
        shard_bytes=shard_bytes(config, source),
        workers=workers,
        use_gpu=use_gpu,
        memory=max(answer.memory for answer in answers),
        gpu_memory=(slowest.gpu_memory or slowest.working) if use_gpu else None,
        network_bytes=predicted_bytes(
            groups,
            config.frequencies,
            dim=new_network(config.model, spec, seed=0).num_features,
            number_bytes=8 if config.distill.precision == "float64" else 4,
        ),
        step_s=step_s,
        step_source=step_source,
        distill_s=step_s * config.distill.num_steps,
        pretrain_s=speed * slowest.train_image_s * trained / min(workers, config.pretrain.networks),
        evaluate_s=speed * slowest.train_image_s * _evaluated(config, counts) / workers,
    )


def train_counts(source: Source) -> list[int]:
    """Number of training images of each class."""
    counts = [0] * len(source.class_names)
    for sample in source.samples("train"):
        counts[sample.label] += 1
    return counts


def _check_gpu(config: "RunConfig") -> None:
    if config.plan.gpu is not None and config.plan.gpu not in GPUS:
        raise UsageError(
            f"plan.gpu {config.plan.gpu!r} is not in the table: {', '.join(GPUS)}; "
            "without it, this machine is measured"
        )


def _step_time(config: "RunConfig", probe: Answer, passes: float) -> tuple[float, str]:
    if config.plan.gpu is None:
        how = "measured" if probe.whole else "measured on a part of a step"
        return probe.step_s, f"{how} on this machine, without the time on the network"
    known, flops = GPUS[config.plan.gpu], passes * probe.pass_flops
    source = f"scaled from {known.source}"
    if flops < SMALLEST_STEP * known.flops:
        source += "; too low, for so small a step does not fill a GPU"
    return gpu_step_s(config.plan.gpu, config, flops), source


def gpu_step_s(gpu: str, config: "RunConfig", flops: float) -> float:
    """Seconds per step of this many FLOP, scaled from the table."""
    return flops / GPUS[gpu].flops_per_s(config.frequencies.sampler)


def _evaluated(config: "RunConfig", counts: list[int]) -> int:
    """Training images of the evaluation, summed over networks and epochs."""
    stored = sum(config.stored(counts))
    decoded = stored * config.synthetic.factor**2
    each = 2 * decoded + stored  # distilled, same-factor random, random
    each += stored * ("herding" in config.evaluate.sets) + decoded * config.curate.soft_labels
    evaluate = config.evaluate
    whole = evaluate.runs("whole") * evaluate.whole_epochs * sum(counts)
    return evaluate.repeats * evaluate.training.epochs * each + whole


def shard_bytes(config: "RunConfig", source: Source) -> int:
    """Estimated bytes of all shards, from a sample of encoded images. Raises StageError if none of
    the sample can be read.
    """
    samples = [sample for split in SPLITS for sample in source.samples(split)]
    stride = max(1, len(samples) // ENCODED)
    sizes = []
    for sample in samples[stride // 2 :: stride]:
        try:
            image = source.read(sample)
        except OSError:
            continue  # the shard stage lists it
        small = square(image, config.shard)
        sizes.append(TAR_OVERHEAD + len(encode(small, config.shard)))
    if not sizes:
        raise StageError(f"none of {ENCODED} images of the source can be read")
    return round(sum(sizes) / len(sizes) * len(samples))


def estimate_lines(plan: Estimate, config: "RunConfig") -> str:
    """The plan as lines of text."""
    total = plan.pretrain_s + plan.distill_s + plan.evaluate_s
    kind = "GPU" if plan.use_gpu else "CPU"
    lines = [
        ("shards on disk", f"{memory(plan.shard_bytes)} ({plan.images} images)"),
        ("decoded images on disk", f"{memory(plan.store_bytes)} on every node, at most"),
        ("workers", f"{plan.workers}, a {kind} each"),
        ("memory per worker", memory(plan.memory)),
        ("GPU memory per worker", memory(plan.gpu_memory) if plan.use_gpu else "none"),
        ("network per step", f"{plan.network_bytes:,} bytes, all workers together"),
        ("step", f"{plan.step_s:.3g} s ({plan.step_source})"),
        ("distillation", f"{duration(plan.distill_s)} ({config.distill.num_steps} steps)"),
        ("pretraining", f"about {duration(plan.pretrain_s)}"),
        ("evaluation", f"about {duration(plan.evaluate_s)}"),
        ("all", f"about {duration(total)}, {total * plan.workers / 3600:.2g} {kind} hours"),
    ]
    return "\n".join(f"[plan] {name.ljust(22)} {value}" for name, value in lines)
