"""The pieces that the architectures share, as the dataset distillation literature defines them."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ncfm.backend.products import product

Norm = Literal["instance", "batch", "group", "none"]

GROUPS = 4  # of group norm, as in DC
WIDEST_PRODUCT = 256  # px; its cost grows with the cube of the size, that of a kernel as the square


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The normalisation of a feature map: 2 * channels parameters, none for "none".

    Raises ValueError if the groups of group norm do not divide the channels.
    """
    match norm:
        case "instance":
            # The same maths and parameters as an affine nn.InstanceNorm2d. On CPU the faster of the
            # two, in eager mode and compiled: a ConvNet-3 step takes up to a fifth less time.
            return nn.GroupNorm(channels, channels)
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            if channels % GROUPS:
                raise ValueError(
                    f"group norm needs a multiple of {GROUPS} channels, got {channels}"
                )
            return nn.GroupNorm(GROUPS, channels)
        case "none":
            return nn.Identity()


class AveragePool(nn.Module):
    """2x2 average pooling of maps of `side` px, as nn.AvgPool2d(2): (N, C, side, side) -> half.

    PyTorch's kernel for a CPU is not vectorised: it took a third of a ConvNet's training step.
    There, a matrix product makes one row of every two, several times as fast both ways.
    """

    rows: Tensor  # (2 side, side / 2): what two rows, side by side, are multiplied by

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side if side % 2 == 0 and side <= WIDEST_PRODUCT else 0
        rows = (torch.eye(self.side // 2) / 4).repeat_interleave(2, 0).repeat(2, 1)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.device.type != "cpu":
            return F.avg_pool2d(x, 2)
        even = x.shape[2] % 2 == x.shape[3] % 2 == 0
        if torch.compiler.is_compiling() and even:  # fused with what is before, either way
            n, c, height, width = x.shape
            return x.view(n, c, height // 2, 2, width // 2, 2).mean((3, 5))
        if not self.side or x.shape[-2:] != (self.side, self.side):
            return F.avg_pool2d(x, 2)
        pooled: Tensor = _Pool.apply(x, self.rows.to(x.dtype))
        return pooled


class _Pool(torch.autograd.Function):
    """Pairs of rows times the averaging matrix; the backward pass multiplies by its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        pairs, half = rows.shape
        return product(x.reshape(-1, pairs), rows).view(*x.shape[:-2], half, half)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return product(gradient.reshape(-1, rows.shape[1]), rows.mT).view(ctx.shape), None


def padded_size(image_size: int) -> int:
    """Side, in px, that the first convolution of a network makes of images: 32 for 28, else theirs.

    28 px (MNIST and its kin) can be halved only twice, 32 px five times.
    """
    return 32 if image_size == 28 else image_size


def first_padding(kernel: int, image_size: int) -> int:
    """Padding of a first convolution (odd kernel, stride 1) whose output is `padded_size`."""
    return kernel // 2 + (padded_size(image_size) - image_size) // 2
