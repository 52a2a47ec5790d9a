"""Time to accuracy on Fashion-MNIST, IPC 10: the paper's loop and evaluation, and the pipeline's.

    python tests/benchmarks/bench_accuracy.py --data FASHION_MNIST [--out CSV]

`FASHION_MNIST` holds the publisher's four idx .gz files. It needs no Ray. `paper`: the step of
reference_loop.py (psi, no calibration) and evaluation networks in plain PyTorch. `pipeline`:
fixed frequencies, calibration and the kernels. Both start from the same pool and real images.

Distillation and evaluation of one network, until the mean of `--repeats` networks reaches a target:
steps that it takes x median seconds of a step + seconds of an evaluation. The paper's loop would
take hours, so its images are those of the fast step with its settings, which are the same up to
rounding (tests/unit/test_reference.py); its seconds are its own. The pool is not counted.
"""

import argparse
import dataclasses
import gzip
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_training import as_plain_pytorch, plain_model
from record import Recorder, progress
from reference_loop import ReferenceLoop
from torch import Tensor

import ncfm.backend.features
from ncfm.arrays import spec_of
from ncfm.augment import AugmentConfig
from ncfm.distill import DistillConfig, Distiller
from ncfm.evaluate import train_and_test
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.images import ImageSpec, InMemoryImages
from ncfm.models import Classifier, ModelConfig, build_model
from ncfm.seeding import keyed_generator
from ncfm.synthetic import SyntheticConfig, SyntheticSet, initial_images
from ncfm.train import TrainConfig, released_training, train

IPC, REAL_BATCH, CLASSES, NETWORKS = 10, 128, 10, 2
COLOR_CROP = AugmentConfig(strategy="color_crop", single=False)
COLOR_CROP_CUTOUT = AugmentConfig(strategy="color_crop_cutout", single=False)
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {
        "config": DistillConfig(lr=0.01, calibration=0, real_batch=REAL_BATCH),
        "frequencies": FrequencyConfig(sampler="psi"),
        "augment": AugmentConfig(),
    },
    "pipeline": {
        "config": DistillConfig(lr=0.01, calibration=10, real_batch=REAL_BATCH),
        "frequencies": FrequencyConfig(),
        "augment": COLOR_CROP_CUTOUT,
    },
}
Pairs = list[tuple[dict[str, Tensor], dict[str, Tensor]]]


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,) of the publisher's files."""

    def data(name: str, header: int) -> np.ndarray:
        content = gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes())
        return np.frombuffer(content, np.uint8, offset=header).copy()

    images = torch.from_numpy(data("images-idx3", 16)).view(-1, 1, 28, 28)
    return images, torch.from_numpy(data("labels-idx1", 8)).long()


def network(seed: int) -> Classifier:
    """A ConvNet-3 of width 128."""
    shape = {"num_classes": CLASSES, "channels": 1, "image_size": 28}
    return build_model(ModelConfig(), **shape, seed=seed)


def make_pool(images: Tensor, labels: Tensor, spec: ImageSpec, epochs: int) -> Pairs:
    """Initial and trained weights."""
    pairs = []
    for member in range(NETWORKS):
        model = network(100 + member)
        initial = {key: value.clone() for key, value in model.state_dict().items()}
        training = TrainConfig(epochs=epochs, lr=0.02, augment=COLOR_CROP)
        threads = torch.get_num_threads()
        train(model, InMemoryImages(images, labels), spec, training, seed=member, threads=threads)
        pairs.append((initial, dict(model.state_dict())))
        progress(f"network {member + 1} of {NETWORKS} of the pool")
    return pairs


def make_distiller(
    variant: str, first: dict[int, Tensor], pairs: Pairs, spec: ImageSpec
) -> Distiller:
    """The step of a variant; of the paper's, by the fast implementation."""
    pool = ExtractorPool(network(0), pairs)
    return Distiller(first, factor=2, spec=spec, pool=pool, seed=0, **VARIANTS[variant])


def real_batches(by_class: dict[int, Tensor], step: int) -> dict[int, Tensor]:
    """A keyed choice of every class."""
    return {
        c: real[
            torch.randperm(len(real), generator=keyed_generator(0, "real", step, c))[:REAL_BATCH]
        ]
        for c, real in by_class.items()
    }


def evaluate(
    synthetic: SyntheticSet, test: InMemoryImages, epochs: int, seed: int, threads: int
) -> float:
    """Accuracy in percent of a fresh network."""
    torch.set_num_threads(threads)
    training = dataclasses.replace(released_training(epochs), schedule="cosine")
    return 100 * train_and_test(
        synthetic.source(), test, synthetic.spec,
        model=ModelConfig(), training=training, seed=seed, threads=threads,
    ).accuracy  # fmt: skip


