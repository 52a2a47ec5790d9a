"""The step against the paper's own loop (tests/benchmarks/reference_loop.py), which shares none of
its chunks, sums and gradients with it.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ncfm.augment import AugmentConfig
from ncfm.distill import DistillConfig, Distiller
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.images import ImageSpec
from ncfm.models import Classifier, ModelConfig, build_model
from ncfm.seeding import keyed_generator

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from reference_loop import ReferenceLoop

CLASSES, SIZE = 3, 16
SPEC = ImageSpec(
    channels=3, image_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3, class_names=("a", "b", "c")
)
FREQUENCIES = FrequencyConfig(
    sampler="psi", num_freqs=64, num_components=4, noise_dim=4, hidden=16, lr=1e-3
)
CONFIG = DistillConfig(
    lr=0.01, loss_weight=30.0, calibration=0.5, precision="float64", compile=False
)
ROUNDED_OFF = 1e-6 * CLASSES  # at most, of the sum of the losses: sqrt(eps) of ncfd's square root


def network(seed: int) -> Classifier:
    config = ModelConfig(depth=2, width=8)
    return build_model(config, num_classes=CLASSES, channels=3, image_size=SIZE, seed=seed)


def images(count: int, c: int) -> Tensor:
    generator = keyed_generator(0, "test_reference", c)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
REAL = {c: images(11 + c, 100 + c) for c in range(CLASSES)}


def pair(
    folder: Path, config: DistillConfig, sampler: str = "gaussian", device: str = "cpu"
) -> tuple[Distiller, ReferenceLoop]:
    """Both loops, before their first step."""
    pairs = [(network(i).state_dict(), network(10 + i).state_dict()) for i in range(2)]
    distiller = Distiller(
        {c: images(2, c) / 255 for c in range(CLASSES)},
        factor=2,
        spec=SPEC,
        pool=ExtractorPool(network(0), pairs, device=device),
        seed=3,
        config=config,
        frequencies=dataclasses.replace(FREQUENCIES, sampler=sampler),  # type: ignore[arg-type]
        augment=AugmentConfig(),
        device=device,
    )
    dtype = getattr(torch, config.precision)
    for number, states in enumerate(pairs):
        torch.save(
            tuple({k: v.to(dtype) for k, v in state.items()} for state in states),
            folder / f"{number}.pt",
        )
    return distiller, ReferenceLoop(distiller, network(0).to(dtype), folder)


def gradients(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> list[Tensor]:
    """The gradients of the first step of Adam, from its first moment."""
    beta = optimizer.param_groups[0]["betas"][0]
    return [optimizer.state[p]["exp_avg"] / (1 - beta) for p in parameters]


def both_gradients(distiller: Distiller, reference: ReferenceLoop) -> tuple[Tensor, Tensor]:
    """Of the images of all classes."""
    ours = gradients(distiller.optimizer.optimizer, list(distiller.images.values()))
    theirs = gradients(reference.optimizer, list(reference.images.values()))
    return torch.stack(ours), torch.stack(theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [8, 64])
@pytest.mark.parametrize("calibration", [0.0, 0.5])
def test_fixed_frequencies(
    tmp_path: Path, calibration: float, chunk_size: int, device: str
) -> None:
    """The loss, the gradient and the images of every step, in float64."""
    config = dataclasses.replace(CONFIG, calibration=calibration, chunk_size=chunk_size)
    distiller, reference = pair(tmp_path, config, device=device)
    for step in range(3):
        ours, theirs = distiller.update(REAL), reference.update(REAL)
        assert float(ours["ncfd"]) == pytest.approx(theirs["ncfd"], abs=ROUNDED_OFF)
        if calibration:
            assert float(ours["calibration"]) == pytest.approx(theirs["calibration"], rel=1e-6)
        assert ("calibration" in theirs) == bool(calibration)
        if not step:
            torch.testing.assert_close(*both_gradients(distiller, reference), rtol=1e-6, atol=1e-9)
        for c, image in distiller.images.items():
            torch.testing.assert_close(image, reference.images[c], rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [8, 64])
def test_psi(tmp_path: Path, chunk_size: int, device: str) -> None:
    """psi's objective and gradient, and images and psi of every step, in float64."""
    config = dataclasses.replace(CONFIG, chunk_size=chunk_size)
    distiller, reference = pair(tmp_path, config, "psi", device)
    reference.psi.double()
    for step in range(3):
        ours, theirs = distiller.update(REAL), reference.update(REAL)
        precise = pytest.approx(theirs["calibration"], rel=1e-6 if step else 1e-9)
        assert float(ours["calibration"]) == precise
        for name in ("psi_objective", "ncfd"):
            assert float(ours[name]) == pytest.approx(theirs[name], abs=ROUNDED_OFF, rel=1e-6)
        assert distiller.frequencies.optimizer is not None
        assert reference.psi_optimizer is not None
        if not step:
            mine = gradients(
                distiller.frequencies.optimizer, list(distiller.frequencies.sampler.parameters())
            )
            others = gradients(reference.psi_optimizer, list(reference.psi.parameters()))
            assert max(float(g.abs().max()) for g in mine) > 1e-6
            for one, other in zip(mine, others, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)
        for c, image in distiller.images.items():
            torch.testing.assert_close(image, reference.images[c], rtol=0, atol=1e-5)
        scales = zip(
            distiller.frequencies.sampler.parameters(), reference.psi.parameters(), strict=True
        )
        for one, other in scales:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"alpha": 0.6}, {"blend": (0.5, 0.5)}, {"normalize_features": False}],
)
def test_another_method_is_another_gradient(tmp_path: Path, changes: dict[str, object]) -> None:
    """Negative control: what the reference does not do, or does differently, shows."""
    distiller, _ = pair(tmp_path, dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]
    _, reference = pair(tmp_path, CONFIG)
    distiller.update(REAL)
    reference.update(REAL)
    ours, theirs = both_gradients(distiller, reference)
    assert float((ours - theirs).norm() / theirs.norm()) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_is_eager_and_compiles_once(tmp_path: Path, device: str) -> None:
    """Chunks of one shape: nothing is compiled after the first step, whatever sizes classes have;
    and the compiled step is the eager one up to float32's rounding. On a GPU by CUDA graphs.
    """
    from torch._dynamo.utils import counters

    frames = []
    precision = "float32" if device == "cpu" else "float64"  # a GPU rounds float32 to TF32
    config = dataclasses.replace(CONFIG, precision=precision, chunk_size=8, cuda_graphs=True)
    loops = [
        pair(tmp_path, dataclasses.replace(config, compile=on), "psi", device)[0]
        for on in (True, False)
    ]
    counters.clear()
    for step in range(4):
        real = {c: REAL[c][: 5 + 2 * step + c] for c in range(CLASSES)}
        compiled, eager = (loop.update(real) for loop in loops)
        frames.append((counters["frames"]["ok"], counters["stats"]["unique_graphs"]))
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)
        if not step:
            ours, theirs = (
                torch.stack(gradients(loop.optimizer.optimizer, list(loop.images.values())))
                for loop in loops
            )
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    assert frames[0][0] > 0
    assert len(set(frames)) == 1, frames
