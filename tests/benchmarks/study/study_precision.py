"""What the extractor in bfloat16 does to the images' gradient: noise that averages out, or a bias?

    python study_precision.py --data FASHION_MNIST --ipc 1,10 \
        --out study_precision.jsonl --width 32 --steps 500 --chunk 16

At some moments of a run in float32, the gradients of the same steps in float32 (g) and in bfloat16
(g + e), many steps from the same images. Appends a row a moment: squared norms of e and of the mean
of g and of e, over that of g. Those of means are estimated without bias: the part of each step's
own noise is taken off.
"""

import json
import sys
from pathlib import Path
from typing import Any

import study
import torch
from study_watch import OTHER, Watched
from torch import Tensor

MOMENTS = (0, 0.2, 0.8)  # of the steps
DRAWS = 48

study.VARIANTS |= {p: {"distill": {"precision": p}} for p in ("float32", "bfloat16")}


def squared_norm_of_mean(draws: Tensor) -> float:
    """Of the expectation that the rows (N, pixels) are draws around."""
    n = len(draws)
    all_of_it = draws.mean(0).square().sum()
    return float((n * all_of_it - draws.square().sum(1).mean()) / (n - 1))


def compare(bench: study.Bench, ipc: int, moment: int) -> dict[str, Any]:
    """A row: both gradients from the images after `moment` steps in float32."""
    single, low = (bench.distiller(p, ipc, 0, watched=Watched) for p in ("float32", "bfloat16"))
    assert isinstance(single, Watched)
    assert isinstance(low, Watched)
    for step in range(moment):
        single.update(bench.real_batch(0, step))
    with torch.no_grad():
        for copy, image in zip(low.images.values(), single.images.values(), strict=True):
            copy.copy_(image)
    found: list[Tensor] = []
    for step in range(OTHER, OTHER + DRAWS):
        real = bench.real_batch(0, step)
        single.step = low.step = step
        found.append(torch.stack([d.gradient(real).flatten() for d in (single, low)]))
    gradient, other = torch.stack(found, 1)
    error, size = other - gradient, float(gradient.square().sum(1).mean())
    return {
        "data": Path(bench.args.data).name,
        "ipc": ipc,
        "step": moment,
        "mean": squared_norm_of_mean(gradient) / size,
        "error": float(error.square().sum(1).mean()) / size,
        "mean_error": squared_norm_of_mean(error) / size,
    }


def main() -> None:
    args = study.parser().parse_args(sys.argv[1:])
    torch.set_num_threads(args.threads)
    bench = study.Bench(args)
    for ipc in map(int, args.ipc.split(",")):
        for moment in MOMENTS:
            row = compare(bench, ipc, int(moment * args.steps))
            print(json.dumps(row), flush=True)
            with Path(args.out).open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
