"""Features of real and synthetic images in chunks: native kernels, torch.compile or eager layers.

A chunk fits a CPU's cache or fills a GPU. What chunks an image is in changes nothing but rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ncfm.backend.compilation import can_compile
from ncfm.backend.kernels import NativeConvNet
from ncfm.backend.memory import keep_freed_memory
from ncfm.images import to_device
from ncfm.models.classifier import Classifier

BLOCK_CHUNKS = 4  # chunks of synthetic images with a live graph (at least one class)
PREPARED_CHUNKS = 8  # chunks of images that are decoded and augmented together
CHUNK_PIXELS = {"cpu": 2**13, "cuda": 2**19}  # an extractor's activations: about 0.5 KiB each
GRAPH_PIXELS = 2**19
COMPILE_FROM = 500  # steps

Prepare = Callable[[Tensor, Tensor], Tensor]
"""Images (N, ...) and the position of each one's class (N,) -> the extractor's inputs: normalised,
augmented, and, of stored synthetic images, decoded."""

Backward = Callable[[list[Tensor], float], None]
"""Gradients of a loss with respect to each class's features, (N_c, D), and a factor of the loss ->
the gradients are accumulated in the images."""


def default_chunk(image_size: int, device: torch.device) -> int:
    """Images in one pass of the extractor: 8 at 32 px on a CPU, 512 on a GPU; at least two."""
    return max(2, CHUNK_PIXELS.get(device.type, CHUNK_PIXELS["cuda"]) // image_size**2)


def default_graph_images(image_size: int) -> int:
    """Decoded synthetic images whose graph is kept: 512 at 32 px, 32 at 128."""
    return max(1, GRAPH_PIXELS // image_size**2)


class FeatureExtractor:
    """The features of a model whose weights change in place from step to step.

    Args:
        native: its features by native kernels, if there are any for it.
        precision: that of the model; features are at least float32.
        tiles: decoded images of a stored synthetic one.
        normalize: L2-normalise every feature vector.
        num_steps: those of the run; with `torch_compile` None only long runs are compiled.
    """

    def __init__(
        self,
        model: Classifier,
        native: NativeConvNet | None,
        *,
        image_size: int,
        tiles: int,
        normalize: bool,
        device: torch.device,
        precision: torch.dtype,
        num_steps: int,
        chunk_size: int | None = None,
        graph_images: int | None = None,
        torch_compile: bool | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        keep_freed_memory()
        self.model, self.device, self.precision = model, device, precision
        self.dtype = torch.promote_types(precision, torch.float32)
        self.tiles, self.normalize, self.cuda_graphs = tiles, normalize, cuda_graphs
        self.chunk_size = chunk_size or default_chunk(image_size, device)
        self.graph_images = graph_images or default_graph_images(image_size)
        self.pass_size, self.compiled = self.chunk_size, False
        self.body: Callable[[Tensor], Tensor]
        if native is not None:
            self.pass_size *= PREPARED_CHUNKS  # the kernels block for the cache themselves
            self.body = native
            return
        self.compiled = (
            num_steps >= COMPILE_FROM and can_compile(device.type)
            if torch_compile is None
            else torch_compile
        )
        self.body = self._layers()

    def _layers(self) -> Callable[[Tensor], Tensor]:
        model, precision, dtype = self.model, self.precision, self.dtype
        # Eager norms are slow in channels-last; compiled ones are fastest in it.
        layout = torch.channels_last if self.compiled else torch.preserve_format

        def body(images: Tensor) -> Tensor:
            images = images.to(precision, memory_format=layout)
            return model.features(images).to(dtype)

        if not self.compiled:
            return body
        # The module never changes: looking each call up among its attributes took 0.1 ms of 3.
        compiled: Callable[[Tensor], Tensor] = torch.compile(
            body,
            dynamic=False,
            options={
                "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
                "triton.cudagraphs": self.cuda_graphs,
            },
        )
        return compiled

    def __call__(self, images: Tensor) -> Tensor:
        """Raw features (N, D) of a chunk of inputs (N, C, H, W). torch.compile sees whole chunks
        only: a smaller one is padded, and its features are cut.
        """
        if not self.compiled:
            return self.body(images)
        missing = self.chunk_size - len(images)
        inputs = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else images
        features = self.body(inputs)[: len(images)]
        # The next replay of a CUDA graph writes where this one's features are.
        return features.clone() if self.cuda_graphs else features

    def normalized(self, features: Tensor) -> Tensor:
        """Features (N, D) as they are matched: normalised or raw."""
        return F.normalize(features, dim=-1) if self.normalize else features

    @torch.no_grad()
    def real(self, batches: Iterable[Tensor], first: int, prepare: Prepare) -> list[Tensor]:
        """Features (N_c, D) of the real images of neighbouring classes, `first` the position of the
        first of them. The batches are read one after the other: not all need to be in memory.
        """
        counts = list[int]()

        def counted() -> Iterator[Tensor]:
            for batch in batches:
                counts.append(len(batch))
                yield batch

        none = torch.empty(0, self.model.num_features, dtype=self.dtype, device=self.device)
        features = [none]
        for images, group in chunks(counted(), first, PREPARED_CHUNKS * self.chunk_size):
            inputs = prepare(to_device(images, self.device), group)
            features += [self(chunk) for chunk in inputs.split(self.pass_size)]
        return list(self.normalized(torch.cat(features)).split(counts))

    def blocks(self, stored: Sequence[Tensor]) -> list[slice]:
        """Neighbouring classes whose synthetic images have a live graph at the same time."""
        counts = [self.tiles * len(images) for images in stored]
        return slices(counts, min(BLOCK_CHUNKS * self.chunk_size, self.graph_images))

    def inputs(
        self, stored: Sequence[Tensor], part: slice, prepare: Prepare
    ) -> Iterator[list[Tensor]]:
        """The extractor's inputs of the classes of a part, in chunks; those of one list share their
        graph, since a stored image is decoded as a whole.
        """
        together = max(1, PREPARED_CHUNKS * self.chunk_size // self.tiles)
        for images, group in chunks(stored[part], part.indices(len(stored))[0], together):
            yield list(prepare(images, group).split(self.pass_size))

    def synthetic(
        self, stored: Sequence[Tensor], part: slice, prepare: Prepare
    ) -> tuple[list[Tensor], Backward]:
        """Features (N_c, D) of the stored synthetic images of some classes, without a graph, and
        the function that backpropagates from them to the images.

        Up to `graph_images` decoded images the graph is kept, beyond they are computed again.
        """
        counts = [self.tiles * len(images) for images in stored[part]]
        keep_graph = sum(counts) <= self.graph_images
        with torch.set_grad_enabled(keep_graph):
            chunked = [
                self(images) for inputs in self.inputs(stored, part, prepare) for images in inputs
            ]
        features = torch.cat([chunk.detach() for chunk in chunked]).requires_grad_()
        matched = self.normalized(features)

        def backward(gradients: list[Tensor], weight: float) -> None:
            gradient = torch.cat(gradients).mul_(weight)
            (gradient,) = torch.autograd.grad(matched, features, gradient)
            pieces = list(gradient.split([len(chunk) for chunk in chunked]))
            if keep_graph:
                torch.autograd.backward(chunked, pieces)
                return
            for inputs in self.inputs(stored, part, prepare):
                again = [self(images) for images in inputs]
                torch.autograd.backward(again, pieces[: len(again)])
                del pieces[: len(again)]

        return list(matched.detach().split(counts)), backward


def slices(counts: Sequence[int], limit: int) -> list[slice]:
    """Neighbouring parts, as many together as have up to `limit` rows, but at least one."""
    parts, start = [], 0
    for end in range(1, len(counts) + 1):
        if end == len(counts) or sum(counts[start : end + 1]) > limit:
            parts.append(slice(start, end))
            start = end
    return parts


def chunks(tensors: Iterable[Tensor], first: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over tensors as if they were one: up to `size` rows, and the number of the tensor
    that each row is from, counted from `first`.
    """
    rows: list[Tensor] = []
    groups: list[Tensor] = []
    room = size
    for g, tensor in enumerate(tensors, first):
        start = 0
        while start < len(tensor):
            piece = tensor[start : start + room]
            rows.append(piece)
            groups.append(torch.full((len(piece),), g))
            start, room = start + len(piece), room - len(piece)
            if not room:
                yield torch.cat(rows), torch.cat(groups)
                rows, groups, room = [], [], size
    if rows:
        yield torch.cat(rows), torch.cat(groups)
