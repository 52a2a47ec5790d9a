"""Differentiable Siamese augmentation (Zhao and Bilen, DSA, ICML 2021), and CutMix for evaluation.

Siamese: the real and the synthetic images of a class get the same draw. A draw is for a GROUP of
images; images of many groups are augmented as one batch. Draws are made on the CPU by the caller's
generators, so selecting the operations of each image needs no device synchronisation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from ncfm.images import to_device

QUANTILES = (
    "choice", "brightness", "saturation", "contrast", "crop_y", "crop_x", "cutout_y", "cutout_x",
    "flip", "scale_x", "scale_y", "rotate",
)  # fmt: skip
"""Columns of a draw. Seeded results depend on their order: append, never reorder."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Operations and their strengths; the defaults are DSA's published ones.

    The released NCFM code does not use DSA's mode S. Like IDC's, it distils with
    strategy="color_crop_cutout", single=False, and evaluates, with CutMix and one draw per image,
    with strategy="flip_color_crop_scale_rotate", always="flip_color".
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"
    """Operations joined by underscores, in the order in which they are applied; or "none"."""
    single: bool = True
    """True: a draw applies one of the operations (DSA's mode S). False: all of them."""
    always: str = "none"
    """With single: operations of the strategy that every draw applies besides the chosen one."""
    brightness: float = 1.0
    """Adds a uniform number within +-brightness / 2 to the normalised image."""
    saturation: float = 2.0
    """Scales the deviations from the channel mean by a uniform number in [0, saturation]."""
    contrast: float = 0.5
    """Scales the deviations from the image mean by a uniform number in [contrast, contrast + 1]."""
    crop_ratio: float = 0.125
    """Maximum translation along each axis, as a fraction of the image size."""
    cutout_ratio: float = 0.5
    """Side of the square that is set to 0 (the mean colour), as a fraction of the image size."""
    flip_probability: float = 0.5
    scale_ratio: float = 1.2
    """Each axis is shrunk by its own factor, uniform in [1 / scale_ratio, scale_ratio]."""
    rotate_degrees: float = 15.0
    """Maximum angle in either direction."""

    def __post_init__(self) -> None:
        for name in ("strategy", "always"):
            _parse(name, getattr(self, name))
        if extra := set(_parse("always", self.always)) - set(_parse("strategy", self.strategy)):
            raise ValueError(f"always names {sorted(extra)}, not in the strategy {self.strategy!r}")
        for name in ("brightness", "saturation", "contrast", "rotate_degrees"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("crop_ratio", "cutout_ratio", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within [0, 1], got {getattr(self, name)}")
        if not 1 <= self.scale_ratio < math.inf:
            raise ValueError(f"scale_ratio must be at least 1, got {self.scale_ratio}")


@dataclass(frozen=True)
class AugmentParams:
    """Draws of G groups: quantiles (G, len(QUANTILES)), uniform in [0, 1), float64, on the CPU.

    Quantiles are mapped to parameters when they are applied: a draw fits any image size, and
    changing one strength leaves the other parameters unchanged.
    """

    quantiles: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.quantiles[:, QUANTILES.index(name)]


class Augment:
    """Draws augmentations and applies them; see AugmentConfig."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        operations, always = _parse("strategy", config.strategy), _parse("always", config.always)
        candidates = [op for op in operations if config.single and op not in always]
        self.pipelines: list[tuple[str, ...]] = [
            tuple(op for op in operations if op == chosen or op in always) for chosen in candidates
        ] or [operations]
        """A draw chooses one of these sequences of operations, with equal probability."""

    def draw(self, generators: Sequence[torch.Generator], per_generator: int = 1) -> AugmentParams:
        """Draw for len(generators) * per_generator groups, in that order, from CPU generators.

        A group's draw depends only on its own generator. Siamese augmentation: one generator per
        class, one group each. Ordinary training: one generator, one group per image.
        """
        shape = (per_generator, len(QUANTILES))
        rows = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
        return AugmentParams(torch.cat([torch.empty((0, *shape[1:]), dtype=torch.float64), *rows]))

    def apply(self, images: Tensor, params: AugmentParams, group_index: Tensor) -> Tensor:
        """Augment normalised images (N, C, H, W), image i by the draw of group `group_index[i]`.

        Differentiable with respect to the images. Keep `group_index` (N,), int64, on the CPU; on
        another device it causes a synchronisation. Raises ValueError on mismatched shapes.
        """
        if images.ndim != 4 or group_index.shape != images.shape[:1]:
            raise ValueError(
                f"images must be (N, C, H, W) and group_index (N,), got shapes "
                f"{tuple(images.shape)} and {tuple(group_index.shape)}"
            )
        if self.pipelines == [()] or images.numel() == 0:
            return images
        params = AugmentParams(params.quantiles[group_index.cpu()])  # now one row per image
        pipeline = (params["choice"] * len(self.pipelines)).long()
        if (pipeline == pipeline[0]).all():
            return self._run(self.pipelines[int(pipeline[0])], images, params)
        # Run each pipeline only on the images that drew it: sort by pipeline, then restore order.
        order = pipeline.argsort(stable=True)
        counts = pipeline.bincount(minlength=len(self.pipelines)).tolist()
        parts = zip(
            self.pipelines,
            torch.split(images.index_select(0, to_device(order, images.device)), counts),
            torch.split(params.quantiles[order], counts),
            strict=True,
        )
        done = [self._run(ops, part, AugmentParams(q)) for ops, part, q in parts if len(part)]
        return torch.cat(done).index_select(0, to_device(order.argsort(), images.device))

    def _run(self, operations: tuple[str, ...], images: Tensor, params: AugmentParams) -> Tensor:
        for operation in operations:
            images = _OPERATIONS[operation](images, params, self.config)
        return images


def cutmix(
    images: Tensor, labels_onehot: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Paste a box of another image into every image, mix the labels by its area (CutMix, beta 1).

    Yun et al., ICCV 2019, algorithm A1: one box and one permutation for the batch, from a CPU
    generator. (N, C, H, W) and (N, classes) float -> new tensors of the same shapes.
    """
    height, width = images.shape[-2:]
    u, u_y, u_x = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    side = math.sqrt(u)  # the box's share of the area, 1 - lambda, is Beta(1, 1): uniform

    def edges(size: int, centre: int) -> tuple[int, int]:
        half = int(size * side) // 2
        return max(centre - half, 0), min(centre + half, size)

    top, bottom = edges(height, int(u_y * height))
    left, right = edges(width, int(u_x * width))
    other = to_device(torch.randperm(len(images), generator=generator), images.device)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[other, :, top:bottom, left:right]
    # Area of the box inside the image.
    area = (bottom - top) * (right - left) / (height * width)
    return mixed, labels_onehot * (1 - area) + labels_onehot[other] * area


# Operations. `params` has one row per image; there is at least one image.


def _color(images: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
    """Brightness, then saturation, then contrast, composed into one affine map of the image.

    With m the mean over channels and M that over all: x + b, then m + b + s (x - m), whose mean is
    M + b, then M + b + k (m - M + s (x - m)).
    """
    b = _column((params["brightness"] - 0.5) * config.brightness, images)
    s = _column(params["saturation"] * config.saturation, images)
    k = _column(params["contrast"] + config.contrast, images)
    m = images.mean(dim=1, keepdim=True)
    M = m.mean(dim=(2, 3), keepdim=True)
    return images * (k * s) + (m * (k * (1 - s)) + (M * (1 - k) + b))


def _crop(images: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
    """Translate by whole pixels, filling with 0: pad, then cut a window of the image's size."""
    height, width = images.shape[-2:]
    pad_y, pad_x = (_round(size * config.crop_ratio) for size in (height, width))
    start_y = to_device((params["crop_y"] * (2 * pad_y + 1)).long(), images.device)
    start_x = to_device((params["crop_x"] * (2 * pad_x + 1)).long(), images.device)
    rows = start_y[:, None, None] + torch.arange(height, device=images.device)[:, None]
    columns = start_x[:, None, None] + torch.arange(width, device=images.device)
    flat = (rows * (width + 2 * pad_x) + columns).flatten(1)  # (N, H * W), into the padded image
    padded = pad(images, (pad_x, pad_x, pad_y, pad_y)).flatten(2)
    return padded.gather(2, flat[:, None].expand(-1, images.shape[1], -1)).view(images.shape)


def _cutout(images: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
    """Set a square to 0. Its centre is anywhere in the image, so it may extend over the border."""

    def inside(size: int, quantile: Tensor) -> Tensor:
        side = _round(size * config.cutout_ratio)
        # The centre of a square of even side lies between pixels: one more position.
        start = (quantile * (size + 1 - side % 2)).long() - side // 2
        offset = torch.arange(size, device=images.device) - to_device(start, images.device)[:, None]
        return (offset >= 0) & (offset < side)

    rows, columns = (
        inside(size, params[name])
        for size, name in zip(images.shape[-2:], ("cutout_y", "cutout_x"), strict=True)
    )
    kept = ~(rows[:, None, :, None] & columns[:, None, None, :])
    return images * kept.to(images.dtype)


def _flip(images: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
    flipped = to_device(params["flip"] < config.flip_probability, images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    index = torch.where(flipped[:, None], columns.flip(0), columns)
    return images.gather(3, index[:, None, None].expand(images.shape))


def _scale(images: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
    low = 1 / config.scale_ratio
    x, y = (low + params[name] * (config.scale_ratio - low) for name in ("scale_x", "scale_y"))
    return _warp(images, ((x, torch.zeros_like(x)), (torch.zeros_like(y), y)))


def _rotate(images: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
    """Rotate about the centre; a positive angle is counter-clockwise on the screen."""
    angle = (2 * params["rotate"] - 1) * math.radians(config.rotate_degrees)
    cos, sin = angle.cos(), angle.sin()
    aspect = images.shape[2] / images.shape[3]  # the coordinates of _warp are relative to each axis
    return _warp(images, ((cos, -sin * aspect), (sin / aspect, cos)))


def _warp(images: Tensor, matrix: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Resample bilinearly at matrix (x, y), entries (N,), coordinates in [-1, 1]; 0 outside."""
    # Not a matrix product: in TF32 the grid would be off by hundredths of a pixel.
    y, x = (
        (torch.arange(n, device=images.device, dtype=images.dtype) * 2 + (1 - n)) / n
        for n in images.shape[-2:]
    )
    grid = [
        _column(xx, images)[:, 0] * x + _column(xy, images)[:, 0] * y[:, None] for xx, xy in matrix
    ]
    return grid_sample(images, torch.stack(grid, dim=-1), padding_mode="zeros", align_corners=False)


_OPERATIONS: dict[str, Callable[[Tensor, AugmentParams, AugmentConfig], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}


def _parse(field: str, names: str) -> tuple[str, ...]:
    """Parse a strategy into its operations."""
    operations = () if names == "none" else tuple(names.split("_"))
    if unknown := [op for op in operations if op not in _OPERATIONS]:
        raise ValueError(
            f"{field}={names!r} has unknown operations {unknown}; "
            f"valid are {', '.join(_OPERATIONS)}, joined by underscores, or none"
        )
    if len(set(operations)) < len(operations):
        raise ValueError(f"{field}={names!r} names an operation twice")
    return operations


def _round(x: float) -> int:
    return int(x + 0.5)


def _column(values: Tensor, images: Tensor) -> Tensor:
    """(N,) on the CPU -> (N, 1, 1, 1) of the images' dtype and device."""
    return to_device(values.to(images.dtype), images.device).view(-1, 1, 1, 1)
