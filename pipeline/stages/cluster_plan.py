"""Estimate a run's disk, memory, network traffic and time on a hypothetical cluster, by formulas.

N images, C classes, H x W x 3 bytes per image, P networks of `weights` numbers with S snapshots, D
features, K frequencies, G workers with one GPU each. Every figure is an upper bound, or marked as
an expectation; nothing is measured or started.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ncfm.backend.features import BLOCK_CHUNKS, CHUNK_PIXELS
from ncfm.models import build_model
from pipeline.data.shards import TAR_OVERHEAD
from pipeline.errors import UsageError
from pipeline.observe.reporting.tables import duration, memory
from pipeline.runtime.assignment import Group, assign, step_costs
from pipeline.runtime.collectives import predicted_bytes

if TYPE_CHECKING:
    from pipeline.config import RunConfig

ENCODED = {"png": 0.62, "jpeg": 0.21, "raw": 1.0}
"""Encoded bytes per pixel byte: measured means of 150 photographs of Imagewoof at 128 px; standard
errors 0.008 and 0.003."""
ACTIVATION_BYTES = 512
"""Approximate activation bytes per pixel of a ConvNet of width 128 (`ncfm.backend.features`)."""
TRAINING_PASSES = 3.0
"""Cost of training on one image, in forward passes."""
TIMES = {"optimizer": {"adamw": 3, "sgd": 2}, "live": {"adamw": 4, "sgd": 3}}
"""Copies of the images in a checkpoint (with AdamW's moments or SGD's momentum), and during a step
(with the gradient)."""


@dataclass(frozen=True, kw_only=True)
class GpuTime:
    """Seconds per step of one measured configuration on a GPU."""

    fixed_s: float  # psi off
    psi_s: float  # psi on
    flops: float  # per step, all passes
    source: str

    def flops_per_s(self, sampler: str) -> float:
        """Its rate, with the frequencies of this sampler."""
        return self.flops / (self.psi_s if sampler == "psi" else self.fixed_s)


PAPER_A100 = GpuTime(
    fixed_s=0.73,
    psi_s=1.33,
    # CIFAR-100, IPC 10: 100 classes of 500 real and 40 decoded images (4 per stored one, 6 passes
    # each); 101.9 MFLOP per pass of the ConvNet-3 of width 128 at 32 px.
    flops=100 * (500 + 40 * 6) * 101.9e6,
    source="paper, table 3: the released code, CIFAR-100, IPC 10; not measured by us",
)


class Gpu(NamedTuple):
    """GPU memory and bandwidth, from the vendor's data sheet."""

    memory: float  # bytes
    bandwidth: float  # bytes/s, which bounds a step


