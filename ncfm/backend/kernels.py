"""Native float32 CPU kernels (`native/kernels.cpp`): features of a ConvNet, frozen and in training,
and psi's gradient.

PyTorch's layers write each map to memory and read it again; here a block keeps its maps in a core's
cache, with a quarter of the multiplications.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ncfm.backend.library import library
from ncfm.models.convnet import ConvNet

PANEL = 16  # columns of a matrix that the kernels take together


class _Block(ctypes.Structure):
    """`Block` of native/kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("of_images", "padding")),
        *((name, ctypes.c_int64) for name in ("channels", "outputs", "height", "width")),
        *((name, ctypes.c_void_p) for name in ("kernels", "flipped", "scale", "shift")),
        ("epsilon", ctypes.c_float),
    )


class _Layers:
    """Convolution, instance norm, ReLU and pooling, and their weights packed for the kernels."""

    def __init__(self, conv: nn.Conv2d, norm: nn.GroupNorm, *, of_images: bool) -> None:
        self.conv, self.norm, self.of_images = conv, norm, of_images

    def refresh(self) -> None:
        """Repack the current weights for the kernels."""
        weight = self.conv.weight.detach()  # (O, C, 3, 3)
        # New tensors: the backward pass of an earlier forward pass needs those that it had.
        if self.of_images:
            back = weight.permute(0, 2, 3, 1).flatten(1)  # (O, 9 C)
            kernels = _panels(back.mT)
            flipped = _panels(F.pad(back, (0, -back.shape[1] % PANEL)).unflatten(0, (-1, PANEL)))
        else:
            outputs, channels = weight.shape[:2]
            kernels, flipped = weight.new_empty(2, 36, channels * outputs)
            _call("transform_kernels", weight.contiguous(), channels, outputs, kernels, flipped)
        scale, shift = self.norm.weight.detach().clone(), self.norm.bias.detach().clone()
        self.weights = kernels, flipped, scale, shift

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """What training changes: a bias before an instance norm has no effect, and no gradient."""
        return self.conv.weight, self.norm.weight, self.norm.bias

    def block(self, height: int, width: int) -> _Block:
        """The argument of the kernels for maps of that size; it points to the `weights`."""
        sizes = (self.conv.in_channels, self.conv.out_channels, height, width)
        addresses = (tensor.data_ptr() for tensor in self.weights)
        return _Block(self.of_images, self.conv.padding[0], *sizes, *addresses, self.norm.eps)


def _panels(matrix: Tensor) -> Tensor:
    """(..., rows, columns) -> (..., columns / 16, rows, 16)."""
    panels: Tensor = matrix.unflatten(-1, (-1, PANEL))
    return panels.transpose(-3, -2).contiguous()


class _Pass(torch.autograd.Function):
    """Through a block: images (N, H, W, C) or maps (N, C / 16, H, W, 16) -> maps, pooled.

    `parameters` are those of the layers if gradients with respect to them are wanted, else none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: _Layers, *parameters: Tensor) -> Tensor:
        x, n, panels = x.contiguous(), len(x), layers.conv.out_channels // PANEL
        more = 2 * int(layers.conv.padding[0]) - 2
        height, width = (x.shape[1] + more, x.shape[2] + more) if layers.of_images else x.shape[2:4]
        pooled = x.new_empty(n, panels, height // 2, width // 2, PANEL)
        saved: list[Tensor] = []
        if any(ctx.needs_input_grad):
            saved += [
                x.new_empty(n, panels, height, width, PANEL),
                x.new_empty(n, panels, 2, PANEL),
            ]
        block = layers.block(height, width)
        _run("block_forward", ctypes.byref(block), n, x, pooled, *saved or (None, None))
        ctx.save_for_backward(*saved, *([x] if parameters else []))
        ctx.block, ctx.weights, ctx.shape = block, layers.weights, x.shape
        ctx.shapes = [parameter.shape for parameter in parameters]
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        block, gradient = ctypes.byref(ctx.block), gradient.contiguous()
        of_x = gradient.new_empty(ctx.shape) if ctx.needs_input_grad[0] else None
        if not ctx.shapes:
            _run("block_backward", block, len(gradient), gradient, *ctx.saved_tensors, of_x)
            return of_x, None
        maps, statistics, x = ctx.saved_tensors
        gradients = [gradient.new_empty(shape) for shape in ctx.shapes]
        arguments = (gradient, x, maps, statistics, *gradients, of_x)
        _call("block_backward_weights", block, len(gradient), *arguments)
        return of_x, None, *gradients


def _run(name: str, *arguments: Any) -> None:
    """Call a function of the library on as many threads as PyTorch has."""
    _call(name, *arguments, torch.get_num_threads())


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the library; ctypes releases the interpreter's lock."""
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(*map(_argument, arguments))


def _argument(value: Any) -> Any:
    match value:
        case int():
            return ctypes.c_int64(value)
        case Tensor():
            return ctypes.c_void_p(value.data_ptr())
        case None:
            return ctypes.c_void_p(None)
        case _:
            return value


class NativeConvNet:
    """The features of a ConvNet by the kernels. Once its weights change, `refresh` it.

    Frozen, the gradient goes to the images alone; in training, to the parameters alone.
    """

    def __init__(self, layers: list[_Layers], *, training: bool) -> None:
        self.layers, self.training = layers, training
        self.refresh()

    def refresh(self) -> None:
        """Repack the current weights for the kernels."""
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
            x = _Pass.apply(x, layers, *(layers.parameters if self.training else ()))
        return x.permute(0, 1, 4, 2, 3).flatten(1)


def native(model: nn.Module, *, training: bool = False) -> NativeConvNet | None:
    """The model's features by the kernels; None if they do not apply: for other networks than a
    ConvNet with instance norm in float32 on a CPU, of a width that is a multiple of 16, and without
    a C++ compiler.
    """
    if type(model) is not ConvNet:  # a subclass may compute something else
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
            and conv.weight.dtype == torch.float32
            and conv.weight.device.type == "cpu"
        ):
            return None
        layers.append(_Layers(conv, norm, of_images=start == 0))
    return NativeConvNet(layers, training=training) if library() is not None else None


class KernelLogits:
    """The logits of a ConvNet, its features by the kernels; `refresh` it after every step."""

    def __init__(self, features: NativeConvNet, classifier: nn.Module) -> None:
        self.features, self.classifier = features, classifier
        self.refresh = features.refresh

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> (N, classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def kernel_logits(model: nn.Module, *, training: bool) -> KernelLogits | None:
    """As `native`, with the classifier on top."""
    features = native(model, training=training)
    return KernelLogits(features, model.classifier) if features is not None else None  # type: ignore[arg-type]


class _Side(ctypes.Structure):
    """`Side` of native/kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "gradients", "samples")),
        ("count", ctypes.c_int64),
    )


def can_sum_draws(t: Tensor) -> bool:
    """Whether `add_scale_gradient` supports these frequencies (K, D)."""
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

    A side of the discrepancy is the cosines and sines of its angles, (N, K) each, the gradient
    w.r.t. the sums of both (2, K), and the samples (N, D).
    """
    saved = [
        [tensor.contiguous() for tensor in (*cos_sin, gradient, samples)]
        for cos_sin, gradient, samples in sides
    ]
    array = (_Side * len(saved))(
        *(_Side(*(tensor.data_ptr() for tensor in side), len(side[-1])) for side in saved)
    )
    t, (components, dim) = t.contiguous(), total.shape
    sizes = components, len(t) // components, dim
    _run("add_scale_gradient", array, len(saved), t, *sizes, total, ctypes.c_float(unit))
