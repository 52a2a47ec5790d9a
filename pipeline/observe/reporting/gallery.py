"""Image gallery of a report: before and after distillation, by class, limited in size."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from ncfm import SyntheticSet
from pipeline.observe.preview import enlargement, png, to_pixels

# Per page and set.
MAX_CLASSES, MAX_IMAGES, MAX_PIXELS = 100, 200, 2_000_000


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """Images of a class: (alternative text, data URI) each."""

    name: str
    before: Sequence[tuple[str, str]]
    after: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images of a run and their layout."""

    classes: Sequence[ClassImages]
    width: int  # of an image, CSS pixels
    left_out: str  # note of omitted images; may be empty

    @property
    def has_before(self) -> bool:
        """Whether initial images are included."""
        return any(entry.before for entry in self.classes)


def gallery(initial: SyntheticSet | None, distilled: SyntheticSet) -> Gallery:
    """Gallery of the images before and after distillation, within the page's limits."""
    names, size = distilled.class_names, max(distilled.images.shape[-2:])
    count = min(len(names), MAX_CLASSES)
    allowed = min(MAX_IMAGES, MAX_PIXELS // size**2)
    each = max(1, allowed // count)
    classes = [
        ClassImages(
            name=names[c],
            before=_images(initial, c, each, "before") if initial else [],
            after=_images(distilled, c, each, "after"),
        )
        for c in range(count)
    ]
    shown, stored = sum(len(entry.after) for entry in classes), len(distilled.images)
    left_out = (
        f"Shown: {count} of {len(names)} classes, {shown} of {stored} images "
        f"(at most {each} a class). The stage export writes all of them."
        if shown < stored or count < len(names)
        else ""
    )
    # An integer multiple, so that all stored pixels have the same size.
    return Gallery(classes=classes, width=size * enlargement(size), left_out=left_out)


def _images(images: SyntheticSet, class_index: int, limit: int, when: str) -> list[tuple[str, str]]:
    own = images.images[images.labels == class_index]
    name = images.class_names[class_index]
    return [
        (
            f"{name}, image {i + 1} of {len(own)}, {when} distillation",
            data_uri("image/png", png(to_pixels(image))),
        )
        for i, image in enumerate(own[:limit])
    ]


def data_uri(media_type: str, data: bytes) -> str:
    """Base64 data URI."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