GPUS = {
    "a100": Gpu(80e9, 2.04e12),
    "h100": Gpu(80e9, 3.35e12),
    "h200": Gpu(141e9, 4.8e12),
    "l4": Gpu(24e9, 0.3e12),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the plan."""

    name: str
    value: float  # bytes, or seconds
    text: str
    formula: str
    problem: str = ""
    """Why it does not fit, and which option to change."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the data and the network."""

    counts: Sequence[int]  # train images of each class
    images: int  # of all splits
    weights: int  # of a network
    features: int
    pass_flops: int

    @classmethod
    def of(cls, config: "RunConfig", counts: Sequence[int], images: int) -> "Sizes":
        """Sizes with those of the network, which is built on the meta device."""
        from pipeline.stages.probe import forward_flops, image_spec

        spec = image_spec(config, len(counts))
        with torch.device("meta"):
            network = build_model(
                config.model,
                num_classes=len(counts),
                channels=spec.channels,
                image_size=spec.image_size,
            )
        weights = sum(tensor.numel() for tensor in network.state_dict().values())
        flops = forward_flops(config, spec)
        return cls(
            counts=counts,
            images=images,
            weights=weights,
            features=network.num_features,
            pass_flops=flops,
        )


def cluster_figures(config: "RunConfig", sizes: Sizes) -> list[Figure]:
    """Disk, memory, network and hours of a run on plan.nodes x plan.gpus_per_node GPUs. Raises
    UsageError for a GPU that is not in the table.
    """
    gpu = GPUS.get((config.plan.gpu or "a100").lower())
    if gpu is None:
        raise UsageError(f"plan.gpu must be one of {', '.join(GPUS)}, got {config.plan.gpu!r}")
    workers = (config.plan.nodes or 1) * config.plan.gpus_per_node
    ipc = config.stored(sizes.counts)
    costs = step_costs(config.distill, config.synthetic.factor, ipc, sizes.counts)
    groups = assign(costs, workers)
    return [
        *disk_figures(config, sizes),
        *memory_figures(config, sizes, groups, gpu),
        network_figure(config, sizes, groups),
        *time_figures(config, sizes, max(group.cost(costs) for group in groups), workers, gpu),
    ]


def _image_bytes(config: "RunConfig") -> int:
    return config.shard.channels * config.shard.image_size**2


def disk_figures(config: "RunConfig", sizes: Sizes) -> list[Figure]:
    """Shards and checkpoints on shared storage, the store on each node."""
    image, encoded = _image_bytes(config), ENCODED[config.shard.encoding]
    shards = round(sizes.images * (encoded * image + TAR_OVERHEAD))
    store, room = sizes.images * image, config.plan.disk_gib_per_node
    stored = sum(config.stored(sizes.counts)) * image
    copies = TIMES["optimizer"][config.distill.optimizer]
    checkpoint = 4 * copies * stored
    kept = config.runtime.checkpoints_kept + 1
    problem = ""
    if room is not None and store > room * 2**30:
        problem = (
            f"a node has {room:g} GiB: set runtime.local_directory to a larger disk, or lower "
            "shard.image_size"
        )
    return [
        Figure(
            name="shards, shared",
            value=shards,
            text=memory(shards),
            formula=f"N ({encoded:g} x 3HW + {TAR_OVERHEAD}), N {sizes.images:,}",
        ),
        Figure(
            name="store, each node",
            value=store,
            text=memory(store),
            formula="N x 3HW: a node that pretrains reads all; one that distils its classes alone",
            problem=problem,
        ),
        Figure(
            name="checkpoint, shared",
            value=checkpoint,
            text=f"{memory(checkpoint)}, {kept} of them kept",
            formula=f"4 bytes x {copies} (images, optimiser) x C x IPC x 3HW",
        ),
    ]


def memory_figures(
    config: "RunConfig", sizes: Sizes, groups: Sequence[Group], gpu: Gpu
) -> list[Figure]:
    """Of a worker's GPU, and of its process beside the pages of the store."""
    snapshots = 2
    if config.distill.extractor != "blend":
        snapshots = len(config.pretrain.snapshot_epochs)
    pool = 4 * config.pretrain.networks * snapshots * sizes.weights
    ipc = config.stored(sizes.counts)
    stored = max(sum(ipc[c] for c in group.classes) for group in groups)
    live = TIMES["live"][config.distill.optimizer]
    images = 4 * live * stored * _image_bytes(config)
    chunk = max(CHUNK_PIXELS["cuda"], config.shard.image_size**2)
    activations = round((BLOCK_CHUNKS + 1) * chunk * ACTIVATION_BYTES * config.model.width / 128)
    total = pool + images + activations
    problem = ""
    if total > gpu.memory:
        problem = (
            f"a GPU has {gpu.memory / 1e9:g} GB: more plan.nodes give a worker fewer classes; or "
            "fewer pretrain.networks, or a larger pretrain.snapshot_every"
        )
    host = pool + 4 * TIMES["optimizer"][config.distill.optimizer] * (images // (4 * live))
    return [
        Figure(
            name="GPU memory, a worker",
            value=total,
            text=memory(total),
            formula=f"pool 4 P S weights = {memory(pool)}; {stored} stored images x 3HW x 4 x "
            f"{live} = {memory(images)}; activations about {memory(activations)}",
            problem=problem,
        ),
        Figure(
            name="memory, a worker",
            value=host,
            text=f"{memory(host)} beyond PyTorch and Ray's own 1 GiB",
            formula="the pool while it is read, and a checkpoint's copy of the classes' state",
        ),
    ]


def network_figure(config: "RunConfig", sizes: Sizes, groups: Sequence[Group]) -> Figure:
    """Bytes of a step."""
    wide = 8 if config.distill.precision == "float64" else 4
    sent = predicted_bytes(groups, config.frequencies, dim=sizes.features, number_bytes=wide)
    return Figure(
        name="network, a step",
        value=sent,
        text=f"{sent:,} bytes, all workers together",
        formula="2 x (2K + 1) numbers of each class and further worker that share it, and psi's "
        "gradient: see cluster/README.md",
    )


def time_figures(
    config: "RunConfig", sizes: Sizes, passes: float, workers: int, gpu: Gpu
) -> list[Figure]:
    """Expected seconds per step, and of the long stages, scaled from the paper's A100."""
    speed = PAPER_A100.flops_per_s(config.frequencies.sampler)
    speed *= gpu.bandwidth / GPUS["a100"].bandwidth  # a step is bound by memory
    passed = sizes.pass_flops / speed  # seconds of a pass
    train = TRAINING_PASSES * passed * sum(sizes.counts)
    step = passes * passed
    networks, epochs = config.pretrain.networks, config.pretrain.training.epochs
    rounds = math.ceil(networks / workers)
    decoded = sum(config.stored(sizes.counts)) * config.synthetic.factor**2
    evaluated = TRAINING_PASSES * passed * decoded * config.evaluate.training.epochs
    whole = train * config.evaluate.whole_epochs * ("whole" in config.evaluate.sets)
    runs = math.ceil(config.evaluate.repeats / workers)
    whole *= math.ceil(config.evaluate.runs("whole") / workers)
    times = {
        "step": (step, f"{passes:,.0f} passes of the busiest worker x FLOP / bandwidth-bound rate"),
        "pretraining": (rounds * epochs * train, f"{epochs} epochs x {rounds} networks in turn"),
        "distillation": (config.distill.num_steps * step, f"{config.distill.num_steps:,} steps"),
        "evaluation": (
            runs * evaluated * len(config.evaluate.sets) + whole,
            f"{config.evaluate.training.epochs} epochs of {decoded:,} images a set, and `whole`",
        ),
    }
    return [
        Figure(name=name, value=value, text=f"about {duration(value)}", formula=formula)
        for name, (value, formula) in times.items()
    ]


def cluster_lines(figures: Sequence[Figure]) -> str:
    """The figures as text: name, value, formula; then the problems."""
    width = max(len(figure.name) for figure in figures)
    wide = max(len(figure.text) for figure in figures)
    lines = [f"[plan] {f.name.ljust(width)}  {f.text.ljust(wide)}  {f.formula}" for f in figures]
    problems = [f"[plan] {f.name} does not fit: {f.problem}" for f in figures if f.problem]
    return "\n".join([*lines, *(problems or ["[plan] all of it fits"])])
