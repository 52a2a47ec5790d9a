"""Convolutions of networks whose weights are frozen, for torch.compile on a CPU.

Wide ones: Winograd's F(4x4, 3x3) (Lavin and Gray, CVPR 2016, eq. 8 and section 4.3). A tile of 4x4
outputs comes from one of 6x6 inputs, transformed, by 36 products over the channels where the
definition has 144. The transforms are sums that torch.compile makes quick kernels of; without it
they cost more than they save. Those of images: the way back to the pixels is a matrix product and
a sum, since libraries compute its one or three channels as if they were sixteen. Suffixes: N
images, C channels in, O out, T tiles of all images.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE = 4  # outputs along a side; inputs are two more
NARROWEST = 64  # channels; with fewer, the transforms cost what the products save
PIXEL_CHANNELS = 4  # an image's, at most

Matrix = Sequence[Sequence[float]]
OF_INPUT: Matrix = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
OF_KERNEL: Matrix = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OF_OUTPUT: Matrix = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def transform_kernels(weight: Tensor) -> Tensor:
    """Kernels (O, C, 3, 3), as `convolve` takes them: (36, C, O)."""
    matrix = torch.tensor(OF_KERNEL, dtype=weight.dtype, device=weight.device)
    return torch.einsum("ia,jb,ocab->ijco", matrix, matrix, weight).flatten(0, 1)


def convolve(x: Tensor, kernels: Tensor) -> Tensor:
    """conv2d(x, weight, padding=1) of maps x (N, C, H, W), whose sides are multiples of 4, and
    `transform_kernels` (36, C, O) of the weight: (N, O, H, W).
    """
    n, _, height, width = x.shape
    down, across = height // TILE, width // TILE
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    rows = _times(OF_INPUT, [padded[:, i : i + height - 3 : TILE] for i in range(6)])
    tiles = _times(OF_INPUT, [rows[:, :, :, j : j + width - 3 : TILE] for j in range(6)], dim=1)
    products = torch.bmm(tiles.flatten(2, 4).flatten(0, 1), kernels)  # (36, T, O)
    columns = products.unflatten(1, (n, down, across)).unflatten(0, (6, 6))
    rows = _times(OF_OUTPUT, [columns[i] for i in range(6)])
    maps = _times(OF_OUTPUT, [rows[:, j] for j in range(6)], dim=4)  # (4, N, H/4, W/4, 4, O)
    return maps.permute(1, 2, 0, 3, 4, 5).reshape(n, height, width, -1).permute(0, 3, 1, 2)


def _times(matrix: Matrix, parts: list[Tensor], dim: int = 0) -> Tensor:
    """The matrix times a vector of tensors, stacked along a new dimension."""
    terms = [[a * part for a, part in zip(row, parts, strict=True) if a] for row in matrix]
    return torch.stack([reduce(torch.add, row) for row in terms], dim)


class _Convolution(torch.autograd.Function):
    """Towards the input only: the way back is the convolution with the kernels turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, turned: Tensor) -> Tensor:
        ctx.save_for_backward(turned)
        return convolve(x, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (turned,) = ctx.saved_tensors
        return convolve(slope, turned), None, None


class WinogradConv2d(nn.Module):
    """Takes the place of a frozen nn.Conv2d, 3x3, padded by 1, whose parameters it has. Once they
    change, `refresh` it.
    """

    kernels: Tensor
    turned: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("kernels", transform_kernels(self.weight.detach()), persistent=False)
        self.register_buffer("turned", transform_kernels(self._turned()), persistent=False)

    def _turned(self) -> Tensor:
        return self.weight.detach().flip(2, 3).transpose(0, 1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Transform the kernels anew."""
        self.kernels.copy_(transform_kernels(self.weight))
        self.turned.copy_(transform_kernels(self._turned()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        if x.shape[-2] % TILE or x.shape[-1] % TILE:
            return F.conv2d(x, self.weight, self.bias, padding=1)
        y: Tensor = _Convolution.apply(x, self.kernels, self.turned)
        return y if self.bias is None else y + self.bias[:, None, None]


class _OfPixels(torch.autograd.Function):
    """Towards the images only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.padding, ctx.size = padding, x.shape[-2:]
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return spread(slope, weight, ctx.padding, ctx.size), None, None, None


def spread(slope: Tensor, weight: Tensor, padding: int, size: Sequence[int]) -> Tensor:
    """The gradient of a convolution, of stride 1, w.r.t. its input, of that size (H, W):
    slope (N, O, ...), weight (O, C, k, k) -> (N, C, H, W).
    """
    n, outputs, rows, columns = slope.shape
    _, channels, k, _ = weight.shape
    flat = weight.permute(0, 2, 3, 1).reshape(outputs, -1)
    even = F.pad(flat, (0, -flat.shape[1] % 16))  # of whole vectors, which products are quick for
    shares = slope.permute(0, 2, 3, 1).reshape(-1, outputs) @ even
    border = max(0, k - 1 - padding)
    shares = F.pad(shares.view(n, rows, columns, -1), (0, 0, *[border] * 4))
    height, width = size
    total = slope.new_zeros(())
    for i in range(k):
        for j in range(k):
            top, left, first = padding + border - i, padding + border - j, (i * k + j) * channels
            part = shares[:, top : top + height, left : left + width]
            total = total + part[..., first : first + channels]
    return total.permute(0, 3, 1, 2)


class PixelConv2d(nn.Module):
    """Takes the place of a frozen nn.Conv2d of images, whose parameters it has."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.padding = int(conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H + 2 padding - k + 1, ...)."""
        y: Tensor = _OfPixels.apply(x, self.weight, self.bias, self.padding)
        return y


def _is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution of a square kernel, with zeros as many on all sides, whose stride
    and groups are 1.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size[0] == module.kernel_size[1]
        and module.stride == module.dilation == (1, 1)
        and module.padding == (module.padding[0], module.padding[0])
        and module.padding_mode == "zeros"
        and module.groups == 1
    )


def frozen(module: nn.Module) -> WinogradConv2d | PixelConv2d | None:
    """What takes its place, None if nothing does."""
    if not _is_plain(module):
        return None
    narrowest = min(module.in_channels, module.out_channels)
    if module.kernel_size == (3, 3) and module.padding == (1, 1) and narrowest >= NARROWEST:
        return WinogradConv2d(module)
    return PixelConv2d(module) if module.in_channels <= PIXEL_CHANNELS else None


def replace_convolutions(model: nn.Module) -> list[WinogradConv2d]:
    """Replace those of a frozen network that can be, and return what is to be refreshed."""
    replaced = []
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            replacement = frozen(child)
            if replacement is not None:
                setattr(parent, name, replacement)
            if isinstance(replacement, WinogradConv2d):
                replaced.append(replacement)
    return replaced
