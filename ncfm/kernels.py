"""What a step on a CPU spends its time on, in float32, by kernels of our own (`kernels.cpp`): the
features of a frozen ConvNet, and psi's gradient.

PyTorch's layers write each map to memory and read it again; here a block keeps its maps in a core's
cache, with a quarter of the multiplications. A C++ compiler makes the kernels for the processor at
hand, once a process, in two seconds.
"""

import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ncfm.models import Classifier
from ncfm.models.convnet import ConvNet

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = "-O3 -march=native -ffp-contract=fast -std=gnu++17 -fopenmp -shared -fPIC"
PANEL = 16  # columns of a matrix that the kernels take together

Matrix = tuple[tuple[float, float, float], ...]
OF_KERNEL: Matrix = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
"""Winograd's F(4x4, 3x3), the transform of a kernel (Lavin and Gray, CVPR 2016, section 4.3)."""

logger = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled by $CXX (`c++`); None, and a warning that says why, if that fails."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "kernels.so"
            command = [*compiler, *FLAGS.split(), str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(made))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        logger.warning(
            "going on without kernels of our own, with which a step takes up to three times less: "
            "they need a C++ compiler with OpenMP ($CXX, or c++): %s",
            (said or str(error)).strip().splitlines()[0],
        )
        return None


class _Block(ctypes.Structure):
    """`Block` of kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("of_images", "padding")),
        *((name, ctypes.c_int64) for name in ("channels", "outputs", "height", "width")),
        *((name, ctypes.c_void_p) for name in ("kernels", "turned", "scale", "shift")),
        ("epsilon", ctypes.c_float),
    )


class _Layers:
    """Convolution, instance norm, ReLU and pooling, and the weights as the kernels take them."""

    def __init__(self, conv: nn.Conv2d, norm: nn.GroupNorm, *, of_images: bool) -> None:
        self.conv, self.norm, self.of_images = conv, norm, of_images
        self.refresh()

    def refresh(self) -> None:
        """Take the weights as they are now."""
        weight = self.conv.weight.detach()  # (O, C, 3, 3)
        if self.of_images:
            back = weight.permute(0, 2, 3, 1).flatten(1)  # (O, 9 C)
            kernels = back.mT
            turned = F.pad(back, (0, -back.shape[1] % PANEL)).unflatten(0, (-1, PANEL))
        else:
            kernels = _transform(weight)
            turned = _transform(weight.flip(2, 3).transpose(0, 1))
        # New tensors: the way back of an earlier pass goes on with those that it had.
        scale, shift = self.norm.weight.detach().clone(), self.norm.bias.detach().clone()
        self.weights = _panels(kernels), _panels(turned), scale, shift

    def block(self, height: int, width: int) -> _Block:
        """What the kernels are told, for maps of that size; it points to the `weights`."""
        sizes = (self.conv.in_channels, self.conv.out_channels, height, width)
        addresses = (tensor.data_ptr() for tensor in self.weights)
        return _Block(self.of_images, self.conv.padding[0], *sizes, *addresses, self.norm.eps)


def _transform(weight: Tensor) -> Tensor:
    """Winograd's, of kernels (O, C, 3, 3): (36, C, O)."""
    matrix = torch.tensor(OF_KERNEL, dtype=weight.dtype)
    return torch.einsum("ia,jb,ocab->ijco", matrix, matrix, weight).flatten(0, 1)


def _panels(matrix: Tensor) -> Tensor:
    """(..., rows, columns) -> (..., columns / 16, rows, 16)."""
    panels: Tensor = matrix.unflatten(-1, (-1, PANEL))
    return panels.transpose(-3, -2).contiguous()


