"""What a distillation does on its way: psi's scales, distances to held-out images, gradient noise.

    python study_watch.py --data FASHION_MNIST --out study_watch.jsonl \
        --ipc 1,10 --variants mmd,gaussian,psi-ratio --width 32 --steps 500 --chunk 16

At ten moments of a run, with the pool's trained networks and without augmentation: the distances
between the synthetic and held-out (test) images by yardsticks that do not change, whatever is
descended (NCFD at N(0, I) and at N(0, 9 I), both of normalised features, and the linear MMD). And
how alike the images' gradients are, as the mean cosine over the classes, when one thing of a step
is drawn anew: the real batch, the frequencies, or all (network and augmentation, too).
"""

import json
import sys
from pathlib import Path
from typing import Any

import study
import torch
import torch.nn.functional as F
from torch import Tensor

from ncfm.discrepancy import empirical_cf, linear_mmd, ncfd
from ncfm.distill import Distiller
from ncfm.formation import decode
from ncfm.frequencies import ScaleMixture
from ncfm.seeding import keyed_generator

MOMENTS, HELD_OUT = 10, 256  # of a class
OTHER = 10**6  # beyond all steps, and all draws of a step


class Watched(Distiller):
    """A distiller that can say what its gradient would be, and stay as it is."""

    looking, other_draw = False, 0

    def gradient(
        self, real: dict[int, Tensor], *, other_step: bool = False, other_draw: bool = False
    ) -> Tensor:
        """(classes, pixels): of this step's loss on a real batch, by other draws on demand."""
        step, self.looking, self.other_draw = self.step, True, OTHER * other_draw
        self.step += OTHER * other_step
        self.update(real)
        self.step, self.looking, self.other_draw = step, False, 0
        return self.found

    def _step_images(self, stored: list[Tensor]) -> None:
        if self.looking:
            self.found = torch.stack([p.grad.flatten() for p in stored if p.grad is not None])
        else:
            super()._step_images(stored)

    def _step_psi(self, ascent: Any) -> None:
        if not self.looking:
            super()._step_psi(ascent)

    def _frequencies(self, number: int) -> tuple[Tensor, Tensor | None]:
        return super()._frequencies(number + self.other_draw)


class Yardsticks:
    """Distances to held-out images that do not depend on what is distilled, or how."""

    def __init__(self, bench: study.Bench) -> None:
        self.bench, labels = bench, bench.sets["val"].labels
        held_out = [
            bench.sets["val"].images[labels == c][:HELD_OUT].float() / 255
            for c in range(bench.spec.num_classes)
        ]
        self.networks = [bench.trained(member) for member in range(len(bench.pool))]
        self.real = [[self._features(net, x) for x in held_out] for net in self.networks]
        dim = self.real[0][0].shape[1]
        self.t = torch.randn(1024, dim, generator=keyed_generator(0, "study_watch"))

    @torch.no_grad()
    def _features(self, network: Any, images: Tensor) -> Tensor:
        chunks = self.bench.spec.normalize(images).split(16)
        return F.normalize(torch.cat([network.features(chunk) for chunk in chunks]))

    @torch.no_grad()
    def distances(self, distiller: Distiller) -> dict[str, float]:
        """Means over the classes and the networks."""
        values: dict[str, list[float]] = {"ncfd_1": [], "ncfd_3": [], "mmd": []}
        for network, real in zip(self.networks, self.real, strict=True):
            for x, stored in zip(real, distiller.images.values(), strict=True):
                y = self._features(network, decode(stored, distiller.factor))
                for sigma in (1, 3):
                    both = [empirical_cf(side, sigma * self.t) for side in (x, y)]
                    values[f"ncfd_{sigma}"].append(float(ncfd(*both)))
                values["mmd"].append(float(linear_mmd(x, y)))
        return {name: sum(of) / len(of) for name, of in values.items()}


def watch(bench: study.Bench, yardsticks: Yardsticks, name: str, ipc: int) -> list[dict[str, Any]]:
    """What is seen of a variant at each moment."""
    distiller = bench.distiller(name, ipc, 0, watched=Watched)
    assert isinstance(distiller, Watched)
    seen, steps = [], bench.args.steps
    for step in range(steps + 1):
        if step % (steps // MOMENTS) == 0:
            real, other = bench.real_batch(0, step), bench.real_batch(0, step + OTHER)
            gradient = distiller.gradient(real)
            anew = {
                "batch": distiller.gradient(other),
                "frequencies": distiller.gradient(real, other_draw=True),
                "all": distiller.gradient(other, other_step=True),
            }
            cosines = {
                f"cosine_{what}": float(F.cosine_similarity(gradient, g).mean())
                for what, g in anew.items()
            }
            row = {"variant": name, "ipc": ipc, "step": step}
            seen.append(row | yardsticks.distances(distiller) | cosines | _scales(distiller))
            print(json.dumps(seen[-1]), flush=True)
        if step < steps:
            distiller.update(bench.real_batch(0, step))
    return seen


@torch.no_grad()
def _scales(distiller: Distiller) -> dict[str, float]:
    """psi's scales: their geometric mean, and the standard deviation of their logarithms over the
    feature dimensions and over psi's components.
    """
    if not isinstance(distiller.frequencies.sampler, ScaleMixture):
        return {}
    noise = torch.randn(
        64, distiller.frequencies.config.noise_dim, generator=keyed_generator(0, "noise")
    )
    log = distiller.frequencies.sampler.log_scales(noise)
    return {
        "scale": float(log.mean().exp()),
        "spread_dimensions": float(log.mean(0).std()),
        "spread_components": float(log.mean(1).std()),
    }


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """Markdown: the first moment that shows a variant's own way, and the last."""
    columns = [name for row in rows for name in row if name not in ("variant", "ipc", "step")]
    columns = list(dict.fromkeys(columns))
    lines = ["| IPC | variant | step | " + " | ".join(columns) + " |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for row in rows:
        if row["step"] in (steps // MOMENTS, steps):
            values = [f"{row[name]:.3f}" if name in row else "" for name in columns]
            lines.append(
                f"| {row['ipc']} | {row['variant']} | {row['step']} | {' | '.join(values)} |"
            )
    return "\n".join(lines)


def main() -> None:
    args = study.parser().parse_args(sys.argv[1:])
    torch.set_num_threads(args.threads)
    bench = study.Bench(args)
    yardsticks = Yardsticks(bench)
    rows = [
        row
        for ipc in map(int, args.ipc.split(","))
        for name in args.variants.split(",")
        for row in watch(bench, yardsticks, name, ipc)
    ]
    Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows, args.steps))


if __name__ == "__main__":
    main()
