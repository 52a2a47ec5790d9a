"""A short measured probe: steps of a distillation, and of training, on random images.

Each is a process of its own, so that its memory is that of a worker.
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
    """What a probe is asked for: the share of one worker."""

    config: "RunConfig"
    classes: int  # of the data set
    real: list[int]  # real images in a batch, of each class that the worker has
    threads: int
    seconds: float  # how long the steps may take, about
    device: str = "cpu"  # "cpu", or "cuda": one GPU a probe


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a probe found."""

    step_s: float
    whole: bool  # whether whole steps were timed; else a part, and multiplied
    train_image_s: float  # seconds to train on an image
    memory: int  # bytes resident, without the real images that a worker keeps
    working: int  # of these, what the steps added: on a GPU it is there
    gpu_memory: int | None  # bytes, if it ran on one
    pass_flops: int  # of one image through the network


def run_probes(request: Request, count: int) -> list[Answer]:
    """So many probes side by side, as workers would be on this machine. Raises StageError."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=fresh, max_tasks_per_child=1) as processes:
        try:
            return list(processes.map(probe, probe_requests(request, count)))
        except Exception as error:
            raise StageError(f"the probe failed: {one_line(error)}") from error


def probe_requests(request: Request, count: int) -> list[Request]:
    """The requests of that many probes; on GPUs each has its own."""
    if request.device != "cuda":
        return [request] * count
    return [dataclasses.replace(request, device=f"cuda:{place}") for place in range(count)]


@dataclass(frozen=True)
class _Part:
    """Part of a worker's share: real images of each class, and stored ones a class."""

    real: Sequence[int]
    ipc: int

    def passes(self, config: "RunConfig") -> float:
        synthetic = self.ipc * config.synthetic.factor**2
        calibrated = config.distill.calibration > 0
        costs = [ClassCost.of(n, synthetic, calibrated=calibrated) for n in self.real]
        return sum(cost.shared + cost.own for cost in costs)

    def scaled(self, share: float) -> "_Part":
        """About this share of the passes: fewer classes, or less of one."""
        count = max(1, round(share * len(self.real)))
        rest = min(1.0, share * len(self.real))
        real = [max(1, round(rest * n)) for n in self.real[:count]]
        return _Part(real, max(1, round(rest * self.ipc)))

    def kept(self, config: "RunConfig") -> int:
        """Decoded synthetic images whose graph is in memory at once: those of a class, about."""
        most = config.distill.graph_images or default_graph_images(config.shard.image_size)
        return min(self.ipc * config.synthetic.factor**2, most)


def probe(request: Request) -> Answer:
    """Time the steps in this process."""
    import ray.train.torch  # noqa: F401 # a worker has it in memory, too

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
    whole = _Part(request.real, config.ipc)
    small = _Part(request.real[:1], 1).scaled(min(1.0, FEWEST_IMAGES / request.real[0]))
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
    """FLOP of one image through the network, forward."""
    network = new_network(config.model, spec, seed=0).to("meta")  # not a CPU's way of pooling
    shape = (1, spec.channels, spec.image_size, spec.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(shape, device="meta"))
    flops: int = counter.get_total_flops()
    return flops


def image_spec(config: "RunConfig", classes: int) -> ImageSpec:
    """What the images of a run would look like, but for their colours."""
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
    """Seconds of a step, the median of `steps` after one that is not counted."""
    shape = (spec.channels, spec.image_size, spec.image_size)
    images = {c: torch.rand(part.ipc, *shape) for c in range(len(part.real))}
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
    """Seconds to train on one image, augmentation included."""
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
