"""The study of README.md: one distillation of one variant, evaluated; no Ray.

    python study.py --data ../shared/data/fashion-mnist --out study.jsonl \
        --variants random,mmd,gaussian,psi-ratio --ipc 1,10 --seeds 0,1,2 --width 128 --steps 1000

Every (variant, ipc, seed) appends one row to `--out`; rows that are there already are not computed
again.
"""

import argparse
import dataclasses
import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ncfm.augment import AugmentConfig
from ncfm.baselines import herding_set, random_set
from ncfm.curation import CurateConfig, soft_labels
from ncfm.distill import DistillConfig, Distiller
from ncfm.evaluate import accuracy, train_and_test
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig, ScaleMixture
from ncfm.images import ImageSpec, InMemoryImages
from ncfm.models import Classifier, ModelConfig, build_model
from ncfm.seeding import keyed_generator, keyed_seed
from ncfm.synthetic import SyntheticConfig, SyntheticSet, initial_images
from ncfm.train import TrainConfig, train

GAUSSIAN = FrequencyConfig(sampler="gaussian", sigma=1.0)
PSI = FrequencyConfig(sampler="psi", sigma=1.0)

COMPILED = 2  # steps, which are not timed
PROBE = 16  # real images of a class that Weighted looks at


class Weighted(Distiller):
    """Frequencies whose scale in every feature dimension follows from what the step's network makes
    of real images: std^-power ("whiten": the distances are of whitened features), or the standard
    deviation between the classes over that within them, to the power ("fisher").

    psi cannot learn these: a dimension means another thing in every network of the pool.
    """

    weighting: tuple[str, float]
    probe: dict[int, Tensor]

    @torch.no_grad()
    def _frequencies(self, number: int) -> tuple[Tensor, Tensor | None]:
        x = torch.stack(
            [
                self.features.normalized(
                    torch.cat(
                        [
                            self.features(self.spec.normalize(chunk.float() / 255))
                            for chunk in images.split(self.features.chunk_size)
                        ]
                    )
                )
                for images in self.probe.values()
            ]
        )
        kind, power = self.weighting
        within = x.std(1).square().mean(0).sqrt() + 1e-6
        between = x.mean(1).std(0) + 1e-6
        weight = x.flatten(0, 1).std(0) + 1e-6 if kind == "whiten" else within / between
        weight = weight.clamp_min(0.05 * weight.mean()) ** -power
        t, log_scales = super()._frequencies(number)
        return t * (weight / weight.square().mean().sqrt()), log_scales


# name -> (distillation, frequencies, factor); everything else is the same for all.
VARIANTS: dict[str, dict[str, Any]] = {
    "random-1": {"steps": 0, "factor": 1},
    "random": {"steps": 0},
    "herding": {"steps": 0, "factor": 1},
    "mmd": {"distill": {"objective": "mmd"}},
    "mmd-raw": {"distill": {"objective": "mmd", "normalize_features": False}},
    "gaussian-0.3": {"frequencies": dataclasses.replace(GAUSSIAN, sigma=0.3)},
    "gaussian": {"frequencies": GAUSSIAN},
    "gaussian-3": {"frequencies": dataclasses.replace(GAUSSIAN, sigma=3.0)},
    "gaussian-10": {"frequencies": dataclasses.replace(GAUSSIAN, sigma=10.0)},
    "psi-plain": {"frequencies": dataclasses.replace(PSI, objective="ncfd", max_ratio=1e4)},
    "psi-bounded": {"frequencies": dataclasses.replace(PSI, objective="ncfd")},
    "psi-excess": {"frequencies": dataclasses.replace(PSI, objective="excess")},
    "psi-ratio": {"frequencies": dataclasses.replace(PSI, objective="ratio")},
    "psi-ratio-fast": {"frequencies": dataclasses.replace(PSI, objective="ratio", lr=1e-2)},
    "psi-own": {"frequencies": dataclasses.replace(PSI, per_network=True, lr=1e-2)},
    "psi-own-ncfd": {
        "frequencies": dataclasses.replace(PSI, per_network=True, lr=1e-2, objective="ncfd")
    },
    "psi-ratio-10": {"frequencies": dataclasses.replace(PSI, objective="ratio", max_ratio=10.0)},
    "bfloat16": {"distill": {"precision": "bfloat16"}},
    "float32": {"distill": {"precision": "float32"}},
    "inner-2": {"distill": {"inner_steps": 2}},
    "inner-4": {"distill": {"inner_steps": 4}},
    "whiten-1": {"weighting": ("whiten", 1.0)},
    "whiten-0.5": {"weighting": ("whiten", 0.5)},
    "unwhiten-0.5": {"weighting": ("whiten", -0.5)},
    "fisher-1": {"weighting": ("fisher", 1.0)},
    "alpha-0.1": {"distill": {"alpha": 0.1}},
    "alpha-0.9": {"distill": {"alpha": 0.9}},
    "alpha-1": {"distill": {"alpha": 1.0}},
    "gaussian-3-alpha-0.9": {
        "frequencies": dataclasses.replace(GAUSSIAN, sigma=3.0),
        "distill": {"alpha": 0.9},
    },
    "freqs-64": {"frequencies": dataclasses.replace(GAUSSIAN, num_freqs=64)},
    "freqs-256": {"frequencies": dataclasses.replace(GAUSSIAN, num_freqs=256)},
    "freqs-4096": {"frequencies": dataclasses.replace(GAUSSIAN, num_freqs=4096)},
    "factor-1": {"factor": 1},
    "no-dsa": {"augment": AugmentConfig(strategy="none")},
    "dsa-all": {"augment": AugmentConfig(strategy="color_crop_cutout", single=False)},
    "calibration-1": {"distill": {"calibration": 1.0}},
    "calibration-0.1": {"distill": {"calibration": 0.1}},
    "init-random-weights": {"pool": "initial"},
    "trained-weights": {"pool": "trained"},
    "soft-labels": {"soft_labels": True},
}


