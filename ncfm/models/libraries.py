"""Any classifier of torchvision or timm by name, with the interface of this package. Nothing is
downloaded: its weights are fresh, or from a file.
"""

import warnings
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ncfm.models.classifier import Classifier
from ncfm.models.weights import load_weights

TORCHVISION, TIMM = "torchvision/", "timm/"
SIZES = (64, 224)
"""Sides in px: these networks halve images five times, and some take no other size than 224."""


def in_library(name: str) -> bool:
    """Whether torchvision, or timm if the name begins with timm/, has a classifier of this name.
    Raises ValueError if timm is needed and not installed.
    """
    if name.startswith(TIMM):
        return name.removeprefix(TIMM) in timm_names()
    return name.removeprefix(TORCHVISION) in torchvision_names()


@cache
def torchvision_names() -> tuple[str, ...]:
    """The classifiers that the installed torchvision has, by name."""
    from torchvision import models

    return tuple(models.list_models(module=models))


@cache
def timm_names() -> tuple[str, ...]:
    """The networks that the installed timm has, by name."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(
            "networks named timm/... need the extra timm: `uv run --extra timm "
            "pipeline/run.py ...`, or `pip install timm`"
        ) from error
    return tuple(timm.list_models())


class Enlarged(nn.Module):
    """A body that sees images (N, C, H, W) as (N, 3, size, size): grey repeated, bilinear."""

    def __init__(self, body: nn.Module, size: int) -> None:
        super().__init__()
        self.body, self.size = body, size

    def forward(self, x: Tensor) -> Tensor:
        """The body's features of the enlarged images."""
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
        features: Tensor = self.body(x)
        return features


class Layer(nn.Module):
    """A network up to the output of a submodule, averaged over the positions of maps or tokens."""

    def __init__(self, network: nn.Module, name: str) -> None:
        """Shares the network's weights. Raises ValueError if it has no such submodule."""
        super().__init__()
        library = "torchvision.models.feature_extraction"
        if type(network).__module__.startswith("timm."):
            library = "timm.models"  # knows what not to trace
        create = import_module(library).create_feature_extractor
        try:
            with warnings.catch_warnings(action="ignore"):  # training mode has other nodes
                self.body = create(network, {name: "output"})
        except ValueError as error:
            modules = dict(network.named_modules()).items()
            names = [k for k, m in modules if k and ("." not in k or list(m.children()))]
            raise ValueError(
                f"feature_layer must be one of {', '.join(names)}, or a submodule of theirs, got "
                f"{name!r}"
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) of images (N, 3, H, H)."""
        output: Tensor = self.body(x)["output"]
        if output.ndim == 4:  # images are square, so maps are: (N, D, h, h) or (N, h, h, D)
            return output.mean((2, 3) if output.shape[2] == output.shape[3] else (1, 2))
        return output.mean(1) if output.ndim == 3 else output.flatten(1)


class LibraryClassifier(Classifier):
    """A network of a library whose last linear layer is replaced by one for these classes.

    It sees images at their own size, or enlarged to the first of `SIZES` that it can take: at 32 px
    its last maps would be single pixels.
    """

    def __init__(
        self,
        *,
        name: str,
        num_classes: int,
        channels: int,
        image_size: int,
        weights: str | None = None,
        feature_layer: str | None = None,
    ) -> None:
        """Raises ValueError if the network does not end in a linear layer, takes none of the sizes,
        the images are neither grey nor RGB, or weights or layer are not the network's.
        """
        if channels not in (1, 3):
            raise ValueError(f"{name} takes images of 1 or 3 channels, got {channels}")
        with torch.device("cpu"):  # some read their own tensors during construction
            size, body, head = _fitting(name, image_size, fixed=weights is not None)
            features = Layer(body, feature_layer) if feature_layer else body
            dim = _shape(features, size).numel()
            super().__init__(nn.Identity(), dim, num_classes)
            if weights is not None:
                load_weights(weights, body, self.classifier, head)
        self.body = Enlarged(features, size)


def _fitting(name: str, image_size: int, *, fixed: bool) -> tuple[int, nn.Module, str]:
    """A size that the network takes, the network without its head, and the head's name."""
    sizes = sorted({max(image_size, SIZES[0]), *SIZES, _own_size(name)})
    for size in sizes:
        if size < image_size:
            continue
        try:
            network, head = _construct(name, None if fixed else size)
            _shape(network, size)
        except NoHeadError:
            raise
        except (RuntimeError, ValueError, AssertionError):
            continue
        return size, network, head
    raise ValueError(f"{name} takes images of none of the sizes {sizes}")


class NoHeadError(ValueError):
    """A network does not end in a linear layer."""


def _own_size(name: str) -> int:
    """Side in px of the images that a network is made for."""
    if not name.startswith(TIMM):
        return 224
    import timm

    size: int = timm.get_pretrained_cfg(name.removeprefix(TIMM)).input_size[-1]
    return size


def _shape(network: nn.Module, size: int) -> torch.Size:
    """Shape of the network's output for one image, without computing it."""
    training = network.training
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    nowhere = {key: tensor.to("meta") for key, tensor in tensors.items()}
    x = torch.empty(1, 3, size, size, device="meta")
    output: Tensor = functional_call(network.eval(), nowhere, (x,))
    network.train(training)
    return output.shape


def _construct(name: str, size: int | None) -> tuple[nn.Module, str]:
    """The network with random weights and without its head, and the head's name. Networks of a
    fixed input size get this one, or their own.
    """
    options: dict[str, object] = {}
    network: nn.Module
    if name.startswith(TIMM):
        import timm

        short = name.removeprefix(TIMM)
        config = timm.get_pretrained_cfg(short)
        if size and config.fixed_input_size:
            options["img_size"] = size
        network = timm.create_model(short, pretrained=False, num_classes=0, **options)
        head: str = config.classifier  # or a tuple of them
        return network, head
    from torchvision import models

    name = name.removeprefix(TORCHVISION)
    if size and name.startswith("vit_"):
        options["image_size"] = size
    if size and name.startswith("maxvit"):
        options["input_size"] = (size, size)
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    network = models.get_model(name, weights=None, **options)
    return network, _take_head(name, network)


def _take_head(name: str, network: nn.Module) -> str:
    """Replace the last linear layer by the identity; returns its name."""
    linear: list[str] = [k for k, m in network.named_modules() if isinstance(m, nn.Linear)]
    last = [key for key, module in network.named_modules() if not list(module.children())]
    if not linear or linear[-1] != last[-1]:
        raise NoHeadError(f"{name} does not end in a linear layer")
    parent, _, attribute = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return linear[-1]
