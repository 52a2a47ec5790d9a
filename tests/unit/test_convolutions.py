import pytest
import torch
from torch import nn

from ncfm.augment import AugmentConfig
from ncfm.compilation import can_compile
from ncfm.convolutions import PixelConv2d, WinogradConv2d, frozen, replace_convolutions
from ncfm.distill import DistillConfig, Distiller
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.images import ImageSpec
from ncfm.models import Classifier, ModelConfig, build_model

SHAPES = [(2, 64, 96, 8, 12), (1, 64, 64, 4, 4), (3, 96, 64, 16, 16)]  # N, in, out, H, W


def results(
    module: nn.Module, x: torch.Tensor, slope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What it makes of x, and the gradient w.r.t. x of its product with a slope."""
    x = x.detach().requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad(y, x, slope)
    return y.detach(), gradient


def plain(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias).double().requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_convolution_both_ways(shape: tuple[int, ...], bias: bool) -> None:
    n, inputs, outputs, height, width = shape
    conv = plain(inputs, outputs, bias=bias)
    x = torch.randn(n, inputs, height, width, dtype=torch.float64)
    slope = torch.randn(n, outputs, height, width, dtype=torch.float64)
    for ours, theirs in zip(
        results(WinogradConv2d(conv), x, slope), results(conv, x, slope), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_float32_rounds_to_six_digits() -> None:
    conv = plain(128, 128)
    x, slope = torch.randn(2, 2, 128, 16, 16, dtype=torch.float64)
    exact = results(conv, x, slope)
    rounded = results(WinogradConv2d(conv.float()), x.float(), slope.float())
    for found, right in zip(rounded, exact, strict=True):
        assert (found - right).norm() < 3e-6 * right.norm()


def test_maps_that_no_tiles_cover_go_the_plain_way() -> None:
    conv = plain(64, 64)
    x, slope = torch.randn(2, 1, 64, 6, 8, dtype=torch.float64)
    for ours, theirs in zip(
        results(WinogradConv2d(conv), x, slope), results(conv, x, slope), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (3, 3), (3, 5)])
def test_images_get_the_same_gradient(channels: int, kernel: int, padding: int) -> None:
    conv = nn.Conv2d(channels, 8, kernel, padding=padding).double().requires_grad_(False)
    replacement = frozen(conv)
    assert isinstance(replacement, PixelConv2d)
    x = torch.randn(2, channels, 9, 12, dtype=torch.float64)
    slope = torch.randn_like(conv(x))
    for ours, theirs in zip(results(replacement, x, slope), results(conv, x, slope), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 128, 3, padding=1, stride=2),
        nn.Conv2d(3, 128, 3, padding="same"),
        nn.Conv2d(3, 128, (3, 5)),
        nn.Conv2d(16, 128, 3, padding=1),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 5, padding=1),
        nn.ConvTranspose2d(64, 64, 3, padding=1),
    ],
)
def test_others_are_left_alone(module: nn.Module) -> None:
    assert frozen(module) is None
    assert replace_convolutions(nn.Sequential(module)) == []


def network(seed: int) -> Classifier:
    config = ModelConfig(width=64, depth=2)
    return build_model(config, num_classes=2, channels=3, image_size=16, seed=seed)


def pool() -> ExtractorPool:
    states = [(network(i).state_dict(), network(10 + i).state_dict()) for i in range(2)]
    return ExtractorPool(network(0), states)


def test_a_pool_blends_the_kernels_too() -> None:
    usual, quick = pool(), pool()
    names = list(quick.model.state_dict())
    quick.freeze_convolutions()
    assert sum(isinstance(m, WinogradConv2d) for m in quick.model.modules()) == 1
    assert list(quick.model.state_dict()) == names
    images = torch.rand(2, 3, 16, 16)
    for member, beta in ((0, 0.25), (1, 0.75)):
        torch.testing.assert_close(
            quick.blend(member, beta).features(images),
            usual.blend(member, beta).features(images),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_compiled_step_is_the_eager_one_but_for_rounding() -> None:
    if not can_compile("cpu"):
        pytest.skip("torch.compile does not work here: it needs a C++ compiler")
    images = {c: torch.rand(2, 3, 16, 16) for c in range(2)}
    real = {c: torch.rand(8, 3, 16, 16) for c in range(2)}
    spec = ImageSpec(
        channels=3, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, class_names=("a", "b")
    )
    losses, moved = [], []
    for compiled in (False, True):
        distiller = Distiller(
            images,
            factor=1,
            spec=spec,
            pool=pool(),
            seed=0,
            config=DistillConfig(optimizer="sgd", lr=1.0, compile=compiled),
            frequencies=FrequencyConfig(),
            augment=AugmentConfig(),
        )
        replaced = any(isinstance(m, WinogradConv2d) for m in distiller.pool.model.modules())
        assert replaced == compiled
        losses.append(distiller.update(real)["ncfd"])
        moved.append(torch.cat([p.detach() - images[c] for c, p in distiller.images.items()]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert (moved[0] - moved[1]).norm() < 1e-3 * moved[0].norm()