def steps_until(
    variant: str, distiller: Distiller, by_class: dict[int, Tensor], test: InMemoryImages,
    args: argparse.Namespace, recorder: Recorder,
) -> dict[float, int]:  # fmt: skip
    """Target -> steps after which the networks' mean accuracy reaches it; those not reached are
    left out.
    """
    found: dict[float, int] = {}
    spawn = multiprocessing.get_context("spawn")
    for point in args.points:
        while distiller.step < point:
            distiller.update(real_batches(by_class, distiller.step))
        images = torch.cat([p.detach().float() for p in distiller.images.values()])
        labels = torch.arange(CLASSES).repeat_interleave(IPC)
        synthetic = SyntheticSet(images, labels, 2, distiller.spec, {})
        with ProcessPoolExecutor(args.repeats, mp_context=spawn) as executor:
            tasks = [
                executor.submit(evaluate, synthetic, test, args.epochs, seed, 1)
                for seed in range(args.repeats)
            ]
            accuracies = [task.result() for task in tasks]
        recorder.add(f"after {point} steps", variant, "test accuracy", "%", accuracies)
        mean = statistics.fmean(accuracies)
        for target in args.targets:
            if mean >= target:
                found.setdefault(target, point)
        if len(found) == len(args.targets):
            break
    return found


def step_seconds(
    variant: str, first: dict[int, Tensor], pairs: Pairs, spec: ImageSpec,
    batches: dict[int, Tensor], steps: int,
) -> list[float]:  # fmt: skip
    """Of the loop itself, in a process of its own: `keep_freed_memory` outlasts a step."""
    if variant == "paper":
        ncfm.backend.features.keep_freed_memory = lambda: False
    loop: Distiller | ReferenceLoop = make_distiller(variant, first, pairs, spec)
    if variant == "paper":
        folder = Path(tempfile.mkdtemp())
        for number, pair in enumerate(pairs):
            torch.save(pair, folder / f"{number}.pt")
        loop = ReferenceLoop(loop, plain_model(ModelConfig(), num_classes=CLASSES, channels=1,
                             image_size=28, seed=0), folder)  # fmt: skip
    seconds = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        loop.update(batches)
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def evaluation_seconds(
    variant: str, synthetic: SyntheticSet, test: InMemoryImages, epochs: int
) -> float:
    """Of one network on all cores, in a process of its own."""
    threads = torch.get_num_threads()
    if variant == "paper":
        as_plain_pytorch()
    evaluate(synthetic, test, 1, 0, threads)  # warm up
    began = time.perf_counter()
    evaluate(synthetic, test, epochs, 0, threads)
    return time.perf_counter() - began


def measure(args: argparse.Namespace, recorder: Recorder) -> None:
    """Curves first, then the seconds, in turns."""
    (images, labels), test = read(args.data, "train"), InMemoryImages(*read(args.data, "t10k"))
    spec = spec_of(images, [str(c) for c in range(CLASSES)])
    pairs = make_pool(images, labels, spec, args.pool_epochs)
    by_class = {c: images[labels == c] for c in range(CLASSES)}
    config = SyntheticConfig()
    first = {
        c: initial_images(
            real[: config.real_images_needed(IPC)], IPC, config, keyed_generator(0, "first", c)
        )
        for c, real in by_class.items()
    }
    reached = {
        variant: steps_until(
            variant, make_distiller(variant, first, pairs, spec), by_class, test, args, recorder
        )
        for variant in VARIANTS
    }
    stored = torch.cat(list(first.values()))
    synthetic = SyntheticSet(stored, torch.arange(CLASSES).repeat_interleave(IPC), 2, spec, {})
    steps: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    evaluations: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    spawn = multiprocessing.get_context("spawn")
    for turn in range(args.turns):
        for variant in VARIANTS:
            with ProcessPoolExecutor(1, mp_context=spawn) as executor:
                batches = real_batches(by_class, 0)
                arguments = (variant, first, pairs, spec, batches, args.steps)
                steps[variant] += executor.submit(step_seconds, *arguments).result()
            with ProcessPoolExecutor(1, mp_context=spawn) as executor:
                task = executor.submit(evaluation_seconds, variant, synthetic, test, args.epochs)
                evaluations[variant].append(task.result())
            progress(f"turn {turn + 1} of {args.turns}, {variant}")
    for variant in VARIANTS:
        recorder.add("a step", variant, "time", "s", steps[variant])
        recorder.add(f"{args.epochs} epochs", variant, "evaluation", "s", evaluations[variant])
        for target, count in reached[variant].items():
            step, evaluation = map(statistics.median, (steps[variant], evaluations[variant]))
            case = f"until {target:g} %"
            recorder.add(case, variant, "steps", "", [count])
            recorder.add(case, variant, "whole", "s", [count * step + evaluation])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four idx .gz files")
    parser.add_argument("--targets", nargs="+", type=float, default=[82, 84])
    parser.add_argument("--points", nargs="+", type=int, default=[25, 50, 100, 200, 400, 800, 1600])
    parser.add_argument("--pool_epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=200, help="of an evaluation")
    parser.add_argument("--repeats", type=int, default=2, help="evaluation networks")
    parser.add_argument("--steps", type=int, default=5, help="timed in a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, help="CSV file that gets the rows")
    args = parser.parse_args()
    recorder = Recorder("accuracy", args.out)
    measure(args, recorder)
    recorder.write()


if __name__ == "__main__":
    main()
