"""How faithful a set of images is to another, without training on it: measures on features.

N, M samples; D features; K frequencies; C classes. What is summed over a large real set is additive
(`Moments`, `discrepancy.CFSums`); the measures of neighbours take two sets that fit in memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ncfm.discrepancy import CF, amplitude_part, ncfd, phase_part

CHUNK = 2048  # rows whose distances are held at a time


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, of all pairs of samples (N, D) and (M, D): (N, M). Exactly 0 for copies, which
    they are not where they come from matrix products.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class Moments(NamedTuple):
    """Sums of samples and of their products, float64. They add."""

    size: int  # samples
    total: Tensor  # (D,)
    products: Tensor  # (D, D): sum of x x^T

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Of samples x (N, D)."""
        x = x.double()
        return cls(len(x), x.sum(0), x.mT @ x)

    def plus(self, other: "Moments") -> "Moments":
        """Of both sets together."""
        return Moments(
            self.size + other.size, self.total + other.total, self.products + other.products
        )

    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.size

    def covariance(self) -> Tensor:
        """(D, D), unbiased; zero for a single sample."""
        mean = self.mean()
        centred = self.products - self.size * torch.outer(mean, mean)
        return centred / max(self.size - 1, 1)


def frechet_distance(x: Moments, y: Moments) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)): the squared Wasserstein distance of two
    Gaussians with these moments (Heusel et al., FID, 2017). Biased upwards for small sets: compare
    sets of one size alone.
    """
    cov_x, cov_y = x.covariance(), y.covariance()
    root = _symmetric_root(cov_x)
    # The eigenvalues of C_x C_y are those of C_x^(1/2) C_y C_x^(1/2), which is symmetric.
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    distance = (x.mean() - y.mean()).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    return max(0.0, float(distance))


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return root


class CFDistance(NamedTuple):
    """NCFD of two characteristic functions, and its parts before the square root."""

    ncfd: float  # mean_k sqrt(chf(t_k)) at alpha 0.5 (paper eq. 7)
    amplitude: float  # mean_k (|phi_X| - |phi_Y|)^2: diversity
    phase: float  # mean_k 2 |phi_X| |phi_Y| (1 - cos theta): realism


def cf_distance(x: CF, y: CF) -> CFDistance:
    """Of two CFs (K,) at the same frequencies."""
    return CFDistance(
        float(ncfd(x, y)), float(amplitude_part(x, y).mean()), float(phase_part(x, y).mean())
    )


class Neighbourhood(NamedTuple):
    """How two sets of features lie in each other; each in [0, 1] but density."""

    precision: float  # share of fakes within the manifold of the reals (Kynkaanniemi et al., 2019)
    recall: float  # share of reals within the manifold of the fakes
    density: float  # reals' balls that hold a fake, over k (Naeem et al., 2020): 1 if alike
    coverage: float  # share of reals' balls that hold some fake


def neighbourhood(real: Tensor, fake: Tensor, k: int = 5) -> Neighbourhood:
    """Of reals (N, D) and fakes (M, D); a ball reaches to a sample's k-th neighbour in its own set,
    or to the last if there are fewer.

    Density alone can mislead: fakes that all lie in the densest place of the reals exceed 1, and to
    an extractor that hardly tells images apart even noise may. Read it beside coverage.

    Raises ValueError if a set has fewer than two samples.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"need two samples of each set, got {len(real)} and {len(fake)}")
    real_radius, fake_radius = kth_distances(real, k), kth_distances(fake, k)
    in_real = torch.zeros(len(fake), dtype=torch.long)  # reals' balls that hold each fake
    in_fake = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(real), CHUNK):
        rows = slice(start, start + CHUNK)
        distances = _distances(real[rows], fake)
        inside = distances <= real_radius[rows, None]
        in_real += inside.sum(0)
        covered[rows] = inside.any(1)
        in_fake[rows] = (distances <= fake_radius).any(1)
    neighbours = min(k, len(real) - 1)
    return Neighbourhood(
        precision=float((in_real > 0).double().mean()),
        recall=float(in_fake.double().mean()),
        density=float(in_real.double().mean()) / neighbours,
        coverage=float(covered.double().mean()),
    )


def kth_distances(x: Tensor, k: int) -> Tensor:
    """Distance of every sample (N, D) to its k-th nearest other, (N,); to the last if N <= k."""
    k = min(k, len(x) - 1)
    rows = [
        _distances(x[start : start + CHUNK], x).kthvalue(k + 1, dim=1).values  # itself is first
        for start in range(0, len(x), CHUNK)
    ]
    return torch.cat(rows)


def intrinsic_dimension(x: Tensor) -> float:
    """Of the manifold near which samples x (N, D) lie: TwoNN's maximum likelihood estimate
    N / sum log(r_2 / r_1), r the distances to the two nearest others (Facco et al., 2017).

    Copies of a sample count once, for the estimate holds for distinct points; nan if fewer than
    three remain, or if all of them are equally far apart.
    """
    distinct = x.double().unique(dim=0)
    if len(distinct) < 3:
        return float("nan")
    total = float((kth_distances(distinct, 2) / kth_distances(distinct, 1)).log().sum())
    return len(distinct) / total if total > 0 else float("nan")


def label_sharpness(x: Tensor, labels: Tensor) -> float:
    """max |[y_i != y_j]| / |x_i - x_j|: how near to each other images of different classes come
    (Konz and Mazurowski, 2024, there on random pairs, here on all). Samples (N, D), labels (N,).

    nan for a single class, inf if two classes share an image.
    """
    nearest = torch.inf
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        distances = _distances(x[rows], x)
        other = labels[rows, None] != labels
        if other.any():
            nearest = min(nearest, float(distances[other].min()))
    if nearest == torch.inf:
        return float("nan")
    return 1 / nearest if nearest > 0 else float("inf")


class Nearest(NamedTuple):
    """The nearest of many samples to each of some, over chunks: take the less of two."""

    distance: Tensor  # (M,)
    place: Tensor  # (M,) int64: among the many

    def less(self, other: "Nearest") -> "Nearest":
        """The nearer of each two; of equally near ones the first."""
        better = (other.distance < self.distance) | (
            (other.distance == self.distance) & (other.place < self.place)
        )
        return Nearest(
            torch.where(better, other.distance, self.distance),
            torch.where(better, other.place, self.place),
        )


def nearest(x: Tensor, many: Tensor, first_place: int = 0) -> Nearest:
    """For samples x (M, D) the nearest of `many` (N, D), whose places begin with first_place."""
    distance, index = _distances(x, many).min(1)
    return Nearest(distance, index + first_place)
