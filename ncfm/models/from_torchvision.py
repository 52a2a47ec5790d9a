"""Any classifier of torchvision by name, its weights fresh, with the interface of this package."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ncfm.models.classifier import Classifier

PREFIX = "torchvision/"
SIZES = (
    64,
    224,
)  # px; these networks halve images five times, and some take no other size than 224


@cache
def torchvision_names() -> tuple[str, ...]:
    """The classifiers that the installed torchvision has, by name."""
    from torchvision import models

    return tuple(models.list_models(module=models))


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


class TorchvisionClassifier(Classifier):
    """A torchvision network whose last linear layer is replaced by one for these classes.

    It sees images at their own size, or enlarged to the first of `SIZES` that it can take: at 32 px
    its last maps would be single pixels.
    """

    def __init__(self, *, name: str, num_classes: int, channels: int, image_size: int) -> None:
        """Raises ValueError if the network does not end in a linear layer, takes none of the sizes,
        or the images are neither grey nor RGB.
        """
        if channels not in (1, 3):
            raise ValueError(f"{name} takes images of 1 or 3 channels, got {channels}")
        sizes = sorted({max(image_size, SIZES[0]), *SIZES})
        with torch.device("cpu"):  # some read their own tensors during construction
            candidates = ((size, _fitting(name, size)) for size in sizes if size >= image_size)
            size, body = next(((size, net) for size, net in candidates if net), (0, None))
            if body is None:
                raise ValueError(f"{name} takes images of none of the sizes {sizes}")
            super().__init__(nn.Identity(), _take_head(name, body), num_classes)
        self.body = Enlarged(body, size)


def _fitting(name: str, size: int) -> nn.Module | None:
    """A network if it takes images of this size, which is tried without computing anything."""
    try:
        network = _construct(name, size).eval()
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        nowhere = {key: tensor.to("meta") for key, tensor in tensors.items()}
        functional_call(network, nowhere, (torch.empty(1, 3, size, size, device="meta"),))
    except (RuntimeError, ValueError, AssertionError):
        return None
    return network.train()


def _construct(name: str, size: int) -> nn.Module:
    """The network with random weights; networks of a fixed input size get this one."""
    from torchvision import models

    options: dict[str, object] = {}
    if name.startswith("vit_"):
        options["image_size"] = size
    if name.startswith("maxvit"):
        options["input_size"] = (size, size)
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    network: nn.Module = models.get_model(name, weights=None, **options)
    return network


def _take_head(name: str, network: nn.Module) -> int:
    """Replace the last linear layer by the identity; returns the number of its inputs."""
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    last = [key for key, module in network.named_modules() if not list(module.children())]
    if not linear or linear[-1] != last[-1]:
        raise ValueError(f"{name} does not end in a linear layer")
    parent, _, attribute = linear[-1].rpartition(".")
    head = network.get_submodule(linear[-1])
    assert isinstance(head, nn.Linear)
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return head.in_features
