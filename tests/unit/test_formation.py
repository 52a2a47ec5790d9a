"""Multi-formation against a pixel-by-pixel bilinear reference and torch.tensor_split."""

import math

import pytest
import torch
from torch import Tensor

from ncfm.formation import decode, decode_tiles, encode

SIZES = [((8, 8), 2), ((9, 9), 2), ((7, 7), 3), ((8, 5), 2), ((11, 6), 4), ((3, 3), 3)]


def random_images(n: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64)


def smooth_images(n: int, size: int) -> Tensor:
    """Low-frequency waves of unit amplitude, each image with its own direction and phase."""
    at = torch.linspace(0, 1, size, dtype=torch.float64)
    k = torch.arange(n, dtype=torch.float64)[:, None, None]
    phase = math.tau * (torch.cos(k) * at[:, None] + torch.sin(k) * at) / 2 + k
    return torch.stack([torch.sin(phase), torch.cos(phase), torch.sin(phase + 1)], dim=1)


def upsample(tile: Tensor, height: int, width: int) -> Tensor:
    """Bilinear upsampling of (C, h, w): outer edges of the pixels aligned, border repeated."""
    out = tile.new_empty(len(tile), height, width)
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * tile.shape[1] / height - 0.5, 0), tile.shape[1] - 1)
            u = min(max((x + 0.5) * tile.shape[2] / width - 0.5, 0), tile.shape[2] - 1)
            v0, u0 = int(v), int(u)
            v1, u1 = min(v0 + 1, tile.shape[1] - 1), min(u0 + 1, tile.shape[2] - 1)
            top = tile[:, v0, u0] * (1 - (u - u0)) + tile[:, v0, u1] * (u - u0)
            bottom = tile[:, v1, u0] * (1 - (u - u0)) + tile[:, v1, u1] * (u - u0)
            out[:, y, x] = top * (1 - (v - v0)) + bottom * (v - v0)
    return out


@pytest.mark.parametrize(("size", "factor"), SIZES)
def test_decode_upsamples_the_tiles_of_tensor_split(size: tuple[int, int], factor: int) -> None:
    """Order (image-major, tiles row-major), borders and interpolation, at once."""
    images = random_images(2, 3, *size)
    expected = [
        upsample(tile, *size)
        for image in images
        for strip in image.tensor_split(factor, dim=1)
        for tile in strip.tensor_split(factor, dim=2)
    ]
    torch.testing.assert_close(decode(images, factor), torch.stack(expected))


@pytest.mark.parametrize(("size", "factor"), SIZES)
def test_constant_tiles_survive_exactly(size: tuple[int, int], factor: int) -> None:
    """No border is off by one: a neighbour's pixel inside a tile would show."""
    values = torch.arange(2 * factor**2, dtype=torch.float64)
    images = values.view(-1, 1, 1, 1).expand(-1, 3, *size)
    stored = encode(images, factor)
    assert stored.shape == (2, 3, *size)
    rows, columns = (torch.arange(n).tensor_split(factor) for n in size)
    for i, image in enumerate(stored):
        for r, row in enumerate(rows):
            for c, column in enumerate(columns):
                expected = i * factor**2 + r * factor + c
                tile = image[:, row][:, :, column]
                torch.testing.assert_close(tile, torch.full_like(tile, expected))
    torch.testing.assert_close(decode(stored, factor), images.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "factor"), [(32, 2), (33, 2), (32, 3), (64, 4)])
def test_round_trip_of_smooth_images(size: int, factor: int, dtype: torch.dtype) -> None:
    images = smooth_images(factor**2 * 2, size).to(dtype)
    back = decode(encode(images, factor), factor)
    assert back.dtype == dtype
    assert back.shape == images.shape
    # The border is worst: the slope of the image stops half a stored pixel inside.
    assert (back - images).abs().max() < 0.2
    assert (back - images).square().mean().sqrt() < 0.03
    # Negative control: in another order it is far off.
    assert (back.roll(1, dims=0) - images).square().mean().sqrt() > 0.3


def test_encode_is_antialiased() -> None:
    """Stripes on every fourth column, which plain bilinear sampling at factor 4 would never see."""
    stripes = (torch.arange(32) % 4 == 0).double().expand(16, 1, 32, 32)
    inner = encode(stripes, 4)[..., 1:7, 1:7]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.25))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_factor_one_is_the_identity(size: tuple[int, int]) -> None:
    images = random_images(3, 1, *size)
    assert torch.equal(decode(images, 1), images)
    assert torch.equal(encode(images, 1), images)


@pytest.mark.parametrize(("size", "factor"), SIZES)
def test_gradient_reaches_every_stored_pixel(size: tuple[int, int], factor: int) -> None:
    images = random_images(2, 1, *size).requires_grad_()
    decoded = decode(images, factor)
    decoded.sum().backward()
    assert images.grad is not None
    assert (images.grad > 0).all()
    # Weights are shared out among the pixels, none is lost.
    torch.testing.assert_close(images.grad.sum(), torch.tensor(float(decoded.numel())).double())


def test_gradient_is_exact() -> None:
    images = random_images(1, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: decode(x, 2), (images,))


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (32, 32)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_some_tiles_are_those_of_all_to_the_last_bit(size: tuple[int, int], factor: int) -> None:
    images = torch.rand(50, 3, *size, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50 * factor**2, generator=torch.Generator().manual_seed(1))
    for index in (order[:13], order[:1], order[:0], order):
        assert torch.equal(decode_tiles(images, factor, index), decode(images, factor)[index])


def test_no_images() -> None:
    empty = torch.empty(0, 3, 9, 9, requires_grad=True)
    assert encode(empty, 2).shape == (0, 3, 9, 9)
    out = decode(empty, 2)
    assert out.shape == (0, 3, 9, 9)
    out.sum().backward()


@pytest.mark.parametrize("factor", [0, -1, 6])
@pytest.mark.parametrize("function", [decode, encode])
def test_factor_out_of_range(function: object, factor: int) -> None:
    with pytest.raises(ValueError, match=f"got {factor}"):
        function(torch.zeros(36, 1, 8, 5), factor)  # type: ignore[operator]


def test_encode_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="got 6"):
        encode(torch.zeros(6, 1, 8, 8), 2)


def test_images_need_four_dimensions() -> None:
    with pytest.raises(ValueError, match="N, C, H, W"):
        decode(torch.zeros(3, 8, 8), 2)
