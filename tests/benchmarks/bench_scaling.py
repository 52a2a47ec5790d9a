"""What distribution costs, and a prediction for many GPUs from measured inputs.

    python tests/benchmarks/bench_scaling.py [--steps 40] [--turns 3] [--out CSV]
    python tests/benchmarks/bench_scaling.py --predict [--images_per_s 9000]

Seconds of a step of the built-in preset. `this process` and `Ray Train`: the same loop without Ray
and as the one worker of Ray Train. `saving`: with checkpoints written all the time. `one worker`
and `two workers`, a core each, without Ray, whose own processes have no third core on a small
machine. `one beside another`: one worker while another, independent one runs on the other core.
`checkpoint`: how long the loop waits for a checkpoint, and how long writing it takes.

`--predict` prints, as JSON, the efficiency at 8, 64 and 512 GPUs for ImageNet-1K at 224 px, IPC 10,
on 100 Gb/s Ethernet, with the model and its inputs. It is a calculation and no row.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from record import Recorder, progress
from upath import UPath

from ncfm.frequencies import FrequencyConfig
from pipeline.cli import parse_command
from pipeline.graph import Run
from pipeline.observe.progress import read_rows
from pipeline.runtime.assignment import ClassCost, assign
from pipeline.runtime.checkpoint import CheckpointWriter
from pipeline.runtime.collectives import predicted_bytes
from pipeline.runtime.workers import Workers, connect, current_context, fit
from pipeline.stages.distill import Distill
from pipeline.stages.distill_loop import DistillJob, distill_loop

OFTEN, NEVER = 0.0, 1e9


def pinned_loop(arguments: dict[str, Any]) -> None:
    """The loop on one core, its reading and writing threads included: each rank has its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[current_context().rank % len(cores)]})
    try:
        distill_loop(arguments)
    finally:
        os.sched_setaffinity(0, cores)


def simulated_node(arguments: dict[str, Any], rank: int, workers: int, meeting: Path) -> None:
    """One of so many workers, in a process of its own on a core of its own, without Ray."""
    torch.set_num_threads(1)
    if workers > 1:
        where = f"file://{meeting}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=workers)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(rank + arguments["core"]) % len(cores)]})
    distill_loop(arguments)


Sampler = Literal["gaussian", "psi"]
SAMPLERS: tuple[Sampler, ...] = ("gaussian", "psi")


