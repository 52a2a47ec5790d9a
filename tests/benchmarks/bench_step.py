"""The minmax step against the paper's own loop (reference_loop.py): ratios in one run, without Ray.

    python tests/benchmarks/bench_step.py --out runs/bench [--cases 32 128] [--steps 5] [--starts 5]
    python tests/benchmarks/bench_step.py --parts 32-psi
    python tests/benchmarks/bench_step.py --device cuda --cases cifar100 cifar100-psi

Each variant lives in a process of its own, since allocators and compiled code outlast a step, and
the variants take turns, a step each. Where a process has its memory makes a step some per cent
quicker or slower for good: `--starts` starts all of them afresh so many times, and the medians are
of all steps. Prints a table and writes step.json: median seconds, their ratio, MiB of a step, the
FLOP rate beside that of this machine's convolutions alone, and what psi adds to the case without
it. MiB are of tensors, at the step's height beyond what is held between steps, counted from what
PyTorch allocates and frees, not sampled; `resident`: those by which the process grows in a step,
with scratch and what malloc leaves unused. (On a GPU: all tensors there, weights and images
included.) `--parts`: where the time of the compiled step goes, on a CPU.
"""

import argparse
import ctypes
import json
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


def network(size: int, classes: int, seed: int) -> Classifier:
    return build_model(ModelConfig(), num_classes=classes, channels=3, image_size=size, seed=seed)


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
            (network(size, classes, i).state_dict(), network(size, classes, 10 + i).state_dict())
            for i in range(2)
        ]

        def images(count: int, c: int) -> torch.Tensor:
            generator = keyed_generator(0, "bench", c)
            shape = (count, 3, size, size)
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

        distiller = Distiller(
            {c: images(case["ipc"], c).float() / 255 for c in range(classes)},
            factor=2,
            spec=spec,
            pool=ExtractorPool(network(size, classes, 0), pairs, device=device),
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
            self.loop = ReferenceLoop(distiller, network(size, classes, 0), folder)

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
        size, classes = self.case["size"], self.case["classes"]
        model = plain(network(size, classes, 0)).requires_grad_(False)
        image = torch.zeros(1, 3, size, size, requires_grad=True)
        with FlopCounterMode(display=False) as there:
            features = model.features(image)
        with FlopCounterMode(display=False) as back:
            features.sum().backward()
        one, way = there.get_total_flops(), back.get_total_flops()
        synthetic = 4 * self.case["ipc"] * (2 if self.case.get("calibration") else 1)
        return classes * (self.case["real"] * one + synthetic * (one + way)) / 1e9


def _status(name: str) -> int:
    """KiB of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


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
) -> list[dict[str, Any]]:
    """Rows of all cases and variants, from one start of their processes; the steps take turns, over
    all of them.
    """
    processes = {
        (name, variant): Process(name, variant, device) for name in names for variant in variants
    }
    for process in processes.values():
        for _ in range(2):  # compile, warm up
            process.ask("step")
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in processes}
    for _ in range(steps):
        for variant in variants:
            for name in names:  # with psi right after without: the machine's speed varies
                seconds[name, variant].append(processes[name, variant].ask("step"))
    rows = []
    for (name, variant), process in processes.items():
        row = {"case": name, "variant": variant, "all_seconds": seconds[name, variant]}
        if device.type == "cpu":
            row["all_resident_mib"] = [process.ask("resident_mib") for _ in range(7)]
        row |= {what: process.ask(what) for what in ("tensor_mib", "gigaflop")}
        rows.append(row)
        process.close()
    return rows


def compare(starts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all starts, with their medians and the ratios of these."""
    rows = []
    for same in zip(*starts, strict=True):
        row = dict(same[0])
        for each in row.keys() & {"all_seconds", "all_resident_mib"}:
            row[each] = [value for start in same for value in start[each]]
            row[each.removeprefix("all_")] = statistics.median(row[each])
        rows.append({**row, "gflops": row["gigaflop"] / row["seconds"]})
    found = {(row["case"], row["variant"]): row for row in rows}
    for (case, variant), row in found.items():
        if plain := found.get((case, "reference")):
            row["times_faster"] = plain["seconds"] / row["seconds"]
            for memory in row.keys() & {"tensor_mib", "resident_mib"}:
                row[f"{memory}_ratio"] = row[memory] / plain[memory]
        if case.endswith("-psi") and (off := found.get((case.removesuffix("-psi"), variant))):
            row["psi_time"] = row["seconds"] / off["seconds"] - 1
            row["psi_memory"] = row["tensor_mib"] / off["tensor_mib"] - 1
    return rows


def cell(row: dict[str, Any], name: str, form: str) -> str:
    """As wide as it is where there is nothing to compare with."""
    return format(row[name], form) if name in row else " " * len(format(0.0, form))


PARTS: dict[str, tuple[Any, str]] = {
    "extractor, real images": (FeatureExtractor, "real"),
    "extractor, synthetic images, forward": (FeatureExtractor, "synthetic"),
    "of these two, augmentation": (Augment, "apply"),
    "angles, cosines and sines": (Match, "__init__"),
    "the images' gradient w.r.t. features": (Match, "descent"),
    "psi's objective": (Match, "objective"),
    "psi's gradient": (Match, "add_scale_gradients"),
    "psi's step": (Distiller, "_step_psi"),
    "frequencies": (Distiller, "_frequencies"),
    "weights": (ExtractorPool, "blend"),
    "the images' step": (Distiller, "_step_images"),
}


def print_parts(case: str, steps: int) -> None:
    """Mean seconds of a step's parts, by the clock."""
    seconds = dict.fromkeys([*PARTS, "the way back to the pixels"], 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[part] += time.perf_counter() - began
            if part == "extractor, synthetic images, forward":
                return result[0], timed("the way back to the pixels", result[1])
            return result

        return call

    for part, (owner, name) in PARTS.items():
        setattr(owner, name, timed(part, getattr(owner, name)))
    variant = Variant(CASES[case], "compiled", torch.device("cpu"))
    for _ in range(2):
        variant.step()
    seconds.update(dict.fromkeys(seconds, 0.0))
    whole = sum(variant.step() for _ in range(steps))
    for part, total in seconds.items():
        print(f"{part:40} {total / steps:.4f}")
    print(f"{'the whole step':40} {whole / steps:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
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
            parser.error("--parts times a step on a CPU: on a GPU the clock sees launches alone")
        print_parts(args.parts, args.steps)
        return
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    precisions = {name: VARIANTS[name].get("precision", "float32") for name in args.variants}
    peaks = {
        precision: convolution_gflops(args.device, getattr(torch, precision))
        for precision in set(precisions.values())
    }
    starts = []
    for number in range(args.starts):
        starts.append(measure(args.cases, args.variants, args.steps, args.device))
        print(f"start {number + 1} of {args.starts} measured", file=sys.stderr, flush=True)
    rows = compare(starts)
    print(f"{device_name(args.device)}, {torch.get_num_threads()} threads")
    print(
        f"{'case':18} {'variant':10} {'seconds':>8} {'faster':>7} {'MiB':>6} {'ratio':>6} "
        f"{'resident':>8} {'ratio':>6} {'psi: time':>9} {'memory':>6} GFLOP/s"
    )
    for row in rows:
        peak = peaks[precisions[row["variant"]]]
        print(
            f"{row['case']:18} {row['variant']:10} {row['seconds']:8.3f} "
            f"{cell(row, 'times_faster', '7.2f')} {row['tensor_mib']:6.1f} "
            f"{cell(row, 'tensor_mib_ratio', '6.2f')} {cell(row, 'resident_mib', '8.0f')} "
            f"{cell(row, 'resident_mib_ratio', '6.2f')} {cell(row, 'psi_time', '+9.1%')} "
            f"{cell(row, 'psi_memory', '+6.1%')} {row['gflops']:5.0f} "
            f"({100 * row['gflops'] / peak:.0f} % of a convolution's)"
        )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        result = {"device": device_name(args.device), "threads": torch.get_num_threads()}
        result |= {"convolution_gflops": peaks, "rows": rows}
        (args.out / "step.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
