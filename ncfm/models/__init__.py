"""The networks of the dataset distillation literature, as the DC code base defines them, and any
classifier of torchvision.

DC: Zhao et al., Dataset Condensation with Gradient Matching, 2021; its code base is also that of
DSA and DM. Weights start as PyTorch's layers initialise them, as there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch

from ncfm.models.alexnet import AlexNet
from ncfm.models.classifier import Classifier
from ncfm.models.convnet import ConvNet, default_depth
from ncfm.models.from_torchvision import PREFIX, TorchvisionClassifier, torchvision_names
from ncfm.models.layers import Norm
from ncfm.models.resnet import ResNet18
from ncfm.models.vgg import VGG11
from ncfm.registry import lookup
from ncfm.seeding import global_generator

__all__ = ["NETWORKS", "Classifier", "ModelConfig", "Norm", "build_model"]

FIXED = ("alexnet", "vgg11", "resnet18")  # of one depth and width


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    name: str = "convnet"
    """convnet, alexnet, vgg11 or resnet18 as DC has them, or the name of a torchvision classifier;
    torchvision/resnet18 is the one that torchvision calls so. Or the dotted path of a user's own,
    package.module.Class: a `Classifier` made as Class(config, num_classes=..., channels=...,
    image_size=...), config being this configuration."""
    depth: int | None = None
    """Blocks, of a ConvNet only. None: 3 up to 32 px, 4 to 64, 5 to 128, 6 above."""
    width: int = 128
    """Channels, of a ConvNet only."""
    norm: Norm | None = None
    """None: the literature's, which is instance norm, but none in AlexNet."""

    def __post_init__(self) -> None:
        if self.name in NETWORKS or "." in self.name:
            lookup("name", self.name, NETWORKS)
        elif self.name.removeprefix(PREFIX) not in torchvision_names():
            raise ValueError(
                f"name must be one of {', '.join(NETWORKS)}, a torchvision classifier, or a dotted "
                f"path like package.module.Class, got {self.name!r}"
            )
        elif self.norm is not None:
            raise ValueError(f"{self.name} has a norm of its own, got {self.norm!r}")
        if self.norm is not None and self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {self.norm!r}")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if self.name in FIXED or not (self.name in NETWORKS or "." in self.name):
            if self.depth is not None:
                raise ValueError(f"only convnet takes a depth, got {self.depth} for {self.name}")
            if self.width != ModelConfig.width:
                raise ValueError(f"only convnet takes a width, got {self.width} for {self.name}")
        if self.name == "resnet18" and self.norm == "none":
            raise ValueError("resnet18 needs a norm (its convolutions have no bias), got 'none'")


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    channels: int,
    image_size: int,
    seed: int | None = None,
) -> Classifier:
    """A fresh network for square images of `image_size` px.

    With a seed, the weights are made on the CPU, are a function of the seed alone, and leave
    PyTorch's global generators as they were; without one they come from the global generator.
    Raises ValueError if the images are too small for the network.
    """
    shape = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
    for name, value in shape.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seed is None:
        return _construct(config, shape)
    with global_generator(seed), torch.device("cpu"):
        return _construct(config, shape)


def _construct(config: ModelConfig, shape: dict[str, int]) -> Classifier:
    network: Callable[..., Classifier]
    if config.name in NETWORKS or "." in config.name:
        network = lookup("name", config.name, NETWORKS)
        return network(config, **shape)
    return TorchvisionClassifier(name=config.name.removeprefix(PREFIX), **shape)


def _convnet(config: ModelConfig, **shape: int) -> Classifier:
    depth = config.depth or default_depth(shape["image_size"])
    return ConvNet(**shape, depth=depth, width=config.width, norm=config.norm or "instance")


NETWORKS: dict[str, Callable[..., Classifier]] = {
    "convnet": _convnet,
    "alexnet": lambda config, **shape: AlexNet(**shape, norm=config.norm or "none"),
    "vgg11": lambda config, **shape: VGG11(**shape, norm=config.norm or "instance"),
    "resnet18": lambda config, **shape: ResNet18(**shape, norm=config.norm or "instance"),
}
"""By the name that `ModelConfig.name` has for it: network(config, num_classes=..., channels=...,
image_size=...)."""
