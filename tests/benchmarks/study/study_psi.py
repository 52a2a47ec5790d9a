"""What psi can learn: do the networks of a pool agree on which dimensions need higher frequencies?

    python study_psi.py --data FASHION_MNIST --pool runs/study-pool --width 32

The gradient of psi's objective with respect to the log-scale of every feature dimension, at equal
scales, on the initial images and after some distillation: its cosine between two real batches (and
frequency draws) of one network, and between two networks. A psi that all networks share can only
follow what they agree on. The gradient is also split into the part that is the same in all
dimensions, the part of the position in the feature map, and the rest, that of the channels.
"""

import json
import sys
from itertools import combinations

import study
import torch
from torch import Tensor

from ncfm.communication import SingleProcess
from ncfm.formation import decode
from ncfm.frequencies import FrequencyConfig
from ncfm.matching import Match
from ncfm.psi import GRADIENT_GRID
from ncfm.seeding import keyed_generator

BATCHES, IPC = 4, 10


def gradients(bench: study.Bench, images: Tensor, config: FrequencyConfig) -> Tensor:
    """(networks, batches, D): of the mean objective over the classes, trained networks."""
    spec, per_class = bench.spec, len(images) // bench.spec.num_classes
    rows = []
    for member in range(len(bench.pool)):
        network = bench.trained(member)

        @torch.no_grad()
        def features(pixels: Tensor, network: torch.nn.Module = network) -> Tensor:
            chunks = spec.normalize(pixels).split(16)
            return torch.nn.functional.normalize(torch.cat([network.features(c) for c in chunks]))

        y = [features(decode(part, bench.args.factor)) for part in images.split(per_class)]
        for batch in range(BATCHES):
            z = torch.randn(
                config.num_freqs, y[0].shape[1], generator=keyed_generator(0, "study_psi", batch)
            )
            x = [
                features(
                    real[
                        torch.randperm(len(real), generator=keyed_generator(0, "batch", batch, c))
                    ][:128].float()
                    / 255
                )
                for c, real in enumerate(bench.by_class)
            ]
            match = Match(x, y, z, SingleProcess())
            match.objective(config, 0.5)
            total = torch.zeros(1, z.shape[1], dtype=torch.float64)
            match.add_scale_gradients(total, GRADIENT_GRID)
            rows.append((total[0] * GRADIENT_GRID).float())
    return torch.stack(rows).unflatten(0, (len(bench.pool), BATCHES))


def agreement(g: Tensor) -> dict[str, float]:
    """Mean cosines of gradients (networks, batches, D)."""
    unit = torch.nn.functional.normalize(g, dim=-1)
    networks, batches = range(len(g)), range(BATCHES)
    same = [float(unit[n, a] @ unit[n, b]) for n in networks for a, b in combinations(batches, 2)]
    other = [
        float(unit[n, a] @ unit[m, b])
        for n, m in combinations(networks, 2)
        for a in batches
        for b in batches
    ]
    return {
        "one network, two batches": sum(same) / len(same),
        "two networks": sum(other) / len(other),
    }


def report(g: Tensor, width: int) -> dict[str, object]:
    """Cosines of the whole gradient and of its channels' part, and shares of its squared norm."""
    mean = g.mean(-1, keepdim=True)
    maps = g.unflatten(-1, (width, -1))
    position = (maps.mean(-2, keepdim=True) - mean[..., None]).expand_as(maps).flatten(-2)
    channel = g - mean - position
    whole = g.square().sum()
    return {
        "all": agreement(g),
        "channels": agreement(channel),
        "share of the squared norm": {
            "overall scale": float(mean.expand_as(g).square().sum() / whole),
            "position": float(position.square().sum() / whole),
            "channels": float(channel.square().sum() / whole),
        },
    }


def main() -> None:
    args = study.parser().parse_args([*sys.argv[1:], "--out", "none"])
    torch.set_num_threads(args.threads)
    bench = study.Bench(args)
    start, _ = bench.distil("random", IPC, 0)
    made, _ = bench.distil("gaussian", IPC, 0)
    result = {
        f"{objective}, {name}": report(
            gradients(
                bench, images, FrequencyConfig(sampler="psi", sigma=1.0, objective=objective)
            ),
            args.width,
        )
        for objective in ("ncfd", "ratio")
        for name, images in (("initial", start.images), (f"step {args.steps}", made.images))
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
