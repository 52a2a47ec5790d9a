"""The networks of the dataset distillation literature, as the DC code base defines them, and any
classifier of torchvision or timm.

DC: Zhao et al., Dataset Condensation with Gradient Matching, 2021; its code base is also that of
DSA and DM. Weights start as PyTorch's layers initialise them, as there.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ncfm.models.alexnet import AlexNet
from ncfm.models.classifier import Classifier
from ncfm.models.convnet import ConvNet, default_depth
from ncfm.models.layers import Norm
from ncfm.models.libraries import TIMM, LibraryClassifier, in_library
from ncfm.models.resnet import ResNet18
from ncfm.models.vgg import VGG11
from ncfm.models.weights import load_weights, weights_digest
from ncfm.registry import lookup
from ncfm.seeding import global_generator

__all__ = ["NETWORKS", "Classifier", "ModelConfig", "Norm", "build_model"]

FIXED = ("alexnet", "vgg11", "resnet18")  # of one depth and width


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    name: str = "convnet"
    """convnet, alexnet, vgg11 or resnet18 as DC has them, or the name of a torchvision classifier;
    torchvision/resnet18 is the one that torchvision calls so, timm/resnet10t one of timm. Or the
    dotted path of a user's own, package.module.Class: a `Classifier` made as Class(config,
    num_classes=..., channels=..., image_size=...), config being this configuration."""
    depth: int | None = None
    """Blocks, of a ConvNet only. None: 3 up to 32 px, 4 to 64, 5 to 128, 6 above."""
    width: int = 128
    """Channels, of a ConvNet only."""
    norm: Norm | None = None
    """None: the literature's, which is instance norm, but none in AlexNet."""
    weights: str | None = None
    """File, on every node, of the weights that every such network starts from, those of the
    evaluation too: safetensors or a PyTorch state dict, with the library's names of a library's
    network. A head of another number of classes starts fresh. The pool trains them further; with
    distill.blend [0, 0] the extractors have them as they are. None: random weights."""
    feature_layer: str | None = None
    """Submodule of a torchvision or timm network whose output, averaged over positions, is its
    features, which the head classifies. None: the last linear layer's inputs."""

    def __post_init__(self) -> None:
        if self.is_library:
            self._check_library()
        else:
            lookup("name", self.name, NETWORKS)
            if self.feature_layer is not None:
                raise ValueError(
                    "feature_layer needs a torchvision or timm network, got "
                    f"{self.feature_layer!r} for {self.name}"
                )
        if self.norm is not None and self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {self.norm!r}")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if not self.has_sizes:
            if self.depth is not None:
                raise ValueError(f"only convnet takes a depth, got {self.depth} for {self.name}")
            if self.width != ModelConfig.width:
                raise ValueError(
                    f"only convnet takes a width, got {self.width} for {self.name}; "
                    f"leave it at {ModelConfig.width}"
                )
        if self.name == "resnet18" and self.norm == "none":
            raise ValueError("resnet18 needs a norm (its convolutions have no bias), got 'none'")
        if self.weights is not None:
            path = Path(self.weights).expanduser().absolute()  # workers have other directories
            if not path.is_file():
                raise ValueError(f"weights must be a file, got {self.weights!r}")
            object.__setattr__(self, "weights", str(path))

    @property
    def has_sizes(self) -> bool:
        """Whether depth and width are options of the network: of ConvNets and of one's own."""
        return not (self.name in FIXED or self.is_library)

    @property
    def is_library(self) -> bool:
        """Whether the name is that of a network of torchvision or timm."""
        return self.name.startswith(TIMM) or not (self.name in NETWORKS or "." in self.name)

    def _check_library(self) -> None:
        if not in_library(self.name):
            raise ValueError(
                f"name must be one of {', '.join(NETWORKS)}, a torchvision classifier, timm/ and a "
                "name of timm.list_models(), or a dotted path like package.module.Class, got "
                f"{self.name!r}"
            )
        if self.norm is not None:
            raise ValueError(f"{self.name} has a norm of its own, got {self.norm!r}")

    def named(self, name: str) -> "ModelConfig":
        """The network of that name, with these options if it is this one."""
        return self if name == self.name else ModelConfig(name=name)

    def identity(self) -> dict[str, Any]:
        """Everything that a network depends on: the weights' SHA-256 in place of their path. Both
        of the later options only if they are set, so that earlier results stay valid.
        """
        fields = asdict(self) | {"weights": self.weights and weights_digest(self.weights)}
        later = ("weights", "feature_layer")
        return {k: v for k, v in fields.items() if k not in later or v is not None}


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


def _construct(config: ModelConfig, shape: dict[str, Any]) -> Classifier:
    if config.is_library:
        options = {"weights": config.weights, "feature_layer": config.feature_layer, **shape}
        return LibraryClassifier(name=config.name, **options)
    network: Classifier = lookup("name", config.name, NETWORKS)(config, **shape)
    if config.weights is not None:
        load_weights(config.weights, network, network.classifier, "classifier")
    return network


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
