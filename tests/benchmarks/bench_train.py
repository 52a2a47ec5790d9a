"""Seconds of a training step with the native kernels against PyTorch's layers.

    python tests/benchmarks/bench_train.py [--cases 32 128 pool] [--steps 15] [--out CSV]

It needs no Ray. `plain`: PyTorch's own layers, malloc as it is, whole batches. `layers`: this
project's training without the kernels, as it is without a C++ compiler. `native`: with them.
`32`: ConvNet-3, batches of 128 images of 32 px. `128`: ConvNet-5, batches of 32 images of 128 px.
`pool`: the whole training of a ConvNet-3 as a network of the pool, on grey images of 28 px. All are
of width 128, with augmentation and optimizer. Every variant has a process of its own with all
cores; a case's variants take turns, a step (for `pool`, a training) each.
"""

import argparse
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from plain_training import as_plain_pytorch, plain_model, without_kernels
from record import Recorder, progress

from ncfm.backend.kernels import kernel_logits
from ncfm.images import ImageSpec, InMemoryImages
from ncfm.models import ModelConfig, build_model
from ncfm.train import EpochReport, TrainConfig, train

VARIANTS = ("plain", "layers", "native")
CLASSES = 10
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """Random images, and how they are trained on."""

    size: int
    channels: int
    images: int
    batch: int


CASES = {"32": Case(32, 3, 128, 128), "128": Case(128, 3, 32, 32), "pool": Case(28, 1, 10_000, 128)}
"""`pool` has as many images as --images says."""
WARM_UP = 2  # steps


class Trainer:
    """One case in one variant."""

    def __init__(self, case: Case, variant: str) -> None:
        self.case, self.threads = case, 1 if variant == "plain" else CORES
        torch.set_num_threads(CORES if variant == "plain" else 1)
        self.build = build_model
        if variant == "plain":
            as_plain_pytorch()
            self.build = plain_model
        elif variant == "layers":
            without_kernels()
        self.spec = ImageSpec(
            channels=case.channels,
            image_size=case.size,
            mean=(0.5,) * case.channels,
            std=(0.25,) * case.channels,
            class_names=tuple(map(str, range(CLASSES))),
        )
        shape = (case.images, case.channels, case.size, case.size)
        generator = torch.Generator().manual_seed(0)
        self.data = InMemoryImages(
            torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
            torch.arange(case.images) % CLASSES,
        )

    def train(self, epochs: int, pipe: Connection | None = None) -> None:
        """Train a fresh network; with a pipe, wait for a message before each step but the first,
        and answer with the seconds of each step.
        """
        model = self.build(
            ModelConfig(width=128),
            num_classes=CLASSES,
            channels=self.case.channels,
            image_size=self.case.size,
            seed=0,
        )
        began = time.perf_counter()

        def answer(_: float) -> None:
            nonlocal began
            assert pipe is not None
            pipe.send(time.perf_counter() - began)
            pipe.recv()
            began = time.perf_counter()

        train(
            model,
            self.data,
            self.spec,
            TrainConfig(epochs=epochs, batch_size=self.case.batch),
            seed=0,
            threads=self.threads,
            on_batch=answer if pipe is not None else None,
            report=None if pipe is not None else print_epoch,
        )


def print_epoch(report: EpochReport) -> None:
    """A line for each epoch of a long training."""
    progress(f"epoch {report.epoch + 1} done")


def serve_steps(case: Case, variant: str, steps: int, pipe: Connection) -> None:
    """A training of so many steps; each but the first waits to be asked for."""
    Trainer(case, variant).train(steps, pipe)


def serve_trainings(case: Case, variant: str, epochs: int, pipe: Connection) -> None:
    """Seconds of a whole training, whenever they are asked for, until None is."""
    trainer = Trainer(case, variant)
    pipe.send(0.0)
    while pipe.recv() is not None:
        began = time.perf_counter()
        trainer.train(epochs)
        pipe.send(time.perf_counter() - began)


def measure_steps(case: Case, steps: int) -> dict[str, list[float]]:
    """Variant -> seconds of every step."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    total = steps + WARM_UP
    for variant in VARIANTS:
        pipes[variant], its = spawn.Pipe()
        processes.append(spawn.Process(target=serve_steps, args=(case, variant, total, its)))
        processes[-1].start()
        its.close()
        pipes[variant].recv()  # the first step; then it waits
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(1, total):
        for variant, pipe in pipes.items():
            pipe.send(True)
            spent = pipe.recv()
            if number >= WARM_UP:
                seconds[variant].append(spent)
        progress(f"step {number + 1} of {total}")
    for pipe in pipes.values():
        pipe.send(True)
    for process in processes:
        process.join()
    return seconds


def measure_trainings(case: Case, epochs: int, turns: int) -> dict[str, list[float]]:
    """Variant -> seconds of every training."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for variant in VARIANTS:
        pipes[variant], its = spawn.Pipe()
        processes.append(spawn.Process(target=serve_trainings, args=(case, variant, epochs, its)))
        processes[-1].start()
        its.close()
        pipes[variant].recv()
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(turns):
        for variant, pipe in pipes.items():
            pipe.send(True)
            seconds[variant].append(pipe.recv())
            progress(f"turn {turn + 1} of {turns}, {variant}: {seconds[variant][-1]:.1f} s")
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return seconds


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=15, help="steps of 32 and 128")
    parser.add_argument("--turns", type=int, default=3, help="trainings of pool")
    parser.add_argument("--images", type=int, default=10_000, help="of pool")
    parser.add_argument("--epochs", type=int, default=5, help="of pool")
    parser.add_argument("--out", type=Path, help="CSV file that gets the rows")
    args = parser.parse_args()
    model = build_model(ModelConfig(), num_classes=10, channels=3, image_size=32, seed=0)
    if kernel_logits(model, training=True) is None:
        parser.error("the native kernels do not compile here: there is nothing to compare")
    recorder = Recorder("train", args.out)
    for name in args.cases:
        progress(f"case {name}")
        if name == "pool":
            case = Case(28, 1, args.images, 128)
            label = f"pool: {args.epochs} epochs of {args.images} images"
            seconds = measure_trainings(case, args.epochs, args.turns)
        else:
            label, seconds = name, measure_steps(CASES[name], args.steps)
        for variant, values in seconds.items():
            recorder.add(label, variant, "training" if name == "pool" else "step", "s", values)
    recorder.write()


if __name__ == "__main__":
    main()
