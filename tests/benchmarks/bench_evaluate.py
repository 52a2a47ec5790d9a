"""Training of evaluation networks against the same loop in PyTorch's own layers and allocator.

    python tests/benchmarks/bench_evaluate.py --out runs/bench [--repeats 5] [--processes 2]

The built-in preset's networks are trained one by one, with one thread, as tasks of the evaluate
stage are: on as many images as its synthetic set shows (40, 200 epochs) and as its whole set has.
`plain` is ours with nn.AvgPool2d for average pooling, whole batches, and malloc as it comes. The
variants take turns, a network each, in processes of their own. Prints a table and writes
evaluate.json: seconds a network, their ratio, and the accuracies, whose differences are those of
rounding, grown over a training.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from reference_loop import plain

import ncfm.evaluate
import ncfm.train
from ncfm.evaluate import judge
from ncfm.images import ImageSpec, InMemoryImages
from ncfm.models import Classifier, ModelConfig, build_model
from pipeline.config import PRESETS, parse_command

CASES = {"small": 4, "whole": 200}  # images of a class
VARIANTS = ("plain", "ours")
CLASSES, SIZE, TEST = 10, 32, 50


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


def serve(case: str, variant: str, pipe: Connection) -> None:
    """Train the network of every seed that comes, and answer with its seconds and accuracy."""
    torch.set_num_threads(1)
    if variant == "plain":
        ncfm.train.keep_freed_memory = lambda: False  # type: ignore[attr-defined]
        ncfm.train.PART_PIXELS = 2**40

        def build(*args: Any, **options: Any) -> Classifier:
            return plain(build_model(*args, **options))

        ncfm.evaluate.build_model = build  # type: ignore[attr-defined]
    config = parse_command(["--config", str(PRESETS / "builtin.toml")]).config
    training = config.evaluate.training
    if case == "whole":
        training = dataclasses.replace(training, epochs=config.evaluate.whole_epochs)
    spec = ImageSpec(
        channels=3, image_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3,
        class_names=tuple(map(str, range(CLASSES))),
    )  # fmt: skip
    sets = stripes(CASES[case], 0), stripes(TEST, 1)

    def train(seed: int, epochs: int) -> tuple[float, float]:
        settings = dataclasses.replace(training, epochs=epochs)
        model: ModelConfig = config.model
        began = time.perf_counter()
        result = judge(*sets, spec, model=model, training=settings, seed=seed).accuracy
        return time.perf_counter() - began, result

    train(0, 1)  # warm up
    while (seed := pipe.recv()) is not None:
        pipe.send(train(seed, training.epochs))


def measure(case: str, repeats: int, processes: int) -> list[dict[str, Any]]:
    """A row of each variant; `processes` networks are trained at a time."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, list[Connection]] = {variant: [] for variant in VARIANTS}
    running = []
    for variant in VARIANTS:
        for _ in range(processes):
            mine, its = spawn.Pipe()
            running.append(spawn.Process(target=serve, args=(case, variant, its)))
            running[-1].start()
            its.close()
            pipes[variant].append(mine)
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for start in range(0, repeats, processes):
        for variant in VARIANTS:
            batch = list(
                zip(pipes[variant], range(start, min(start + processes, repeats)), strict=False)
            )
            for pipe, seed in batch:
                pipe.send(seed)
            found[variant] += [pipe.recv() for pipe, _ in batch]
    for pipe in [pipe for mine in pipes.values() for pipe in mine]:
        pipe.send(None)
    for process in running:
        process.join()
    rows = []
    for variant in VARIANTS:
        seconds, accuracies = (list(values) for values in zip(*found[variant], strict=True))
        rows.append(
            {
                "case": case,
                "variant": variant,
                "seconds": seconds,
                "median_s": statistics.median(seconds),
                "accuracy": accuracies,
            }
        )
    rows[-1]["times_faster"] = rows[0]["median_s"] / rows[-1]["median_s"]
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5, help="networks of a set")
    parser.add_argument("--processes", type=int, default=1, help="networks at a time")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    rows = [r for case in args.cases for r in measure(case, args.repeats, args.processes)]
    print(f"{'case':6} {'variant':8} {'s/network':>9} {'faster':>7}  accuracies in %")
    for row in rows:
        accuracies = " ".join(f"{100 * value:.1f}" for value in row["accuracy"])
        print(
            f"{row['case']:6} {row['variant']:8} {row['median_s']:9.2f} "
            f"{row.get('times_faster', 1.0):7.2f}  {accuracies}"
        )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        result = {"repeats": args.repeats, "processes": args.processes, "rows": rows}
        (args.out / "evaluate.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
