"""The networks against their papers: parameter counts, arithmetic, shapes, and what is refused."""

import math
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, instance_norm, pad

from ncfm.models import Classifier, ModelConfig, build_model
from ncfm.models.layers import WIDEST_PRODUCT, AveragePool, norm_layer
from ncfm.models.libraries import LibraryClassifier, torchvision_names

NAMES = ("convnet", "alexnet", "vgg11", "resnet18")
SIZES = (28, 32, 64, 96, 128, 224)


def build(
    name: str = "convnet",
    *,
    size: int = 32,
    channels: int = 3,
    classes: int = 10,
    seed: int | None = 0,
    **config: object,
) -> Classifier:
    return build_model(
        ModelConfig(name=name, **config),
        num_classes=classes,
        channels=channels,
        image_size=size,
        seed=seed,
    )


def count(*args: str, **kwargs: object) -> int:
    with torch.device("meta"):  # counted without being computed
        return sum(p.numel() for p in build(*args, seed=None, **kwargs).parameters())


@pytest.fixture
def images_32() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def images_128() -> Tensor:
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))


# --- parameter counts, from the papers' tables


def conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    return inputs * outputs * kernel**2 + bias * outputs


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def convnet_count(
    depth: int, width: int, channels: int, side: int, classes: int, norm: int = 2
) -> int:
    first = conv(channels, width, 3) + norm * width
    return (
        first
        + (depth - 1) * (conv(width, width, 3) + norm * width)
        + linear(width * side**2, classes)
    )


def vgg11_count(channels: int, side: int, classes: int, norm: int = 2) -> int:
    """Simonyan & Zisserman, table 1, configuration A; one linear layer in place of three."""
    maps = [channels, 64, 128, 256, 256, 512, 512, 512, 512]
    convolutions = sum(conv(i, o, 3) + norm * o for i, o in pairwise(maps))
    return convolutions + linear(512 * side**2, classes)


def alexnet_count(channels: int, side: int, classes: int, norm: int = 0) -> int:
    layers = [(channels, 128, 5), (128, 192, 5), (192, 256, 3), (256, 192, 3), (192, 192, 3)]
    return sum(conv(*layer) + norm * layer[1] for layer in layers) + linear(192 * side**2, classes)


def resnet18_count(channels: int, stem_kernel: int, classes: int) -> int:
    """He et al., table 1, 18 layers, projection shortcuts (option B) where the width changes."""

    def unit(inputs: int, outputs: int, kernel: int) -> int:
        return conv(inputs, outputs, kernel, bias=False) + 2 * outputs

    total = unit(channels, 64, stem_kernel) + 4 * unit(64, 64, 3)
    for inputs, outputs in ((64, 128), (128, 256), (256, 512)):
        total += unit(inputs, outputs, 3) + 3 * unit(outputs, outputs, 3) + unit(inputs, outputs, 1)
    return total + linear(512, classes)


@pytest.mark.parametrize("norm", ["instance", "batch", "group", "none"])
@pytest.mark.parametrize(
    ("size", "depth", "side"),
    [(28, 3, 4), (32, 3, 4), (64, 4, 4), (96, 5, 3), (128, 5, 4), (224, 6, 3)],
)
def test_convnet_parameters(size: int, depth: int, side: int, norm: str) -> None:
    expected = convnet_count(depth, 128, 3, side, 10, norm=0 if norm == "none" else 2)
    assert count(size=size, norm=norm) == expected
    assert count(size=size, norm=norm, depth=depth) == expected


def test_convnet_width_depth_channels_and_classes() -> None:
    assert count(width=24, depth=4, channels=1, classes=7) == convnet_count(4, 24, 1, 2, 7)


