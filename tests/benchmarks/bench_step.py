"""Seconds and memory of a distillation step against the paper's own loop (reference_loop.py).

    python tests/benchmarks/bench_step.py [--cases 32 128] [--steps 5] [--starts 5] [--out CSV]
    python tests/benchmarks/bench_step.py --parts 32-psi
    python tests/benchmarks/bench_step.py --device cuda --cases cifar100 cifar100-psi

It needs no Ray. Each variant has a process of its own, since allocators and compiled code outlast a
step, and the variants take turns, a step each. The memory layout of a process makes all of its
steps a few per cent faster or slower: `--starts` starts all processes afresh so many times, and the
medians are over all steps.

`tensors`: MiB of tensors at the peak of a step beyond those held between steps, counted from
PyTorch's allocations (on a GPU, of all tensors there). `resident`: MiB by which the process grows
in a step, with scratch memory and what malloc leaves unused. `extractor`: GFLOP/s by the definition
of a convolution. `--parts`: where the time of a compiled step on a CPU goes.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from record import Recorder, progress
from reference_loop import ReferenceLoop, plain
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import ncfm.backend.features
import ncfm.distill  # a module that the package's function of this name hides
from ncfm.augment import Augment, AugmentConfig
from ncfm.backend.features import FeatureExtractor
from ncfm.distill import DistillConfig, Distiller
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.image_optimizer import ImageOptimizer
from ncfm.images import ImageSpec
from ncfm.matching import Match
from ncfm.models import Classifier, ModelConfig, build_model
from ncfm.seeding import keyed_generator

CASES: dict[str, dict[str, Any]] = {
    "32": {"size": 32, "classes": 10, "real": 128, "ipc": 10},
    "32-psi": {"size": 32, "classes": 10, "real": 128, "ipc": 10, "psi": True},
    "128": {"size": 128, "classes": 10, "real": 32, "ipc": 1},
    "128-psi": {"size": 128, "classes": 10, "real": 32, "ipc": 1, "psi": True},
    "32-calibrated": {"size": 32, "classes": 10, "real": 128, "ipc": 10, "calibration": 1.0},
    "32-batch256": {"size": 32, "classes": 10, "real": 256, "ipc": 20},
    "32-classes100": {"size": 32, "classes": 100, "real": 128, "ipc": 10},
    "32-classes100-psi": {"size": 32, "classes": 100, "real": 128, "ipc": 10, "psi": True},
    "64-classes1000": {"size": 64, "classes": 1000, "real": 32, "ipc": 10, "width": 16},
    "cifar100": {"size": 32, "classes": 100, "real": 1024, "ipc": 10},  # the paper's table 3
    "cifar100-psi": {"size": 32, "classes": 100, "real": 1024, "ipc": 10, "psi": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {"compile": False},
    "eager": {"compile": False},
    "compiled": {"compile": True},
    "bfloat16": {"compile": True, "precision": "bfloat16"},
    "graphs": {"compile": True, "precision": "bfloat16", "cuda_graphs": True},
}


def network(case: dict[str, Any], seed: int) -> Classifier:
    model = ModelConfig(width=case.get("width", ModelConfig.width))
    shape = {"num_classes": case["classes"], "image_size": case["size"]}
    return build_model(model, channels=3, **shape, seed=seed)


class Variant:
    """What a process runs: one case, by our step or by the reference."""

    def __init__(self, case: dict[str, Any], name: str, device: torch.device) -> None:
        reference = name == "reference"
        size, classes = case["size"], case["classes"]
        self.case, self.device = case, device
        if reference:  # the plain loop leaves the allocator as it is
            ncfm.backend.features.keep_freed_memory = lambda: False
        spec = ImageSpec(
            channels=3, image_size=size, mean=(0.5,) * 3, std=(0.25,) * 3,
            class_names=tuple(map(str, range(classes))),
        )  # fmt: skip
        pairs = [
            (network(case, i).state_dict(), network(case, 10 + i).state_dict()) for i in range(2)
        ]

        def images(count: int, c: int) -> torch.Tensor:
            generator = keyed_generator(0, "bench", c)
            shape = (count, 3, size, size)
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

        distiller = Distiller(
            {c: images(case["ipc"], c).float() / 255 for c in range(classes)},
            factor=2,
            spec=spec,
            pool=ExtractorPool(network(case, 0), pairs, device=device),
            seed=0,
            config=DistillConfig(calibration=case.get("calibration", 0.0), **VARIANTS[name]),
            frequencies=FrequencyConfig(sampler="psi" if case.get("psi") else "gaussian"),
            augment=AugmentConfig(),
            device=device,
        )
        self.real = {c: images(case["real"], 1000 + c).to(device) for c in range(classes)}
        self.loop: Distiller | ReferenceLoop = distiller
        if reference:
            folder = Path(tempfile.mkdtemp())
            for number, pair in enumerate(pairs):
                torch.save(pair, folder / f"{number}.pt")
            self.loop = ReferenceLoop(distiller, network(case, 0), folder)

    def step(self) -> float:
        began = time.perf_counter()
        self.loop.update(self.real)
        synchronize(self.device)
        return time.perf_counter() - began

    def tensor_mib(self) -> float:
        """MiB of tensors at the height of a step beyond those held before it; on a GPU, of all."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated() / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()  # what it leaves, the next step frees
            with record_function("the step"):
                self.step()
        assert profiler.profiler is not None
        events = profiler.profiler.kineto_results.events()
        began = next(event.start_ns() for event in events if event.name() == "the step")
        changes = [
            (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
        ]
        return max(accumulate(change for at, change in sorted(changes) if at >= began)) / 2**20

    def resident_mib(self) -> float:
        """MiB by which the process grows in a step."""
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the greatest so far
        self.step()
        return (_status("VmHWM") - before) / 1024

    def gigaflop(self) -> float:
        """Of the extractor in one step, with no more passes than the method needs: the real images
        forward, the synthetic ones forward and back to the pixels.
        """
        size = self.case["size"]
        model = plain(network(self.case, 0)).requires_grad_(False)
        image = torch.zeros(1, 3, size, size, requires_grad=True)
        with FlopCounterMode(display=False) as there:
            features = model.features(image)
        with FlopCounterMode(display=False) as back:
            features.sum().backward()
        one, way = there.get_total_flops(), back.get_total_flops()
        synthetic = 4 * self.case["ipc"] * (2 if self.case.get("calibration") else 1)
        return self.case["classes"] * (self.case["real"] * one + synthetic * (one + way)) / 1e9


def _status(name: str) -> int:
    """KiB of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def convolution_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP a second of the widest convolution of ConvNet-3 alone, as it is quickest there."""
    on_gpu = device.type == "cuda"
    count = 1024 if on_gpu else 16
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    x, weight = (
        torch.rand(*shape, device=device).to(dtype, memory_format=layout)
        for shape in ((count, 128, 16, 16), (128, 128, 3, 3))
    )
    seconds = []
    with torch.no_grad():
        for _ in range(50):
            synchronize(device)
            began = time.perf_counter()
            torch.nn.functional.conv2d(x, weight, padding=1)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
    return 2 * count * 128 * 128 * 9 * 16 * 16 / statistics.median(seconds) / 1e9


class Process:
    """A Variant in a process of its own, asked through a pipe."""

    def __init__(self, case: str, variant: str, device: torch.device) -> None:
        command = [sys.executable, __file__, "--device", str(device), "--serve", case, variant]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a variant ended with {self.process.wait()}")
        return float(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(case: str, name: str, device: torch.device) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    variant = Variant(CASES[case], name, device)
    for line in sys.stdin:
        print(getattr(variant, line.strip())(), file=answers, flush=True)


def measure(
    names: list[str], variants: list[str], steps: int, device: torch.device
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(case, variant) -> quantity -> values, from one start of all processes. The steps take turns,
    over all of them.
    """
    processes = {
        (name, variant): Process(name, variant, device) for name in names for variant in variants
    }
    for number, (key, process) in enumerate(processes.items()):
        progress(f"warm-up of {' '.join(key)}: {number + 1} of {len(processes)}")
        for _ in range(2):  # compile, warm up
            process.ask("step")
    values: dict[tuple[str, str], dict[str, list[float]]] = {key: {"step": []} for key in processes}
    for number in range(steps):
        for variant in variants:
            for name in names:  # with psi right after without: the machine's speed varies
                values[name, variant]["step"].append(processes[name, variant].ask("step"))
            progress(f"step {number + 1} of {steps}, {variant}")
    for key, process in processes.items():
        if device.type == "cpu":
            values[key]["resident"] = [process.ask("resident_mib") for _ in range(3)]
        values[key]["tensors"] = [process.ask("tensor_mib")]
        gigaflop = process.ask("gigaflop")
        values[key]["extractor"] = [gigaflop / seconds for seconds in values[key]["step"]]
        progress(f"memory of {' '.join(key)}")
        process.close()
    return values


UNITS = {"step": "s", "resident": "MiB", "tensors": "MiB", "extractor": "GFLOP/s"}


FORWARD, BACKWARD = "extractor, synthetic, forward", "extractor, synthetic, backward"
PARTS: dict[str, tuple[Any, str]] = {
    "extractor, real": (FeatureExtractor, "real"),
    FORWARD: (FeatureExtractor, "synthetic"),
    "augmentation (part of the forward passes)": (Augment, "apply"),
    "angles, cosines and sines": (Match, "__init__"),
    "gradient w.r.t. synthetic features": (Match, "descent"),
    "psi's objective": (Match, "objective"),
    "psi's gradient": (Match, "add_scale_gradients"),
    "psi's step": (Distiller, "_step_psi"),
    "sampling frequencies": (Distiller, "_frequencies"),
    "blending the weights": (ExtractorPool, "blend"),
    "the images' optimizer step": (ImageOptimizer, "step"),
}


def measure_parts(case: str, steps: int, recorder: Recorder) -> None:
    """Seconds of a step's parts, by the clock."""
    seconds = dict.fromkeys([*PARTS, BACKWARD], 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[part] += time.perf_counter() - began
            if part == FORWARD:
                return result[0], timed(BACKWARD, result[1])
            return result

        return call

    for part, (owner, name) in PARTS.items():
        setattr(owner, name, timed(part, getattr(owner, name)))
    variant = Variant(CASES[case], "compiled", torch.device("cpu"))
    for _ in range(2):
        variant.step()
    found: dict[str, list[float]] = {part: [] for part in [*seconds, "whole step"]}
    for number in range(steps):
        seconds.update(dict.fromkeys(seconds, 0.0))
        found["whole step"].append(variant.step())
        for part, spent in seconds.items():
            found[part].append(spent)
        progress(f"step {number + 1} of {steps}")
    for part, values in found.items():
        recorder.add(case, "compiled", part, "s", values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV file that gets the rows")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["32", "32-psi", "128"])
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["reference", "eager", "compiled"]
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--parts", choices=CASES)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve, args.device)
        return
    if args.parts:
        if args.device.type != "cpu":
            parser.error("--parts needs a CPU: on a GPU the clock sees kernel launches alone")
        recorder = Recorder("parts", args.out)
        measure_parts(args.parts, args.steps, recorder)
        recorder.write()
        return
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    recorder = Recorder("step", args.out, str(args.device))
    total: dict[tuple[str, str], dict[str, list[float]]] = {}
    for number in range(args.starts):
        progress(f"start {number + 1} of {args.starts}")
        for key, values in measure(args.cases, args.variants, args.steps, args.device).items():
            for quantity, more in values.items():
                total.setdefault(key, {}).setdefault(quantity, []).extend(more)
    for (case, variant), quantities in total.items():
        for quantity, unit in UNITS.items():
            if quantity in quantities:
                recorder.add(case, variant, quantity, unit, quantities[quantity])
    dtypes = {VARIANTS[name].get("precision", "float32") for name in args.variants}
    for dtype in sorted(dtypes):
        rates = [convolution_gflops(args.device, getattr(torch, dtype))]
        recorder.add("one convolution", dtype, "forward", "GFLOP/s", rates)
    recorder.write()


if __name__ == "__main__":
    main()