class _Pass(torch.autograd.Function):
    """Through a block: images (N, H, W, C) or maps (N, C / 16, H, W, 16) -> maps, pooled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: _Layers) -> Tensor:
        x, n, panels = x.contiguous(), len(x), layers.conv.out_channels // PANEL
        more = 2 * int(layers.conv.padding[0]) - 2
        height, width = (x.shape[1] + more, x.shape[2] + more) if layers.of_images else x.shape[2:4]
        pooled = x.new_empty(n, panels, height // 2, width // 2, PANEL)
        kept: list[Tensor] = []
        if ctx.needs_input_grad[0]:
            kept += [x.new_empty(n, panels, height, width, PANEL), x.new_empty(n, panels, 2, PANEL)]
        block = layers.block(height, width)
        _run("block_forward", ctypes.byref(block), n, x, pooled, *kept or (None, None))
        ctx.save_for_backward(*kept)
        ctx.block, ctx.weights, ctx.shape = block, layers.weights, x.shape
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        x = slope.new_empty(ctx.shape)
        block, slope = ctypes.byref(ctx.block), slope.contiguous()
        _run("block_backward", block, len(x), slope, *ctx.saved_tensors, x)
        return x, None


def _run(name: str, *arguments: Any) -> None:
    """A function of the library, on as many threads as PyTorch has."""
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(*map(_argument, arguments), ctypes.c_int64(torch.get_num_threads()))


def _argument(value: Any) -> Any:
    match value:
        case int():
            return ctypes.c_int64(value)
        case Tensor():
            return ctypes.c_void_p(value.data_ptr())
        case _:
            return value


class FrozenConvNet:
    """The features of a ConvNet; the gradient goes to the images alone. Once its weights change,
    `refresh` it.
    """

    def __init__(self, layers: list[_Layers]) -> None:
        self.layers = layers

    def refresh(self) -> None:
        """Take the weights as they are now."""
        for layers in self.layers:
            layers.refresh()

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_features). Raises ValueError for images of another kind."""
        channels = self.layers[0].conv.in_channels
        if images.dtype != torch.float32 or images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(
                f"expected images (N, {channels}, H, W) in float32, "
                f"got {tuple(images.shape)} in {str(images.dtype).removeprefix('torch.')}"
            )
        x = images.permute(0, 2, 3, 1)
        for layers in self.layers:
            x = _Pass.apply(x, layers)
        return x.permute(0, 1, 4, 2, 3).flatten(1)


def freeze(model: Classifier) -> FrozenConvNet | None:
    """None where there are no kernels: for other networks than a ConvNet with instance norm of a
    width that is a multiple of 16, and without a C++ compiler.
    """
    if not isinstance(model, ConvNet):
        return None
    modules = list(model.body.children())
    layers = []
    for start in range(0, len(modules), 4):  # convolution, norm, ReLU, pooling
        conv, norm = modules[start : start + 2]
        if not (
            isinstance(conv, nn.Conv2d)
            and isinstance(norm, nn.GroupNorm)
            and norm.num_groups == norm.num_channels
            and norm.num_channels % PANEL == 0
        ):
            return None
        layers.append(_Layers(conv, norm, of_images=start == 0))
    return FrozenConvNet(layers) if library() is not None else None


class _Side(ctypes.Structure):
    """`Side` of kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "slopes", "samples")),
        ("count", ctypes.c_int64),
    )


def can_sum_draws(t: Tensor) -> bool:
    """Whether `add_scale_gradient` is there for these frequencies (K, D)."""
    fit = t.device.type == "cpu" and t.dtype == torch.float32 and t.shape[1] % PANEL == 0
    return fit and library() is not None


def add_scale_gradient(
    total: Tensor,
    unit: float,
    sides: Sequence[tuple[tuple[Tensor, Tensor], Tensor, Tensor]],
    t: Tensor,
) -> None:
    """Add to total (M, D), in float64, the sums, over the K / M neighbouring frequencies of each
    component, of frequencies t (K, D) times the gradient w.r.t. them: in whole units, rounded.

    A side of the discrepancy is the cosines and sines of its angles, (N, K) each, the slope w.r.t.
    the sums of both (2, K), and the samples (N, D).
    """
    kept = [
        [tensor.contiguous() for tensor in (*waves, slope, samples)]
        for waves, slope, samples in sides
    ]
    array = (_Side * len(kept))(
        *(_Side(*(tensor.data_ptr() for tensor in side), len(side[-1])) for side in kept)
    )
    t, (components, dim) = t.contiguous(), total.shape
    sizes = components, len(t) // components, dim
    _run("add_scale_gradient", array, len(kept), t, *sizes, total, ctypes.c_float(unit))