def test_published_totals() -> None:
    """Totals that others report for the same networks, and our formulas agree."""
    assert count() == convnet_count(3, 128, 3, 4, 10) == 320_010
    assert count("resnet18", norm="batch") == resnet18_count(3, 3, 10) == 11_173_962
    imagenet = count("resnet18", norm="batch", size=224, classes=1000)
    assert imagenet == resnet18_count(3, 7, 1000) == 11_689_512
    assert count("vgg11", norm="batch") == vgg11_count(3, 1, 10) == 9_231_114


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [1, 10, 200])
def test_other_parameters(channels: int, classes: int) -> None:
    few = {"channels": channels, "classes": classes}
    assert count("alexnet", **few) == alexnet_count(channels, 4, classes)
    assert count("alexnet", norm="batch", size=64, **few) == alexnet_count(
        channels, 8, classes, norm=2
    )
    assert count("vgg11", **few) == vgg11_count(channels, 1, classes)
    assert count("vgg11", norm="none", size=96, **few) == vgg11_count(channels, 3, classes, norm=0)
    assert count("resnet18", size=64, **few) == resnet18_count(channels, 3, classes)
    assert count("resnet18", size=128, **few) == resnet18_count(channels, 7, classes)


# --- arithmetic, against independent implementations


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Fill target's tensors with source's, by position: the same order and shapes are required."""
    ours, theirs = target.state_dict(), source.state_dict()
    target.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))


def randomize_norms(model: nn.Module) -> None:
    """Fresh norms all multiply by one and add zero, which would hide a misplaced one."""
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(
                0.5, 1.5
            ) if "bias" not in name and "mean" not in name else tensor.uniform_(-0.3, 0.3)


def test_resnet18_with_imagenet_stem_is_torchvisions(images_128: Tensor) -> None:
    reference = torchvision.models.resnet18(num_classes=10).eval()
    randomize_norms(reference)
    ours = build("resnet18", norm="batch", size=128).eval()
    copy_in_order(reference, ours)
    torch.testing.assert_close(ours(images_128), reference(images_128), atol=1e-4, rtol=1e-4)


def test_resnet18_with_cifar_stem_is_torchvisions_with_that_stem(images_32: Tensor) -> None:
    reference = torchvision.models.resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    randomize_norms(reference.eval())
    ours = build("resnet18", norm="batch").eval()
    copy_in_order(reference, ours)
    torch.testing.assert_close(ours(images_32), reference(images_32), atol=1e-4, rtol=1e-4)


def test_vgg11_features_are_torchvisions(images_32: Tensor) -> None:
    reference = torchvision.models.vgg11_bn(weights=None, init_weights=False).features.eval()
    randomize_norms(reference)
    ours = build("vgg11", norm="batch").eval()
    copy_in_order(reference, ours.body)
    torch.testing.assert_close(
        ours.features(images_32), reference(images_32).flatten(1), atol=1e-4, rtol=1e-4
    )


def test_convnet_computes_what_the_literature_says(images_32: Tensor) -> None:
    model = build(width=8)
    randomize_norms(model)
    x = images_32
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    for convolution, norm in zip(convolutions, norms, strict=True):
        x = conv2d(x, convolution.weight, convolution.bias, padding=1)
        x = instance_norm(x, weight=norm.weight, bias=norm.bias)
        x = x.clamp_min(0)
        x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(model.features(images_32), x.flatten(1), atol=1e-5, rtol=1e-4)


def test_alexnet_computes_what_the_literature_says(images_32: Tensor) -> None:
    model = build("alexnet")
    x = images_32
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for convolution, pooled in zip(convolutions, (True, True, False, False, True), strict=True):
        half = (convolution.weight.shape[-1] - 1) // 2
        x = conv2d(x, convolution.weight, convolution.bias, padding=half).clamp_min(0)
        x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).amax((-3, -1)) if pooled else x
    torch.testing.assert_close(model.features(images_32), x.flatten(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("norm", "dims"), [("instance", (2, 3)), ("batch", (0, 2, 3))])
def test_norm_statistics(norm: str, dims: tuple[int, ...], images_32: Tensor) -> None:
    layer = norm_layer(norm, 3).train()
    randomize_norms(layer)
    mean = images_32.mean(dims, keepdim=True)
    variance = images_32.var(dims, correction=0, keepdim=True)
    scale, shift = layer.weight.view(3, 1, 1), layer.bias.view(3, 1, 1)
    expected = (images_32 - mean) / (variance + 1e-5).sqrt() * scale + shift
    torch.testing.assert_close(layer(images_32), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("side", "height", "width"),
    [(2, 2, 2), (8, 8, 8), (7, 7, 7), (8, 6, 5), (WIDEST_PRODUCT + 2, WIDEST_PRODUCT + 2, 2)],
)
def test_average_pool_is_torchs_and_so_is_its_gradient(
    side: int, height: int, width: int, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, height, width, dtype=dtype)
    for images in (x, x.mT.contiguous().mT, x.to(memory_format=torch.channels_last)):
        ours, theirs = (images.detach().requires_grad_() for _ in range(2))
        y, expected = AveragePool(side)(ours), avg_pool2d(theirs, 2)
        torch.testing.assert_close(y, expected)
        (y.square().sum() + y[..., 0].sum()).backward()
        (expected.square().sum() + expected[..., 0].sum()).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["convnet", "alexnet", "vgg11"])
def test_28_px_is_32_px_with_a_border_of_zeros(name: str, channels: int) -> None:
    small, large = (build(name, size=size, channels=channels).eval() for size in (28, 32))
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, channels, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(small(x), large(pad(x, (2, 2, 2, 2))), atol=1e-5, rtol=1e-4)


# --- the interface


def side(name: str, size: int) -> int:
    """Side of the last feature maps."""
    return {
        "convnet": {28: 4, 32: 4, 64: 4, 96: 3, 128: 4, 224: 3},
        "alexnet": {28: 4, 32: 4, 64: 8, 96: 12, 128: 16, 224: 28},
        "vgg11": {28: 1, 32: 1, 64: 2, 96: 3, 128: 4, 224: 7},
        "resnet18": dict.fromkeys(SIZES, 1),
    }[name][size]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name: str, size: int, channels: int) -> None:
    with torch.device("meta"):  # shapes alone: nothing is computed
        model = build_model(
            ModelConfig(name=name), num_classes=17, channels=channels, image_size=size
        )
        x = torch.empty(5, channels, size, size)
    maps = {"convnet": 128, "alexnet": 192, "vgg11": 512, "resnet18": 512}[name]
    assert model.num_features == maps * side(name, size) ** 2
    assert model.features(x).shape == (5, model.num_features)
    assert model(x).shape == (5, 17)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_linear_layer_on_the_features(name: str, images_32: Tensor) -> None:
    model = build(name).eval()
    with torch.no_grad():
        expected = model.features(images_32) @ model.classifier.weight.T + model.classifier.bias
        torch.testing.assert_close(model(images_32), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_a_finite_gradient_and_no_graph_break(name: str, images_32: Tensor) -> None:
    model = build(name).requires_grad_(False)
    before, x = images_32.clone(), images_32.clone().requires_grad_()
    torch._dynamo.reset()  # it counts what other tests compiled
    compiled = torch.compile(
        model.features, backend="eager", fullgraph=True
    )  # raises on a graph break
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert gradient.isfinite().all()
    assert all(image.any() for image in gradient)
    assert torch.equal(x, before)  # the in-place ReLUs never reach the input


def features_of_first(model: Classifier, others: Tensor, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.features(torch.cat([images[:1], others]))[:1]


@pytest.mark.parametrize("name", ["convnet", "vgg11", "resnet18"])
def test_instance_norm_keeps_images_independent_and_batch_norm_does_not(
    name: str, images_32: Tensor
) -> None:
    def dependence(norm: str) -> float:
        model = build(name, norm=norm).train()
        one, two = (features_of_first(model, images_32[1:] * scale, images_32) for scale in (1, 3))
        return float((one - two).norm() / one.norm())

    assert dependence("instance") < 1e-5
    assert dependence("batch") > 1e-2


# --- weights


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


def seeded(seed: int | None) -> Classifier:
    return build_model(ModelConfig(width=8), num_classes=10, channels=3, image_size=32, seed=seed)


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(5)
    one = seeded(1)
    torch.manual_seed(6)
    assert same(one, seeded(1))
    assert not same(one, seeded(2))
    with torch.device("meta"):  # as under a default device that is an accelerator
        assert same(one, seeded(1))


def test_a_seed_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    seeded(1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    seeded(None)  # negative control: this one draws from it
    assert not torch.equal(torch.rand(3), expected)


def test_without_a_seed_the_global_generator_decides() -> None:
    torch.manual_seed(5)
    one = seeded(None)
    assert not same(one, seeded(None))
    torch.manual_seed(5)
    assert same(one, seeded(None))


@pytest.mark.parametrize("name", NAMES)
def test_weights_start_as_in_pytorch(name: str) -> None:
    """Convolutions and linear layers: uniform within 1 / sqrt(fan-in); norms: one and zero."""
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert module.weight.abs().max() <= bound
            if module.weight.numel() > 10_000:
                assert float(module.weight.detach().std()) == pytest.approx(
                    bound / math.sqrt(3), rel=0.03
                )
        elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


# --- what is refused


@pytest.mark.parametrize(
    ("size", "depth", "fits"),
    [(32, 6, 5), (28, 6, 5), (31, 5, 4), (64, 7, 6), (4, None, 2), (2, 2, 1)],
)
def test_a_convnet_too_deep_for_its_images_says_what_fits(
    size: int, depth: int | None, fits: int
) -> None:
    with pytest.raises(ValueError, match=rf"got {size}; depth {fits} is the largest that fits"):
        build(size=size, depth=depth, width=4)
    build(size=size, depth=fits, width=4).features(torch.zeros(1, 3, size, size))  # and it does fit


def test_one_pixel_fits_no_convnet() -> None:
    with pytest.raises(ValueError, match="got 1; no depth fits"):
        build(size=1, depth=1)


@pytest.mark.parametrize(("name", "smallest"), [("alexnet", 8), ("vgg11", 32), ("resnet18", 9)])
def test_images_too_small(name: str, smallest: int) -> None:
    with pytest.raises(ValueError, match=f"at least {smallest} px.*, got {smallest - 1}"):
        build(name, size=smallest - 1)
    assert build(name, size=smallest)(torch.randn(1, 3, smallest, smallest)).isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "lenet"}, "lenet"),
        ({"norm": "layer"}, "layer"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"name": "vgg11", "depth": 3}, "takes a depth, got 3 for vgg11"),
        ({"name": "resnet18", "width": 64}, "takes a width, got 64 for resnet18"),
        ({"name": "resnet18", "norm": "none"}, "none"),
    ],
)
def test_bad_configuration(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**config)


@pytest.mark.parametrize("field", ["num_classes", "channels", "image_size"])
def test_bad_shape(field: str) -> None:
    shape = {"num_classes": 10, "channels": 3, "image_size": 32, field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        build_model(ModelConfig(), **shape)


def test_group_norm_needs_channels_it_can_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 4 channels, got 6"):
        build(width=6, norm="group")


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "torchvision/resnet18"])
def test_torchvision_networks_are_classifiers(name: str) -> None:
    config = ModelConfig(name=name)
    shape = {"num_classes": 7, "channels": 1, "image_size": 16}
    network = build_model(config, **shape, seed=1).eval()
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert network(x).shape == (3, 7)
    torch.testing.assert_close(network(x), network.classifier(network.features(x)))
    again = build_model(config, **shape, seed=1).eval()
    assert torch.equal(again(x), network(x))
    assert not torch.equal(build_model(config, **shape, seed=2).eval()(x), network(x))


@pytest.mark.long
def test_every_torchvision_classifier_is_built_or_refused_by_name() -> None:
    refused = []
    for name in torchvision_names():
        try:
            LibraryClassifier(name=name, num_classes=10, channels=3, image_size=32)
        except ValueError as error:
            assert name in str(error)  # noqa: PT017
            refused.append(name)
    assert all(name.startswith("squeezenet") for name in refused)


def test_a_network_nobody_has_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"convnet.*torchvision.*'resnet19'"):
        ModelConfig(name="resnet19")
