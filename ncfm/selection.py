"""Selection of real images: the easy images of a class, and those for initialisation.

An image is easy if its cross-entropy under trained networks is low. Hard images hurt if few images
are stored (PAD); confident images (RDED) and images spread over the class (DREAM) are better
initialisations than random ones.
"""

import copy
import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ncfm.backend.kernels import native
from ncfm.extractors import ExtractorPool
from ncfm.images import ImageSpec, to_device, to_unit
from ncfm.seeding import keyed_generator

CHUNK = 256  # images per forward pass
K_MEANS_ROUNDS = 20
NETWORKS = 4  # maximum number of pool networks that the loss is averaged over


@torch.no_grad()
def _passes(
    pool: ExtractorPool, member: int, images: Tensor, spec: ImageSpec
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and logits, float64, of chunks of images under a member's trained network.

    Float64 from the features on, so that the selection does not depend on rounding.
    """
    model = pool.blend(member, 1.0)
    features = native(model) or model.features
    weight = next(model.parameters())
    classifier = copy.deepcopy(model.classifier).double()
    for part in images.split(CHUNK):
        inputs = spec.normalize(to_unit(to_device(part, weight.device)).to(weight.dtype))
        own = features(inputs).double()
        yield own, classifier(own)


def image_losses(
    pool: ExtractorPool, images: Tensor, label: int, spec: ImageSpec, networks: int = NETWORKS
) -> Tensor:
    """Cross-entropy (N,) of the images of a class, averaged over up to `networks` trained networks
    of the pool. `images` is (N, C, H, W), uint8 or in [0, 1].
    """
    count = min(networks, len(pool))
    total = torch.zeros(len(images), dtype=torch.float64)
    for member in range(count):
        losses = [
            -logits.log_softmax(1)[:, label].cpu()
            for _, logits in _passes(pool, member, images, spec)
        ]
        total += torch.cat(losses)
    return total / count


def class_features(pool: ExtractorPool, images: Tensor, spec: ImageSpec) -> Tensor:
    """Normalised features (N, D), float64, under the first member's trained network."""
    features = [part.cpu() for part, _ in _passes(pool, 0, images, spec)]
    return F.normalize(torch.cat(features), dim=-1)


def easy_images(
    pool: ExtractorPool, images: Tensor, label: int, spec: ImageSpec, fraction: float
) -> Tensor:
    """Sorted indices of the easiest `fraction` of the images of a class."""
    losses = image_losses(pool, images, label, spec)
    return easiest(losses, easy_count(len(images), fraction)).sort().values


def first_images(
    how: Literal["random", "confident", "spread"],
    pool: ExtractorPool,
    images: Tensor,
    allowed: Tensor,
    label: int,
    spec: ImageSpec,
    *,
    count: int,
    seed: int,
) -> Tensor:
    """Indices of the real images of a class, (N, C, H, W), that initialise its synthetic images:
    min(count, n) of the n `allowed` ones, chosen by `how` (see `SyntheticConfig.choose`).
    """
    count = min(count, len(allowed))
    if how == "random":
        order = torch.randperm(len(allowed), generator=keyed_generator(seed, "init", 0, label))
        return allowed[order[:count]].sort().values
    candidates = images[allowed]
    if how == "confident":
        return allowed[easiest(image_losses(pool, candidates, label, spec), count)]
    generator = keyed_generator(seed, "init_choice", label)
    return allowed[spread(class_features(pool, candidates, spec), count, generator)]


def easiest(losses: Tensor, count: int) -> Tensor:
    """Indices of the lowest losses, lowest first; ties in order."""
    return losses.argsort(stable=True)[:count]


def easy_count(images: int, fraction: float) -> int:
    """Number of easy images of a class: at least one, if it has any."""
    return math.ceil(fraction * images)


def spread(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` distinct samples of x (N, D), each closest to a k-means centre. Raises
    ValueError if there are fewer samples.
    """
    if count > len(x):
        raise ValueError(f"cannot choose {count} of {len(x)} samples")
    centres = x[_first_centres(x, count, generator)]
    for _ in range(K_MEANS_ROUNDS):
        nearest = torch.cdist(x, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    distances, chosen = torch.cdist(centres, x), list[int]()
    for row in distances:
        row[chosen] = math.inf
        chosen.append(int(row.argmin()))
    return torch.tensor(chosen)


def _first_centres(x: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """k-means++ initialisation: sample in proportion to squared distances to chosen centres."""
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    nearest = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        total = nearest.cumsum(0)
        place = float(torch.rand((), generator=generator, dtype=torch.float64)) * float(total[-1])
        index = min(int(torch.searchsorted(total, place, right=True)), len(x) - 1)
        chosen.append(index)
        nearest = torch.minimum(nearest, (x - x[index]).square().sum(1))
    return chosen