class Bench:
    """One job, run in several ways."""

    def __init__(self, folder: Path, steps: int, real_batch: int) -> None:
        self.folder, self.steps = folder, steps
        options = {
            "storage_path": folder,
            "distill.real_batch": real_batch,
            "distill.num_steps": steps,
            "runtime.max_failures": 0,
            "pretrain.training.epochs": 1,  # a step takes as long with any weights
        }
        run = Run(parse_command([t for k, v in options.items() for t in (f"--{k}", str(v))]))
        run.start()
        self.job: DistillJob = run.stage(Distill).job
        ray.shutdown()  # its processes have no core of their own here

    def _job(
        self, name: str, checkpoint_every_s: float = NEVER, sampler: Sampler = "gaussian"
    ) -> DistillJob:
        place = UPath(self.folder / f"{name}-{time.time_ns()}")
        place.mkdir(parents=True)
        runtime = dataclasses.replace(self.job.runtime, checkpoint_every_s=checkpoint_every_s)
        return dataclasses.replace(
            self.job,
            checkpoints=place,
            metrics=place / "metrics.jsonl",
            runtime=runtime,
            frequencies=dataclasses.replace(self.job.frequencies, sampler=sampler),
        )

    def in_this_process(self, name: str, checkpoint_every_s: float = NEVER) -> float:
        """Median seconds of a step, without Ray."""
        job = self._job(name, checkpoint_every_s)
        pinned_loop({"job": job, "device": "cpu"})
        return _median_step(job)

    def in_ray(self, name: str) -> float:
        """As in_this_process, as the one worker of Ray Train."""
        job = self._job(name)
        group, place = Workers(1, use_gpu=False), job.checkpoints
        fit(pinned_loop, {"job": job}, group, name=place.name, storage=place, max_failures=0)
        return _median_step(job)

    def on_nodes(self, name: str, *workers: int, sampler: Sampler = "gaussian") -> float:
        """As in_this_process, of runs of so many workers each, side by side, a core a worker."""
        context = multiprocessing.get_context("spawn")
        jobs = [self._job(f"{name}-{run}", sampler=sampler) for run in range(len(workers))]
        processes = [
            context.Process(
                target=simulated_node,
                args=(
                    {"job": job, "device": "cpu", "core": run},
                    rank,
                    count,
                    Path(str(job.checkpoints)) / "meet",
                ),
            )
            for run, (job, count) in enumerate(zip(jobs, workers, strict=True))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{name}: a worker ended with {[p.exitcode for p in processes]}")
        return statistics.mean(map(_median_step, jobs))

    def scaling(self, sampler: Sampler, turns: int) -> dict[str, list[float]]:
        """Median seconds of a step with one and with two workers, in turns."""
        variants = {"one worker": (1,), "two workers": (2,), "one beside another": (1, 1)}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(turns):
            for name, workers in variants.items():
                folder = name.replace(" ", "-")
                seconds[name].append(self.on_nodes(folder, *workers, sampler=sampler))
                progress(f"{sampler}, turn {turn + 1} of {turns}: {name}")
        return seconds


def _median_step(job: DistillJob) -> float:
    rows = [row["distill/step_s"] for row in read_rows(job.metrics)]
    return statistics.median(rows[len(rows) // 3 :])


def checkpoint_stall(folder: Path, mib: int) -> tuple[float, float]:
    """How long the loop stands still for a checkpoint, and how long the checkpoint takes."""
    state = {"step": torch.tensor(1), "class/0/images": torch.rand(mib * 2**18)}
    writer = CheckpointWriter(UPath(folder / f"stall-{time.time_ns()}"))
    began = time.perf_counter()
    writer.save(1, {key: value.clone() for key, value in state.items()})
    stalled = time.perf_counter() - began
    writer.wait()
    return stalled, time.perf_counter() - began


def predict(images_per_s: float, *, bytes_per_s: float, latency_s: float) -> dict[str, Any]:
    """Efficiency for ImageNet-1K, 224 px, IPC 10, factor 2, ConvNet-6 of width 128.

    step(W) = passes of the costliest group / rate + ring all-reduces, each of B bytes over n
    workers taking 2 (n - 1) / n B / bandwidth + 2 (n - 1) latency; efficiency = step(1) / (W
    step(W)). Nothing is overlapped, so it is a lower bound.
    """
    dim = 128 * 3 * 3
    frequencies = FrequencyConfig(sampler="psi")
    costs = [ClassCost.of(1024, 10 * 4)] * 1000
    whole = sum(c.shared + c.own for c in costs)

    def ring(size: float, n: int) -> float:
        return 2 * (n - 1) / n * size / bytes_per_s + 2 * (n - 1) * latency_s

    rows = []
    for workers in (1, 8, 64, 512):
        groups = assign(costs, workers)
        compute = max(group.cost(costs) for group in groups) / images_per_s
        psi = predicted_bytes(assign(costs, 2), frequencies, dim=dim) / 2  # the gradient itself
        network = frequencies.ascents * ring(psi, workers)
        messages = [
            (4 * len(g.classes) * (2 * frequencies.num_freqs + 1), len(g.ranks)) for g in groups
        ]
        network += frequencies.ascents * max(ring(size, n) for size, n in messages)
        step = compute + network
        row = {
            "workers": workers,
            "groups": len(groups),
            "compute_s": compute,
            "network_s": network,
            "bytes_per_step": predicted_bytes(groups, frequencies, dim=dim),
            "balance": whole / images_per_s / workers / compute,
            "efficiency": whole / images_per_s / workers / step,
        }
        rows.append(row)
    inputs = {
        "passes_per_s_of_one_gpu, given and not measured here": images_per_s,
        "bandwidth_bytes_per_s": bytes_per_s,
        "latency_s": latency_s,
        "classes": 1000,
        "real_images_per_class": 1024,
        "synthetic_passes_per_class": costs[0].own,
        "feature_dim": dim,
        "num_freqs": frequencies.num_freqs,
    }
    return {"model": predict.__doc__, "inputs": inputs, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--real_batch", type=int, default=200)
    parser.add_argument("--out", type=Path, help="CSV file that gets the rows")
    parser.add_argument("--folder", type=Path, help="where runs and checkpoints go")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument(
        "--images_per_s", type=float, default=9000.0, help="of one GPU at 224 px: assumed"
    )
    parser.add_argument("--latency_s", type=float, default=3e-5)
    args = parser.parse_args()
    if args.predict:
        rows = predict(args.images_per_s, bytes_per_s=100e9 / 8, latency_s=args.latency_s)
        print(json.dumps(rows, indent=1))
        return
    recorder = Recorder("scaling", args.out)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        measure(Path(name), args, recorder)
    recorder.write()


def measure(folder: Path, args: argparse.Namespace, recorder: Recorder) -> None:
    """Checkpoints; two workers against one; Ray Train against this process."""
    for mib in (16, 128):
        waits, takes = zip(*(checkpoint_stall(folder, mib) for _ in range(5)), strict=True)
        recorder.add(f"checkpoint of {mib} MiB", "loop waits", "checkpoint", "s", waits)
        recorder.add(f"checkpoint of {mib} MiB", "written after", "checkpoint", "s", takes)
    torch.set_num_threads(1)
    progress("preparing the job: the stages before distill")
    bench = Bench(folder, args.steps, args.real_batch)
    batch = f"{args.real_batch} real images"
    for sampler in SAMPLERS:
        for variant, values in bench.scaling(sampler, args.turns).items():
            recorder.add(f"{sampler}, {batch}", variant, "step", "s", values)
    connect()
    ways: dict[str, Callable[[], float]] = {
        "this process": lambda: bench.in_this_process("alone"),
        "Ray Train": lambda: bench.in_ray("ray"),
        "saving": lambda: bench.in_this_process("saving", OFTEN),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.turns):
        for name, run in ways.items():
            seconds[name].append(run())
            progress(f"turn {turn + 1} of {args.turns}: {name}")
    for name, values in seconds.items():
        recorder.add(f"gaussian, {batch}", name, "step", "s", values)


if __name__ == "__main__":
    main()
