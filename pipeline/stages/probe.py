"""Time and memory of distillation steps and of training, measured on random images.

Each probe is a separate process, so that its memory is that of a worker.
"""

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from ncfm.backend.features import default_graph_images
from ncfm.distill import Distiller
from ncfm.extractors import ExtractorPool
from ncfm.images import ImageSpec, InMemoryImages
from ncfm.train import train
from pipeline.data.pool import new_network
from pipeline.errors import StageError
from pipeline.runtime.assignment import FEWEST_IMAGES, ClassCost
from pipeline.runtime.failures import one_line
from pipeline.runtime.identity import peak_rss_bytes

if TYPE_CHECKING:
    from pipeline.config import RunConfig

TRAINED_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """Workload of a probe: the share of one worker."""

    config: "RunConfig"
    classes: int  # of the data set
    real: list[int]  # real images per batch, for each of the worker's classes
    stored: list[int]  # stored images of each of them
    threads: int
    seconds: float  # approximate time limit of the steps
    device: str = "cpu"  # "cpu", or "cuda": one GPU per probe


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Result of a probe."""

    step_s: float
    whole: bool  # whether whole steps were timed, not extrapolated from a part
    train_image_s: float  # seconds to train on one image
    memory: int  # resident bytes, without the worker's real images
    working: int  # the part of it that the steps added; on a GPU this is GPU memory
    gpu_memory: int | None  # bytes; None: no GPU
    pass_flops: int  # forward pass of one image


def run_probes(request: Request, count: int) -> list[Answer]:
    """Run `count` probes concurrently, as workers would on this machine. Raises StageError."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=fresh, max_tasks_per_child=1) as processes:
        try:
            return list(processes.map(probe, probe_requests(request, count)))
        except Exception as error:
            raise StageError(f"the probe failed: {one_line(error)}") from error


def probe_requests(request: Request, count: int) -> list[Request]:
    """The requests of `count` probes, each with its own GPU if on GPUs."""
    if request.device != "cuda":
        return [request] * count
    return [dataclasses.replace(request, device=f"cuda:{place}") for place in range(count)]


@dataclass(frozen=True)
class _Part:
    """Part of a worker's share: real images and stored images of each class."""

    real: Sequence[int]
    stored: Sequence[int]

    def passes(self, config: "RunConfig") -> float:
        tiles, calibrated = config.synthetic.factor**2, config.distill.calibration > 0
        costs = [
            ClassCost.of(n, tiles * images, calibrated=calibrated)
            for n, images in zip(self.real, self.stored, strict=True)
        ]
        return sum(cost.shared + cost.own for cost in costs)

    def scaled(self, share: float) -> "_Part":
        """A part with about this share of the passes: fewer classes, or fewer images of one."""
        count = max(1, round(share * len(self.real)))
        rest = min(1.0, share * len(self.real))
        real, stored = (
            [max(1, round(rest * n)) for n in side[:count]] for side in (self.real, self.stored)
        )
        return _Part(real, stored)

    def kept(self, config: "RunConfig") -> int:
        """Decoded synthetic images with a live graph: about those of the largest class."""
        most = config.distill.graph_images or default_graph_images(config.shard.image_size)
        return min(max(self.stored) * config.synthetic.factor**2, most)


def probe(request: Request) -> Answer:
    """Measure step time, training time and memory in this process."""
    import ray.train.torch  # noqa: F401 # for its memory, which a worker has too

    torch.set_num_threads(request.threads)
    config = request.config
    device = torch.device(request.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    spec = image_spec(config, request.classes)
    network = new_network(config.model, spec, seed=0)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    epochs = config.pretrain.snapshot_epochs
    if config.distill.extractor == "blend":
        epochs = epochs[:1] + epochs[-1:]
    trajectories = [[state] * len(epochs)] * config.pretrain.networks
    pool = ExtractorPool(network, trajectories, epochs=epochs, device=device)
    before = peak_rss_bytes()
    whole = _Part(request.real, request.stored)
    small = _Part(request.real[:1], [1]).scaled(min(1.0, FEWEST_IMAGES / request.real[0]))
    first = _time_steps(config, spec, pool, small, device, steps=1)
    steps = config.plan.max_steps
    expected = first * whole.passes(config) / small.passes(config) * (1 + steps)
    part = whole if expected <= request.seconds else whole.scaled(request.seconds / expected)
    seconds = _time_steps(config, spec, pool, part, device, steps=steps)
    working = (peak_rss_bytes() - before) * whole.kept(config) / part.kept(config)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return Answer(
        step_s=seconds * whole.passes(config) / part.passes(config),
        whole=part == whole,
        train_image_s=_time_training(config, spec, device),
        memory=round(before + working),
        working=round(working),
        gpu_memory=reserved,
        pass_flops=forward_flops(config, spec),
    )


def forward_flops(config: "RunConfig", spec: ImageSpec) -> int:
    """FLOP of the forward pass of one image."""
    network = new_network(config.model, spec, seed=0).to("meta")  # avoids the CPU pooling path
    shape = (1, spec.channels, spec.image_size, spec.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(shape, device="meta"))
    flops: int = counter.get_total_flops()
    return flops


def image_spec(config: "RunConfig", classes: int) -> ImageSpec:
    """ImageSpec of a run's images, with placeholder mean, std and class names."""
    channels = config.shard.channels
    return ImageSpec(
        channels=channels,
        image_size=config.shard.image_size,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        class_names=tuple(map(str, range(classes))),
    )


def _time_steps(
    config: "RunConfig",
    spec: ImageSpec,
    pool: ExtractorPool,
    part: _Part,
    device: torch.device,
    *,
    steps: int,
) -> float:
    """Seconds per step: the median of `steps` after one warm-up step."""
    shape = (spec.channels, spec.image_size, spec.image_size)
    images = {c: torch.rand(n, *shape) for c, n in enumerate(part.stored)}
    real = {c: torch.randint(256, (n, *shape)).byte() for c, n in enumerate(part.real)}
    distiller = Distiller(
        images,
        factor=config.synthetic.factor,
        spec=spec,
        pool=pool,
        seed=0,
        config=config.distill,
        frequencies=config.frequencies,
        augment=config.augment,
        num_classes=spec.num_classes,
        device=device,
    )

    def step() -> None:
        batches = {c: batch[torch.randperm(len(batch))] for c, batch in real.items()}
        distiller.update(batches)

    return _median(step, steps, device)


def _time_training(config: "RunConfig", spec: ImageSpec, device: torch.device) -> float:
    """Training seconds per image, including augmentation."""
    training = dataclasses.replace(config.pretrain.training, epochs=1)
    count = TRAINED_BATCHES * training.batch_size
    shape = (count, spec.channels, spec.image_size, spec.image_size)
    data = InMemoryImages(torch.randint(256, shape).byte(), torch.arange(count) % spec.num_classes)
    network = new_network(config.model, spec, seed=0)
    return (
        _median(lambda: train(network, data, spec, training, seed=0, device=device), 1, device)
        / count
    )


def _median(work: Callable[[], object], times: int, device: torch.device) -> float:
    seconds = []
    for _ in range(1 + times):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
