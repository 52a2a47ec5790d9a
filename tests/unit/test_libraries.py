"""Networks of timm and torchvision, weights from files, and features of a named layer."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from ncfm.distill import DistillConfig
from ncfm.models import Classifier, ModelConfig, build_model
from ncfm.models.libraries import timm_names
from pipeline.runtime.identity import fingerprint

SMALL = "test_resnet"  # timm's own for its tests: 0.5 M parameters


def build(
    name: str, *, size: int = 64, classes: int = 7, seed: int = 0, **config: Any
) -> Classifier:
    model = ModelConfig(name=name, **config)
    return build_model(model, num_classes=classes, channels=3, image_size=size, seed=seed)


def randomized(network: nn.Module) -> nn.Module:
    """With statistics of norms that are not those of a fresh network."""
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [SMALL, "test_vit", "test_efficientnet", "test_convnext"])
def test_timm_networks_are_classifiers(name: str, images: Tensor) -> None:
    network = build(f"timm/{name}").eval()
    assert network(images).shape == (2, 7)
    assert network.features(images).shape == (2, network.num_features)
    torch.testing.assert_close(network(images), network.classifier(network.features(images)))
    assert torch.equal(build(f"timm/{name}").eval()(images), network(images))
    assert not torch.equal(build(f"timm/{name}", seed=1).eval()(images), network(images))


@pytest.mark.parametrize("name", [f"timm/{SMALL}", "torchvision/resnet18"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_with_its_weights_a_network_is_that_of_its_library(
    name: str, suffix: str, images: Tensor, tmp_path: Path
) -> None:
    library, _, short = name.partition("/")
    if library == "timm":
        theirs = randomized(timm.create_model(short, pretrained=False, num_classes=7))
    else:
        theirs = randomized(torchvision.models.get_model(short, weights=None, num_classes=7))
    path = str(tmp_path / f"weights.{suffix}")
    save_file(theirs.state_dict(), path) if suffix == "safetensors" else torch.save(
        theirs.state_dict(), path
    )
    with torch.no_grad():
        ours = build(name, weights=path).eval()
        torch.testing.assert_close(ours(images), theirs(images))
        assert not torch.allclose(build(name).eval()(images), theirs(images))  # negative control


def test_a_head_of_other_classes_starts_fresh_and_is_logged(
    images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = randomized(timm.create_model(SMALL, pretrained=False, num_classes=5))
    path = str(tmp_path / "weights.pth")
    torch.save(theirs.state_dict(), path)
    caplog.set_level(logging.WARNING)
    ours = build(f"timm/{SMALL}", weights=path).eval()
    build(f"timm/{SMALL}", weights=path)
    assert caplog.text.count(f"weights {path} have no head of this shape") == 1
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours.features(images), expected)
    assert torch.equal(ours.classifier.weight, build(f"timm/{SMALL}").classifier.weight)


def test_a_network_of_a_fixed_size_keeps_that_of_its_weights(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=7).eval()
    path = str(tmp_path / "weights.pth")
    torch.save(theirs.state_dict(), path)
    ours = build("timm/vit_tiny_patch16_224", weights=path, size=32).eval()
    x = torch.randn(1, 3, 32, 32)
    large = nn.functional.interpolate(x, size=(224, 224), mode="bilinear")
    torch.testing.assert_close(ours(x), theirs(large))
    assert build("timm/vit_tiny_patch16_224", size=32).body.size == 64  # negative control


def test_weights_of_our_own_networks(tmp_path: Path) -> None:
    config, path = {"size": 16, "depth": 2, "width": 8}, str(tmp_path / "weights.safetensors")
    theirs = build("convnet", seed=3, **config)
    save_file(theirs.state_dict(), path)
    for classes, same in ((7, True), (4, False)):
        ours = build("convnet", classes=classes, weights=path, **config).state_dict()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours[name], value) == (same or name.startswith("body")), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv1.weight"), "1 missing: conv1.weight"),
        (lambda state: state.update(more=torch.ones(1)), "1 unexpected: more"),
        (lambda state: state.update({"bn1.bias": torch.ones(3)}), "1 of another shape: bn1.bias"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(
    change: Any, message: str, tmp_path: Path
) -> None:
    state, path = torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "weights.pth"
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        build("torchvision/resnet18", weights=str(path))


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for content in (nn.Linear(2, 2), DistillConfig(), {"epoch": 3}):  # two of them run code
        torch.save(content, path)
        with pytest.raises(ValueError, match="must be a safetensors file, or a state dict"):
            build("convnet", weights=str(path))
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"broken")
        with pytest.raises(ValueError, match="must be a safetensors file, or a state dict"):
            build("convnet", weights=str(tmp_path / name))
    with pytest.raises(ValueError, match="weights must be a file, got 'nowhere'"):
        ModelConfig(weights="nowhere")


def test_an_identity_follows_the_weights_and_not_their_place(tmp_path: Path) -> None:
    (tmp_path / "one.pth").write_bytes(b"1")
    (tmp_path / "copy.pth").write_bytes(b"1")
    (tmp_path / "two.pth").write_bytes(b"2")
    one, copy, two = (
        fingerprint([ModelConfig(weights=str(tmp_path / f"{name}.pth"))])
        for name in ("one", "copy", "two")
    )
    assert one == copy != two
    earlier = {"name": "convnet", "depth": None, "width": 128, "norm": None}
    assert fingerprint(ModelConfig()) == fingerprint(earlier)


# --- features of a layer


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (f"timm/{SMALL}", "layer2"),  # maps
        ("timm/test_vit", "blocks.1"),  # tokens
        ("swin_t", "features.1"),  # maps with channels last
        ("torchvision/resnet18", "avgpool"),
    ],
)
def test_features_of_a_layer_are_what_it_computes(name: str, layer: str, images: Tensor) -> None:
    whole, network = build(name).eval(), build(name, feature_layer=layer).eval()
    outputs: list[Tensor] = []
    whole.body.body.get_submodule(layer).register_forward_hook(
        lambda *args: outputs.append(args[2])
    )
    with torch.no_grad():
        whole(images)
        features = network.features(images)
    (output,) = outputs
    channels_last = name == "swin_t"
    positions = (1, 2) if channels_last else tuple(range(2, output.ndim))
    expected = output.mean(1) if output.ndim == 3 else output.mean(positions)
    torch.testing.assert_close(features, expected)
    assert features.shape == (2, network.num_features)
    assert network(images).shape == (2, 7)
    count = [sum(p.numel() for p in each.parameters()) for each in (network.body, whole.body)]
    assert count[0] < count[1] or layer == "avgpool"  # the rest is not there


def test_a_layer_has_the_weights_of_a_file(images: Tensor, tmp_path: Path) -> None:
    theirs = randomized(timm.create_model(SMALL, pretrained=False))
    path = str(tmp_path / "weights.pth")
    torch.save(theirs.state_dict(), path)
    network = build(f"timm/{SMALL}", weights=path, feature_layer="layer1").eval()
    expected = theirs.layer1(theirs.maxpool(theirs.act1(theirs.bn1(theirs.conv1(images)))))
    torch.testing.assert_close(network.features(images), expected.mean((2, 3)))


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    timm_names.cache_clear()
    with pytest.raises(ValueError, match="uv run --extra timm"):
        ModelConfig(name=f"timm/{SMALL}")


def test_wrong_layers_and_names() -> None:
    with pytest.raises(ValueError, match=r"feature_layer must be one of .*layer1.*'layer9'"):
        build(f"timm/{SMALL}", feature_layer="layer9")
    with pytest.raises(ValueError, match="feature_layer needs a torchvision or timm network"):
        ModelConfig(feature_layer="body")
    for name in ("timm/no_such_network", "timm/resnet18.a1_in1k"):
        with pytest.raises(ValueError, match=rf"timm.list_models\(\).*'{name}'"):
            ModelConfig(name=name)
