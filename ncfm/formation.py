"""Multi-formation: a stored image holds factor x factor smaller ones (Kim et al., IDC, 2022).

The budget of dataset distillation is stored pixels, and several images at reduced resolution often
carry more information than one at full size. NCFM uses factor 2. `decode` is differentiable, so
that the stored pixels can be optimised.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ncfm.images import to_device


def decode(images: Tensor, factor: int) -> Tensor:
    """Cut every stored image into factor x factor tiles, each upsampled bilinearly to full size.

    (N, C, H, W) -> (N * factor**2, C, H, W), image-major: the tiles of an image are adjacent, in
    row-major order, so that labels become `labels.repeat_interleave(factor**2)`. If factor does not
    divide the size, the first tiles are one pixel larger (as in torch.tensor_split): every stored
    pixel belongs to exactly one tile.

    Raises ValueError if factor is less than 1 or greater than the height or width.
    """
    _check(images, factor)
    if factor == 1:
        return images
    size = images.shape[-2:]
    tiles = [
        interpolate(tile, size=size, mode="bilinear", align_corners=False)
        for strip in images.tensor_split(factor, dim=-2)
        for tile in strip.tensor_split(factor, dim=-1)
    ]
    return torch.stack(tiles, dim=1).flatten(0, 1)


def decode_tiles(images: Tensor, factor: int, index: Tensor) -> Tensor:
    """`decode(images, factor)[index]`, decoding only these tiles; index (M,) is on the CPU."""
    if factor == 1:
        return images[to_device(index, images.device)]
    stored, tile = index // factor**2, index % factor**2
    tiles = images.new_empty((len(index), *images.shape[1:]))
    rows, columns = (
        [int(part[0]) for part in torch.arange(size).tensor_split(factor)] + [size]
        for size in images.shape[-2:]
    )
    for t in tile.unique().tolist():
        places = (tile == t).nonzero().flatten()
        (top, bottom), (left, right) = (
            (edges[k], edges[k + 1]) for edges, k in ((rows, t // factor), (columns, t % factor))
        )
        own = images[to_device(stored[places], images.device), :, top:bottom, left:right]
        tiles[to_device(places, images.device)] = interpolate(
            own, size=images.shape[-2:], mode="bilinear", align_corners=False
        )
    return tiles


def encode(images: Tensor, factor: int) -> Tensor:
    """Shrink every factor**2 images into the tiles of one stored image, for initialisation.

    (N * factor**2, C, H, W) -> (N, C, H, W), in the order of `decode`. Antialiased:
    decode(encode(x)) is x without its fine detail.

    Raises ValueError if factor is less than 1 or greater than the height or width, or if the number
    of images is not a multiple of factor**2.
    """
    _check(images, factor)
    if len(images) % factor**2:
        raise ValueError(
            f"factor {factor} needs a multiple of {factor**2} images, got {len(images)}"
        )
    if factor == 1:
        return images
    heights, widths = (_tile_sizes(size, factor) for size in images.shape[-2:])
    by_tile = images.reshape(len(images) // factor**2, factor, factor, *images.shape[1:])

    def tile(row: int, column: int) -> Tensor:
        size = (heights[row], widths[column])
        return interpolate(by_tile[:, row, column], size=size, mode="bilinear", antialias=True)

    strips = [torch.cat([tile(i, j) for j in range(factor)], dim=-1) for i in range(factor)]
    return torch.cat(strips, dim=-2)


def _tile_sizes(size: int, factor: int) -> list[int]:
    """Lengths of the parts of torch.tensor_split of `size` pixels."""
    return [len(part) for part in torch.arange(size).tensor_split(factor)]


def _check(images: Tensor, factor: int) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), got shape {tuple(images.shape)}")
    if not 1 <= factor <= min(images.shape[-2:]):
        raise ValueError(
            f"factor must be between 1 and the image size {tuple(images.shape[-2:])}, got {factor}"
        )
