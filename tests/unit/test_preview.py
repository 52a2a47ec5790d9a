"""The contact sheet: the right pixels beside the right names."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.observe.preview import enlargement, preview_png, to_pixels


def sheet(data: bytes) -> np.ndarray:
    assert data.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def solid(colors: list[tuple[float, float, float]], size: int = 8) -> torch.Tensor:
    return torch.tensor(colors)[:, :, None, None].expand(-1, 3, size, size)


def box(pixels: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what has exactly this colour."""
    y, x = np.nonzero((pixels == np.array(color)).all(-1))
    return int(y.min()), int(x.min()), int(np.ptp(y)) + 1, int(np.ptp(x)) + 1


def test_images_lie_in_the_row_of_their_class() -> None:
    # Two classes of two images, their labels shuffled.
    images = solid([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
    pixels = sheet(preview_png(images, torch.tensor([1, 0, 1, 0]), ["a", "b"], scale=3))
    red, green, blue, yellow = (
        box(pixels, c) for c in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    )
    assert {b[2:] for b in (red, green, blue, yellow)} == {(24, 24)}
    assert red[0] == blue[0]
    assert green[0] == yellow[0]
    assert green[0] + 24 < red[0] or red[1] != green[1]  # class a comes first
    assert red[1] < blue[1]
    assert green[1] < yellow[1]


def test_pixels_are_enlarged_without_blending() -> None:
    image = torch.rand((1, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    pixels = sheet(preview_png(image, torch.tensor([0]), ["a"], scale=4))
    expected = to_pixels(image[0]).repeat(4, axis=0).repeat(4, axis=1)
    found = np.lib.stride_tricks.sliding_window_view(pixels, expected.shape)[:, :, 0]
    assert (found == expected).all(axis=(2, 3, 4)).sum() == 1


def test_captions_are_drawn_and_differ() -> None:
    image, label = solid([(1.0, 0.0, 0.0)]), torch.tensor([0])
    sheets = [preview_png(image, label, [name]) for name in ("cat", "dog", "cat")]
    assert sheets[0] != sheets[1]
    assert sheets[0] == sheets[2]


def test_long_and_odd_names_do_not_break_the_sheet() -> None:
    images = solid([(1, 0, 0), (0, 1, 0), (0, 0, 1)])
    names = ["x" * 500, "two\nlines", ""]
    assert sheet(preview_png(images, torch.arange(3), names)).shape[1] < 1000


def test_what_is_left_out_is_said() -> None:
    images, labels = torch.zeros(12, 1, 8, 8), torch.arange(4).repeat_interleave(3)
    names = ["a", "b", "c", "d"]
    whole = sheet(preview_png(images, labels, names))
    assert sheet(preview_png(images, labels, names, max_classes=4)).shape == whole.shape
    fewer = sheet(preview_png(images[:6], labels[:6], names))
    cut = sheet(preview_png(images, labels, names, max_classes=2))
    assert cut.shape[0] > fewer.shape[0]  # the line at the bottom
    np.testing.assert_array_equal(cut[: fewer.shape[0] - 14, : fewer.shape[1]], fewer[:-14])


@pytest.mark.parametrize(("classes", "ipc"), [(10, 1), (10, 10), (100, 1), (100, 10)])
def test_sheets_are_neither_towers_nor_ribbons(classes: int, ipc: int) -> None:
    labels = torch.arange(classes).repeat_interleave(ipc)
    images = torch.zeros(()).expand(len(labels), 3, 8, 8)
    names = [f"class {c}" for c in range(classes)]
    height, width, _ = sheet(preview_png(images, labels, names, scale=4)).shape
    assert 0.6 < width / height < 3


@pytest.mark.parametrize(
    ("size", "scale"), [(8, 12), (28, 3), (32, 3), (64, 2), (128, 1), (500, 1)]
)
def test_small_images_are_enlarged_large_ones_are_not(size: int, scale: int) -> None:
    assert enlargement(size) == scale


def test_pixels_are_rounded_and_clipped() -> None:
    grey = torch.tensor([-1.0, 0.5, 2.0]).view(1, 1, 3)
    assert to_pixels(grey)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 0"):
        preview_png(torch.zeros(0, 3, 8, 8), torch.zeros(0), ["a"])
    with pytest.raises(ValueError, match="got 2 and 1"):
        preview_png(torch.zeros(2, 3, 8, 8), torch.tensor([0]), ["a"])
    with pytest.raises(ValueError, match=r"0\.\.0, got 0\.\.1"):
        preview_png(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), ["a"])
    with pytest.raises(ValueError, match=r"\(2, 8, 8\)"):
        preview_png(torch.zeros(1, 2, 8, 8), torch.tensor([0]), ["a"])
