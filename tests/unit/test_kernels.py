import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ncfm.backend.library as library_module
from ncfm.augment import AugmentConfig
from ncfm.backend.kernels import NativeConvNet, can_sum_draws, kernel_logits, native
from ncfm.backend.library import library
from ncfm.communication import SingleProcess
from ncfm.distill import DistillConfig, Distiller
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.images import ImageSpec
from ncfm.matching import Match
from ncfm.models import Classifier, ModelConfig, build_model

UNIT = 2.0**-44
NETWORKS = [
    # size, depth, width, channels
    (32, 3, 128, 3),
    (28, 3, 64, 1),  # images padded to 32
    (16, 2, 48, 3),  # an odd number of panels
    (12, 2, 16, 2),  # maps that tiles of 4x4 do not cover
    (30, 3, 32, 3),  # and odd ones, whose last row no pool takes
    (96, 5, 32, 3),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def network(
    size: int = 16, depth: int = 2, width: int = 32, channels: int = 3, seed: int = 0
) -> Classifier:
    config = ModelConfig(width=width, depth=depth)
    model = build_model(config, num_classes=2, channels=channels, image_size=size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # or the norms' would be ones and zeros
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def frozen(model: Classifier) -> NativeConvNet:
    if library() is None:
        pytest.skip("no kernels here: they need a C++ compiler with OpenMP")
    found = native(model)
    assert found is not None
    return found


def both_ways(
    features: Callable[[Tensor], Tensor], images: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Features, and the gradient w.r.t. the images of their product with a slope."""
    x = images.detach().requires_grad_()
    y = features(x)
    (gradient,) = torch.autograd.grad(y, x, slope)
    return y.detach(), gradient


@pytest.mark.parametrize(("size", "depth", "width", "channels"), NETWORKS)
def test_features_and_gradients(size: int, depth: int, width: int, channels: int) -> None:
    """Against PyTorch's layers in float64."""
    model = network(size, depth, width, channels)
    features = frozen(model)
    images = torch.randn(5, channels, size, size, dtype=torch.float64)
    slope = torch.randn(5, model.num_features, dtype=torch.float64)
    found = both_ways(features, images.float(), slope.float())
    right = both_ways(copy.deepcopy(model).double().features, images, slope)
    for ours, exact in zip(found, right, strict=True):
        errors = (ours - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        assert errors.min() < 1e-5
        assert errors.max() < 5e-2  # where rounding turns a ReLU on or off
    with torch.no_grad():
        assert torch.equal(features(images.float()), found[0])


@pytest.mark.parametrize(("size", "depth", "width", "channels"), NETWORKS)
def test_gradients_of_training(size: int, depth: int, width: int, channels: int) -> None:
    """With respect to every parameter, against PyTorch's layers in float64."""
    model = network(size, depth, width, channels).requires_grad_()
    frozen(model)
    exact = copy.deepcopy(model).double()
    images = torch.randn(5, channels, size, size, dtype=torch.float64)
    labels = torch.arange(5) % 2
    ours = kernel_logits(model, training=True)
    assert ours is not None
    F.cross_entropy(ours(images.float()), labels).backward()
    F.cross_entropy(exact(images), labels).backward()
    right = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("body") and name.endswith("bias") and right[name].grad.norm() < 1e-12:
            assert parameter.grad is None  # a bias before an instance norm has no effect
            continue
        error = (parameter.grad - right[name].grad).norm() / right[name].grad.norm()
        assert error < 5e-3, name  # rounding turns a ReLU on or off
    # A network whose biases are off: the same comparison must see it.
    wrong = right["body.0.weight"].grad.roll(1, 0)
    assert (model.body[0].weight.grad - wrong).norm() / wrong.norm() > 0.1


def test_training_takes_the_weights_as_they_were() -> None:
    """The backward pass is that of the forward pass, though the weights have changed since."""
    model = network().requires_grad_()
    frozen(model)
    ours = kernel_logits(model, training=True)
    assert ours is not None
    images = torch.randn(3, 3, 16, 16)
    weight = model.body[0].weight
    (right,) = torch.autograd.grad(ours(images).square().sum(), weight)
    value = ours(images).square().sum()
    with torch.no_grad():
        weight += 1
    ours.refresh()
    (found,) = torch.autograd.grad(value, weight)
    assert torch.equal(found, right)
    (other,) = torch.autograd.grad(ours(images).square().sum(), weight)
    assert not torch.allclose(other, right, rtol=0.1)


@pytest.mark.parametrize(("size", "depth", "width", "channels"), NETWORKS[:3])
def test_an_image_depends_on_itself_alone(
    size: int, depth: int, width: int, channels: int, one_thread: None
) -> None:
    """The same bits beside other images, and on any number of threads."""
    model = network(size, depth, width, channels)
    features = frozen(model)
    images, slope = torch.randn(7, channels, size, size), torch.randn(7, model.num_features)
    together = both_ways(features, images, slope)
    for some in (slice(0, 1), slice(2, 5)):
        for part, whole in zip(
            both_ways(features, images[some], slope[some]), together, strict=True
        ):
            assert torch.equal(part, whole[some])
    torch.set_num_threads(3)
    for one, three in zip(together, both_ways(features, images, slope), strict=True):
        assert torch.equal(one, three)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_images_in_any_layout() -> None:
    features = frozen(network())
    images = torch.randn(4, 3, 16, 16)
    right = features(images)
    strided = torch.randn(4, 3, 16, 32)[..., ::2].copy_(images)
    for same in (images.contiguous(memory_format=torch.channels_last), strided):
        assert torch.equal(features(same), right)
    assert features(images[:0]).shape == (0, right.shape[1])


@pytest.mark.parametrize(
    "images",
    [torch.ones(2, 1, 16, 16), torch.ones(3, 16, 16), torch.ones(2, 3, 16, 16, dtype=torch.half)],
)
def test_other_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected images \(N, 3, H, W\) in float32, got"):
        frozen(network())(images)


def test_not_a_number_shows() -> None:
    features = frozen(network())
    images, slope = torch.randn(3, 3, 16, 16), torch.ones(3, 512)
    images[1, 0, 5, 5] = float("nan")
    for found in both_ways(features, images, slope):
        assert found.flatten(1).isfinite().all(1).tolist() == [True, False, True]
        assert found[1].isnan().all()


def test_follow_every_blend() -> None:
    states = [(network(seed=i).state_dict(), network(seed=10 + i).state_dict()) for i in range(2)]
    pool = ExtractorPool(network(), states)
    frozen(pool.models[0])
    features = pool.native_features()
    assert features is not None
    images, slope = torch.randn(2, 3, 16, 16), torch.ones(2, 512)
    passes = []
    for blend in ((0, 0.25), (1, 0.75), (1, 0.5, 0, 1), (0, 0.0, 1, 1)):  # the last: a snapshot
        model = pool.blend(*blend)
        right = both_ways(model.features, images, slope)
        x = images.clone().requires_grad_()
        passes.append((x, features(x), right))
    for x, found, right in passes:  # the first one's way back is through its own weights
        gradient = torch.autograd.grad(found, x, slope)[0]
        torch.testing.assert_close((found.detach(), gradient), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(width=32, norm="none"),
        ModelConfig(width=32, norm="batch"),
        ModelConfig(width=32, norm="group"),
        ModelConfig(width=24),
        ModelConfig(name="alexnet"),
        ModelConfig(name="vgg11"),
        ModelConfig(name="resnet18"),
    ],
)
def test_others_have_none(config: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert native(build_model(config, num_classes=2, channels=3, image_size=32)) is None
    assert not caplog.records


def psi_gradients(x: list[Tensor], y: list[Tensor], t: Tensor, components: int) -> list[Tensor]:
    gradients = []
    for a, b in zip(x, y, strict=True):
        match = Match([a], [b], t, SingleProcess(), kernels=True)
        match.objective(FrequencyConfig(sampler="psi"), 0.5)
        total = torch.zeros(components, t.shape[1], dtype=torch.float64)
        match.add_scale_gradients(total, UNIT)
        assert torch.equal(total, total.round())
        gradients.append(total * UNIT)
    return gradients


@pytest.mark.parametrize(
    ("freqs", "components", "dim"), [(64, 4, 64), (60, 12, 48), (7, 7, 16), (48, 1, 96)]
)
def test_psi_s_gradient(freqs: int, components: int, dim: int, one_thread: None) -> None:
    x, y = ([torch.randn(n, dim) for n in counts] for counts in ((7, 33), (4, 1)))
    t = torch.randn(freqs, dim)
    if not can_sum_draws(t):
        pytest.skip("no kernels here: they need a C++ compiler with OpenMP")
    found = psi_gradients(x, y, t, components)
    double = ([part.double() for part in side] for side in (x, y))
    right = psi_gradients(*double, t.double(), components)  # for which there are no kernels
    for ours, exact in zip(found, right, strict=True):
        assert ours.shape == (components, dim)
        assert (ours - exact).norm() < 1e-5 * exact.norm()
    torch.set_num_threads(3)
    for one, three in zip(found, psi_gradients(x, y, t, components), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("t", [torch.ones(4, 24), torch.ones(4, 16, dtype=torch.float64)])
def test_psi_s_gradient_of_others_goes_the_plain_way(t: Tensor) -> None:
    assert not can_sum_draws(t)


@pytest.fixture
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The kernels, not compiled yet, neither here nor in the cache, which is tmp_path / "cache"."""
    library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield monkeypatch
    library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("no-such-compiler", "No such file"),
        ("sh -c 'echo no room left >&2; exit 1'", "no room left"),
        ("true", "cannot open shared object"),  # it made nothing
    ],
)
def test_without_a_compiler_there_are_none(
    compiler: str, says: str, forgotten: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forgotten.setenv("CXX", compiler)
    assert native(network()) is None
    assert native(network()) is None
    (record,) = [r for r in caplog.records if r.name == library_module.__name__]  # once a process
    assert record.levelno == logging.WARNING
    assert "$CXX" in record.message
    assert says in record.message


def test_without_room_for_them_there_are_none(
    tmp_path: Path, forgotten: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forgotten.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert native(network()) is None
    assert "missing" in caplog.text


REAL = {c: torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(c)) for c in range(2)}


def distill(sampler: Any = "gaussian", **config: Any) -> Distiller:
    """After a step."""
    states = [(network(seed=i).state_dict(), network(seed=10 + i).state_dict()) for i in range(2)]
    distiller = Distiller(
        {c: images[:2] for c, images in REAL.items()},
        factor=2,
        spec=ImageSpec(
            channels=3, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, class_names=("a", "b")
        ),
        pool=ExtractorPool(network(), states),
        seed=0,
        config=DistillConfig(optimizer="sgd", lr=1.0, num_steps=1, **config),
        frequencies=FrequencyConfig(sampler=sampler),
        augment=AugmentConfig(),
    )
    distiller.update(REAL)
    return distiller


@pytest.mark.parametrize("sampler", ["gaussian", "psi"])
def test_the_step_is_the_same_but_for_rounding(sampler: str) -> None:
    frozen(network())
    plain, quick = (distill(sampler, compile=way) for way in (False, None))
    assert not isinstance(plain.features.body, NativeConvNet)
    assert isinstance(quick.features.body, NativeConvNet)
    moved = [
        torch.stack([p.detach() - REAL[c][:2] for c, p in d.images.items()]) for d in (plain, quick)
    ]
    assert moved[0].norm() > 1e-3
    assert (moved[0] - moved[1]).norm() < 1e-3 * moved[0].norm()


def test_other_precisions_have_none() -> None:
    assert not isinstance(distill(precision="float64").features.body, NativeConvNet)


@pytest.fixture
def compiled(forgotten: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line for every compilation from here on."""
    real, log = os.environ.get("CXX") or "c++", tmp_path / "log"
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo >> {log} ;; esac\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    forgotten.setenv("CXX", str(script))
    if library() is None:
        pytest.skip("no kernels here: they need a C++ compiler with OpenMP")
    library.cache_clear()
    return log


def compilations(log: Path) -> int:
    return len(log.read_text().splitlines())


def kept(tmp_path: Path) -> Path:
    path, digest = sorted((tmp_path / "cache" / "ncfm").iterdir(), reverse=True)
    assert (path.suffix, digest.suffix) == (".so", ".sha256")
    return path


def test_other_processes_find_them_in_the_cache(compiled: Path, tmp_path: Path) -> None:
    assert compilations(compiled) == 1
    assert library() is not None
    assert native(network()) is not None
    assert compilations(compiled) == 1


def test_damaged_ones_are_compiled_anew(compiled: Path, tmp_path: Path) -> None:
    whole, path = kept(tmp_path).read_bytes(), kept(tmp_path)
    path.unlink()  # a new file: this process may have the old one mapped
    path.write_bytes(whole[:1000])
    assert library() is not None
    assert compilations(compiled) == 2
    assert path.read_bytes() == whole


def test_an_unwritable_cache_costs_a_compilation(
    compiled: Path, tmp_path: Path, forgotten: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    forgotten.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for number in (2, 3):
        assert library() is not None
        assert compilations(compiled) == number
        library.cache_clear()


def test_other_sources_are_other_kernels(
    compiled: Path, tmp_path: Path, forgotten: pytest.MonkeyPatch
) -> None:
    shutil.copytree(library_module.SOURCE.parent, tmp_path / "native")
    source = tmp_path / "native" / library_module.SOURCE.name
    source.write_text(source.read_text() + "// another\n")
    forgotten.setattr(library_module, "SOURCE", source)
    assert library() is not None
    assert compilations(compiled) == 2
