"""Seconds of training a set's evaluation networks: plain PyTorch against the evaluate stage.

    python tests/benchmarks/bench_evaluate.py [--cases small] [--repeats 5] [--turns 3] [--out CSV]

It needs no Ray. `plain`: PyTorch's own layers, malloc as it is, whole batches, one network after
another, each on all cores. `pipeline`: as the evaluate stage trains them, a network a core, and the
remaining ones share the cores. The networks are the built-in preset's: those of one set of as many
images as its synthetic set shows (`small`: 40 images), of its whole set (`whole`: 2000
images), and of all four sets of its stage (`stage`). The variants take turns, all
networks of a case each. Accuracies differ by rounding, which a training amplifies.
"""

import argparse
import dataclasses
import multiprocessing
import os
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from plain_training import as_plain_pytorch
from record import Recorder, progress

from ncfm.evaluate import train_and_test
from ncfm.images import ImageSpec, InMemoryImages
from pipeline.cli import PRESETS, parse_command
from pipeline.runtime.tasks import thread_shares

WHOLE = 200
CASES = {"small": [4], "whole": [WHOLE], "stage": [1, 4, 4, WHOLE]}
"""Sets of so many images of a class: random, of the same factor, distilled, whole."""
VARIANTS = ("plain", "pipeline")
CLASSES, SIZE, TEST = 10, 32, 50
CORES = len(os.sched_getaffinity(0))


def stripes(count: int, seed: int) -> InMemoryImages:
    """Images (N, 3, 32, 32) of stripes, whose angle is the class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(count)
    y, x = torch.meshgrid(torch.arange(SIZE) / SIZE, torch.arange(SIZE) / SIZE, indexing="ij")
    angles = labels[:, None, None] * torch.pi / CLASSES
    phases = torch.rand(len(labels), 1, 1, generator=generator)
    waves = torch.sin(2 * torch.pi * (4 * (x * angles.cos() + y * angles.sin()) + phases))
    noise = torch.rand(len(labels), 3, SIZE, SIZE, generator=generator)
    pixels = (0.1 * waves[:, None] + 0.1 + 0.8 * noise) * 255
    return InMemoryImages(pixels.to(torch.uint8), labels)


def serve(variant: str, pipe: Connection) -> None:
    """Train the network of every (images of a class, seed) that comes; answer with its accuracy."""
    if variant == "pipeline":
        torch.set_num_threads(1)
    else:
        torch.set_num_threads(CORES)
        as_plain_pytorch()
    config = parse_command(["--config", str(PRESETS / "builtin.toml")]).config
    spec = ImageSpec(
        channels=3, image_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3,
        class_names=tuple(map(str, range(CLASSES))),
    )  # fmt: skip
    test = stripes(TEST, 1)

    def train(count: int, seed: int, threads: int = 1, epochs: int | None = None) -> float:
        whole, training = config.evaluate.whole_epochs, config.evaluate.training
        epochs = epochs or (whole if count == WHOLE else training.epochs)
        settings = dataclasses.replace(training, epochs=epochs)
        sets = stripes(count, 0), test
        return train_and_test(
            *sets, spec, model=config.model, training=settings, seed=seed, threads=threads
        ).accuracy

    train(4, 0, epochs=1)  # warm up
    pipe.send(None)
    while (task := pipe.recv()) is not None:
        pipe.send(train(*task))


def train_all(
    pipes: list[Connection], tasks: list[tuple[int, int]], threads: list[int]
) -> tuple[float, list[float]]:
    """Seconds and accuracies of some networks, each trained by whoever is free once its threads
    are.
    """
    began, waiting, found = time.perf_counter(), list(range(len(tasks))), {}
    working: dict[Connection, int] = {}
    idle, free = list(pipes), len(pipes)
    while waiting or working:
        while waiting and threads[waiting[0]] <= free:
            pipe, number = idle.pop(), waiting.pop(0)
            free -= threads[number]
            pipe.send((*tasks[number], threads[number]))
            working[pipe] = number
        for done in wait(list(working)):
            assert isinstance(done, Connection)
            number = working.pop(done)
            found[number] = done.recv()
            progress(f"network {len(found)} of {len(tasks)} trained")
            idle.append(done)
            free += threads[number]
    return time.perf_counter() - began, [found[number] for number in range(len(tasks))]


def measure(case: str, repeats: int, turns: int, recorder: Recorder) -> None:
    """Train all networks of a case in turns."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, list[Connection]] = {variant: [] for variant in VARIANTS}
    running = []
    for variant in VARIANTS:
        for _ in range(CORES if variant == "pipeline" else 1):
            mine, its = spawn.Pipe()
            running.append(spawn.Process(target=serve, args=(variant, its)))
            running[-1].start()
            its.close()
            mine.recv()
            pipes[variant].append(mine)
    found: dict[str, list[tuple[float, list[float]]]] = {variant: [] for variant in VARIANTS}
    tasks = [(count, seed) for count in CASES[case] for seed in range(repeats)]
    for turn in range(turns):
        for variant in VARIANTS:
            servers = pipes[variant]
            found[variant].append(
                train_all(servers, tasks, thread_shares(len(tasks), len(servers)))
            )
            progress(
                f"{case}, turn {turn + 1} of {turns}, {variant}: {found[variant][-1][0]:.1f} s"
            )
    for pipe in [pipe for mine in pipes.values() for pipe in mine]:
        pipe.send(None)
    for process in running:
        process.join()
    label = f"{case}: {len(tasks)} network{'s' * (len(tasks) > 1)}"
    for variant in VARIANTS:
        recorder.add(label, variant, "training", "s", [seconds for seconds, _ in found[variant]])
    for variant in VARIANTS:
        accuracies = [100 * value for value in found[variant][0][1]]
        recorder.add(label, variant, "test accuracy", "%", accuracies)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="networks of a set")
    parser.add_argument("--turns", type=int, default=3, help="times that each variant trains them")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="CSV file that gets the rows")
    args = parser.parse_args()
    recorder = Recorder("evaluate", args.out)
    for case in args.cases:
        measure(case, args.repeats, args.turns, recorder)
    recorder.write()


if __name__ == "__main__":
    main()
