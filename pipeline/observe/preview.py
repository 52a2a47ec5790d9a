"""PNG images of a synthetic set, single and as a contact sheet with class names."""

import io
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_INK, _FAINT, _PAPER = (28, 30, 33), (105, 110, 118), (255, 255, 255)
_FONT_SIZE = 15
_GAP = 4  # between images of a class
_GUTTER = 14  # around the sheet, and between a caption and its images
_CAPTION_LIMIT = 190  # pixels; longer names are cut with an ellipsis


def to_pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    """(C, H, W) in [0, 1], 1 or 3 channels -> (H, W, 3), rounded and clipped."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image must be (1 or 3, height, width), got {tuple(image.shape)}")
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte()
    return pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """(H, W, 3) -> PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def enlargement(image_size: int, target: int = 96) -> int:
    """The integer factor, at least 1, that scales an image closest to `target` pixels."""
    return max(1, round(target / image_size))


def preview_png(
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    scale: int | None = None,
    max_classes: int = 100,
    max_images_per_class: int = 10,
) -> bytes:
    """Contact sheet: one row of images per class, with the class name to its left.

    Short rows are laid out in several columns, so that the sheet is wider than tall. A last line
    states what the limits omit.

    Args:
        images: (N, C, H, W) in [0, 1], 1 or 3 channels.
        labels: (N,) class indices.
        class_names: one name per class; a class without images has no row.
        scale: integer enlargement (nearest neighbour); None: to about 96 pixels per image.
        max_classes: maximum number of rows.
        max_images_per_class: maximum number of images in a row.

    Returns:
        The PNG file, deterministic.

    Raises:
        ValueError: no images, or labels that do not match images or class names.
    """
    _check(images, labels, class_names)
    present = [c for c in range(len(class_names)) if bool((labels == c).any())]
    rows = [
        (class_names[c], images[labels == c][:max_images_per_class]) for c in present[:max_classes]
    ]
    height, width = images.shape[-2:]
    scale = scale or enlargement(max(height, width))
    font = ImageFont.load_default(_FONT_SIZE)
    captions = [_fit(name, font) for name, _ in rows]
    row_height = height * scale + _GAP
    strip_width = max(len(strip) for _, strip in rows) * (width * scale + _GAP) - _GAP
    caption_width = max(round(font.getlength(caption)) for caption in captions)
    lines = _lines(len(rows), caption_width + strip_width + 2 * _GUTTER, row_height)
    lefts = _column_starts(captions, lines, strip_width, font)
    right = lefts[-1] + strip_width
    note = _left_out(rows, images, present)
    bottom = lines * row_height - _GAP + 2 * _GUTTER
    sheet_width = max(right, round(font.getlength(note)) + _GUTTER) + _GUTTER
    sheet_height = bottom + (_FONT_SIZE + _GUTTER if note else 0)
    sheet = Image.new("RGB", (sheet_width, sheet_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (_, strip) in enumerate(rows):
        left, top = lefts[i // lines], _GUTTER + (i % lines) * row_height
        middle = top + height * scale / 2
        draw.text((left - _GUTTER, middle), captions[i], fill=_INK, font=font, anchor="rm")
        for j, image in enumerate(strip):
            enlarged = to_pixels(image).repeat(scale, axis=0).repeat(scale, axis=1)
            sheet.paste(Image.fromarray(enlarged), (left + j * (width * scale + _GAP), top))
    if note:
        draw.text((_GUTTER, bottom), note, fill=_FAINT, font=font)
    return png(np.asarray(sheet))


def _column_starts(
    captions: Sequence[str],
    lines: int,
    strip_width: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> list[int]:
    """Left edge of each column's images: the end of its longest caption."""
    lefts, right = [], 0
    for first in range(0, len(captions), lines):
        widest = max(font.getlength(caption) for caption in captions[first : first + lines])
        lefts.append(right + round(widest) + 2 * _GUTTER)
        right = lefts[-1] + strip_width
    return lefts


def _check(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"need one label for each image, got {len(images)} and {len(labels)}")
    if int(labels.min()) < 0 or int(labels.max()) >= len(class_names):
        raise ValueError(
            f"labels must lie in 0..{len(class_names) - 1}, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )


def _fit(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    name = " ".join(name.split())  # a line break would not be drawn on the row
    if font.getlength(name) <= _CAPTION_LIMIT:
        return name
    while name and font.getlength(name + "…") > _CAPTION_LIMIT:
        name = name[:-1]
    return name.rstrip() + "…"


def _lines(rows: int, column_width: int, row_height: int) -> int:
    """Rows per column: the sheet is about 3:2 and its last column well filled."""

    def flaw(lines: int) -> float:
        columns = -(-rows // lines)
        aspect = columns * column_width / (lines * row_height)
        return abs(math.log(aspect / 1.5)) + 3 * (columns * lines - rows) / rows

    return min(range(rows, 0, -1), key=flaw)


def _left_out(shown: Sequence[tuple[str, Tensor]], images: Tensor, present: Sequence[int]) -> str:
    count = sum(len(strip) for _, strip in shown)
    if count == len(images):
        return ""
    return f"{count} of {len(images)} images, {len(shown)} of {len(present)} classes"