def fashion_mnist(folder: Path) -> tuple[dict[str, InMemoryImages], ImageSpec]:
    """The complete Fashion-MNIST, from its idx files."""

    def read(name: str) -> np.ndarray:
        raw = gzip.decompress((folder / name).read_bytes())
        dims = raw[3]
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)

    sets = {
        split: InMemoryImages(
            torch.from_numpy(read(f"{prefix}-images-idx3-ubyte.gz").copy())[:, None],
            torch.from_numpy(read(f"{prefix}-labels-idx1-ubyte.gz").copy()).long(),
        )
        for split, prefix in (("train", "train"), ("val", "t10k"))
    }
    return sets, _spec(sets["train"], [str(i) for i in range(10)])


def folder_of_images(path: Path, size: int) -> tuple[dict[str, InMemoryImages], ImageSpec]:
    """An ImageFolder tree with train/ and val/."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    resize = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    sets = {}
    for split in ("train", "val"):
        dataset = ImageFolder(path / split, transform=resize)
        items = [dataset[i] for i in range(len(dataset))]
        sets[split] = InMemoryImages(
            torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
        )
    return sets, _spec(sets["train"], dataset.classes)


def _spec(train_set: InMemoryImages, names: list[str]) -> ImageSpec:
    x = train_set.images.float() / 255
    mean, std = x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).tolist()
    return ImageSpec(
        channels=x.shape[1],
        image_size=x.shape[-1],
        mean=tuple(mean),
        std=tuple(std),
        class_names=tuple(names),
    )


class Bench:
    """One data set, one network, one pool; variants are run against them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        path = Path(args.data)
        is_folder = (path / "train").is_dir()
        self.sets, self.spec = (
            folder_of_images(path, args.size) if is_folder else fashion_mnist(path)
        )
        self.model = ModelConfig(width=args.width, depth=args.depth)
        labels = self.sets["train"].labels
        self.by_class = [
            self.sets["train"].images[labels == c] for c in range(self.spec.num_classes)
        ]
        self.pool = self._pool()

    def network(self, seed: int) -> Any:
        spec = self.spec
        return build_model(
            self.model,
            num_classes=spec.num_classes,
            channels=spec.channels,
            image_size=spec.image_size,
            seed=seed,
        )

    def trained(self, member: int) -> Classifier:
        """A network of the pool after its training."""
        network: Classifier = self.network(0)
        network.load_state_dict(self.pool[member][1])
        return network

    def _pool(self) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        args = self.args
        folder = Path(args.pool)
        folder.mkdir(parents=True, exist_ok=True)
        pairs = []
        key = f"{self.spec.image_size}px-w{args.width}-e{args.pool_epochs}-n{args.pool_images}"
        for i in range(args.networks):
            file = folder / f"{key}-{i}.safetensors"
            if not file.exists():
                net = self.network(keyed_seed(1, "pool_network", i))
                pair = {f"initial/{k}": v.clone() for k, v in net.state_dict().items()}
                pick = torch.randperm(
                    len(self.sets["train"]), generator=keyed_generator(1, "pool", i)
                )[: args.pool_images]
                some = InMemoryImages(
                    self.sets["train"].images[pick], self.sets["train"].labels[pick]
                )
                train(
                    net,
                    some,
                    self.spec,
                    TrainConfig(epochs=args.pool_epochs),
                    seed=i,
                    device=self.device,
                )
                print(
                    f"pool {i}",
                    accuracy(net, self.sets["val"], self.spec, device=self.device),
                    flush=True,
                )
                save_file(
                    pair | {f"trained/{k}": v.cpu().clone() for k, v in net.state_dict().items()},
                    file,
                )
            tensors = load_file(file)
            pairs.append(
                tuple(
                    {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(kind)}
                    for kind in ("initial", "trained")
                )
            )
        return pairs  # type: ignore[return-value]

    def distil(self, name: str, ipc: int, seed: int) -> tuple[SyntheticSet, dict[str, Any]]:
        """The synthetic set of a variant, and what was seen on the way."""
        args, variant = self.args, VARIANTS[name]
        synthetic = SyntheticConfig(factor=variant.get("factor", args.factor))
        if not variant.get("steps", 1):
            images = [
                self._herding(x, c, ipc, seed)
                if name == "herding"
                else random_set(x, ipc, seed=seed, class_index=c, factor=synthetic.factor)
                for c, x in enumerate(self.by_class)
            ]
            return self._set(torch.cat(images), ipc, synthetic.factor), {}
        distiller = self.distiller(name, ipc, seed)
        trace: dict[str, list[float]] = {
            "ncfd": [],
            "psi_objective": [],
            "sigma": [],
            "sigma_spread": [],
        }
        began = time.process_time()
        for step in range(args.steps):
            if step == COMPILED:
                began = time.process_time()  # of one thread: no pause counts
            metrics = distiller.update(self.real_batch(seed, step))
            if (step + 1) % max(1, args.steps // 20) == 0:
                for key, value in metrics.items():
                    trace.setdefault(key, []).append(float(value) / self.spec.num_classes)
                if isinstance(distiller.frequencies.sampler, ScaleMixture):
                    with torch.no_grad():
                        noise = torch.randn(64, distiller.frequencies.config.noise_dim).to(
                            self.device
                        )
                        scales = distiller.frequencies.sampler.scales(noise)
                    trace["sigma"].append(float(scales.mean()))
                    trace["sigma_spread"].append(float(scales.log().std()))
        seconds = (time.process_time() - began) / max(1, args.steps - COMPILED)
        images = torch.cat([p.detach().cpu() for p in distiller.images.values()])
        return self._set(images, ipc, synthetic.factor), {"step_cpu_s": seconds, "trace": trace}

    def distiller(
        self, name: str, ipc: int, seed: int, *, watched: type[Distiller] = Distiller
    ) -> Distiller:
        """The distiller of a variant at its first step."""
        args, variant = self.args, VARIANTS[name]
        synthetic = SyntheticConfig(factor=variant.get("factor", args.factor))
        needed, start = synthetic.real_images_needed(ipc), {}
        for c, x in enumerate(self.by_class):
            generator = keyed_generator(seed, "init", c)
            start[c] = initial_images(
                x[torch.randperm(len(x), generator=generator)[:needed]], ipc, synthetic, generator
            )
        pool = {
            "initial": [(a, a) for a, _ in self.pool],
            "trained": [(b, b) for _, b in self.pool],
        }.get(variant.get("pool", ""), self.pool)
        kind = Weighted if "weighting" in variant else watched
        distiller = kind(
            start,
            factor=synthetic.factor,
            spec=self.spec,
            pool=ExtractorPool(self.network(0), pool, device=self.device),
            seed=seed,
            config=DistillConfig(
                **{
                    "num_steps": args.steps,
                    "real_batch": args.real_batch,
                    "lr": args.lr,
                    "calibration": 0.0,  # one ingredient at a time
                    "compile": args.compile,
                    "chunk_size": args.chunk,
                    "precision": args.precision,
                }
                | variant.get("distill", {})
            ),
            frequencies=variant.get("frequencies", GAUSSIAN),
            augment=variant.get("augment", AugmentConfig()),
            device=self.device,
        )
        if isinstance(distiller, Weighted):
            distiller.weighting = variant["weighting"]
            distiller.probe = {c: x[:PROBE] for c, x in enumerate(self.by_class)}
        return distiller

    def real_batch(self, seed: int, step: int) -> dict[int, Tensor]:
        """The real images of a step: class -> (real_batch, C, H, W) uint8."""
        real = {}
        for c, x in enumerate(self.by_class):
            order = torch.randperm(len(x), generator=keyed_generator(seed, "real_batch", step, c))
            real[c] = x[order[: self.args.real_batch]]
        return real

    def _herding(self, real: Tensor, c: int, ipc: int, seed: int) -> Tensor:
        network = self.trained(seed % len(self.pool))
        source = InMemoryImages(real, torch.full((len(real),), c))
        return herding_set(source, ipc, network, self.spec, device=self.device)

    def _set(self, images: Tensor, ipc: int, factor: int) -> SyntheticSet:
        labels = torch.arange(self.spec.num_classes).repeat_interleave(ipc)
        return SyntheticSet(images, labels, factor, self.spec)

    def _soft_labels(self, made: SyntheticSet) -> Tensor:
        teachers = map(self.trained, range(len(self.pool)))
        return soft_labels(made, teachers, CurateConfig(), device=self.device)

    def train_and_test(self, made: SyntheticSet, seed: int, *, soft: bool = False) -> list[float]:
        """Accuracies of fresh networks on the complete test set, after the last epoch."""
        args = self.args
        training = TrainConfig(
            epochs=args.eval_epochs, optimizer="adamw", lr=1e-3, cutmix_prob=0.5,
            milestones=(0.2, 0.4, 0.6, 0.8), gamma=0.5,
            augment=AugmentConfig(),
        )  # fmt: skip
        images, labels = made.decode()
        source = InMemoryImages(images, self._soft_labels(made) if soft else labels)
        return [
            train_and_test(
                source, self.sets["val"], self.spec, model=self.model, training=training,
                seed=keyed_seed(seed, "judge", r), device=self.device,
            ).accuracy
            for r in range(args.repeats)
        ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options of a study."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--data", required=True, help="Fashion-MNIST's idx folder, or a folder with train/ and val/"
    )
    made.add_argument("--out", required=True)
    made.add_argument("--pool", default="runs/study-pool")
    made.add_argument("--variants", default="random,mmd,gaussian,psi-ratio")
    made.add_argument("--ipc", default="1")
    made.add_argument("--seeds", default="0")
    made.add_argument("--lr", type=float, default=0.01)
    made.add_argument("--compile", action="store_true")
    made.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    for name, value in {
        "width": 128, "depth": None, "size": 64, "factor": 2, "steps": 1000, "real_batch": 128,
        "networks": 5, "pool_epochs": 5,
        "pool_images": 20_000, "eval_epochs": 500, "repeats": 3, "chunk": 64, "threads": 1,
    }.items():  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=value)
    return made


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    bench, out = Bench(args), Path(args.out)
    settings = {
        k: v
        for k, v in vars(args).items()
        if k not in {"variants", "ipc", "seeds", "out", "pool", "data", "threads"}
    }
    done = (
        {
            (r["variant"], r["ipc"], r["seed"])
            for r in map(json.loads, out.read_text().splitlines())
            if r["settings"] == settings
        }
        if out.exists()
        else set()
    )
    for ipc in map(int, args.ipc.split(",")):
        for seed in map(int, args.seeds.split(",")):
            for name in args.variants.split(","):
                if (name, ipc, seed) in done:
                    continue
                made, seen = bench.distil(name, ipc, seed)
                values = bench.accuracies(made, seed, soft=VARIANTS[name].get("soft_labels", False))
                row = {
                    "variant": name,
                    "ipc": ipc,
                    "seed": seed,
                    "accuracy": values,
                    **seen,
                    "settings": settings,
                }
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                mean = sum(values) / len(values)
                print(
                    f"ipc {ipc} seed {seed} {name:20s} {100 * mean:.2f}",
                    f"{seen.get('step_cpu_s', 0):.3f} s a step",
                    flush=True,
                )


if __name__ == "__main__":
    main()
