"""Fidelity measures between image sets, on features, without training on them.

N, M samples; D features; K frequencies; C classes. Statistics of a large real set are additive
(`Moments`, `discrepancy.CFSums`); neighbour measures take two sets that fit in memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ncfm.discrepancy import CF, amplitude_part, ncfd, phase_part

CHUNK = 2048  # rows of the distance matrix in memory at a time


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (N, M) of samples (N, D) and (M, D). Exactly 0 for copies, unlike
    distances computed by matrix products.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class Moments(NamedTuple):
    """Sums of samples and of their outer products, float64; additive over sets."""

    size: int  # samples
    total: Tensor  # (D,)
    products: Tensor  # (D, D): sum of x x^T

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Moments of samples x (N, D)."""
        x = x.double()
        return cls(len(x), x.sum(0), x.mT @ x)

    def plus(self, other: "Moments") -> "Moments":
        """Moments of the union of both sets."""
        return Moments(
            self.size + other.size, self.total + other.total, self.products + other.products
        )

    def mean(self) -> Tensor:
        """Mean (D,)."""
        return self.total / self.size

    def covariance(self) -> Tensor:
        """Covariance (D, D), unbiased; zero for a single sample."""
        mean = self.mean()
        centred = self.products - self.size * torch.outer(mean, mean)
        return centred / max(self.size - 1, 1)


def frechet_distance(x: Moments, y: Moments) -> float:
    """Fréchet distance |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)): the squared Wasserstein
    distance of two Gaussians with these moments (Heusel et al., FID, 2017). Biased upwards for
    small sets: compare only sets of equal size.
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
    """NCFD and its parts, of two CFs (K,) at the same frequencies."""
    return CFDistance(
        float(ncfd(x, y)), float(amplitude_part(x, y).mean()), float(phase_part(x, y).mean())
    )


class Neighbourhood(NamedTuple):
    """Precision, recall, density and coverage; each in [0, 1] except density."""

    precision: float  # share of fakes within the manifold of the reals (Kynkaanniemi et al., 2019)
    recall: float  # share of reals within the manifold of the fakes
    density: float  # mean number of reals' balls around a fake, over k (Naeem et al., 2020)
    coverage: float  # share of reals' balls that contain a fake


def neighbourhood(real: Tensor, fake: Tensor, k: int = 5) -> Neighbourhood:
    """Neighbour measures of reals (N, D) and fakes (M, D). A sample's ball reaches to its k-th
    neighbour in its own set, or to the last if there are fewer.

    Density (1 for identical distributions) alone can mislead: it exceeds 1 if all fakes lie in the
    densest region of the reals, and for a weak extractor even for noise. Read it with coverage.

    Raises ValueError if a set has fewer than two samples.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"need two samples of each set, got {len(real)} and {len(fake)}")
    real_radius, fake_radius = kth_distances(real, k), kth_distances(fake, k)
    in_real = torch.zeros(len(fake), dtype=torch.long)  # reals' balls that contain each fake
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
    """Distance (N,) of each sample (N, D) to its k-th nearest neighbour; to the last if N <= k."""
    k = min(k, len(x) - 1)
    rows = [
        _distances(x[start : start + CHUNK], x).kthvalue(k + 1, dim=1).values  # the first is itself
        for start in range(0, len(x), CHUNK)
    ]
    return torch.cat(rows)


def intrinsic_dimension(x: Tensor) -> float:
    """Intrinsic dimension of samples x (N, D), by TwoNN's maximum likelihood estimate
    N / sum log(r_2 / r_1), r the distances to the two nearest neighbours (Facco et al., 2017).

    Duplicates count once, since the estimate assumes distinct points; nan if fewer than three
    remain, or if all are equally far apart.
    """
    distinct = x.double().unique(dim=0)
    if len(distinct) < 3:
        return float("nan")
    total = float((kth_distances(distinct, 2) / kth_distances(distinct, 1)).log().sum())
    return len(distinct) / total if total > 0 else float("nan")


def label_sharpness(x: Tensor, labels: Tensor) -> float:
    """Label sharpness max |[y_i != y_j]| / |x_i - x_j|, the inverse distance of the closest samples
    of different classes (Konz and Mazurowski, 2024, on random pairs; here on all). Samples (N, D),
    labels (N,).

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
    """Nearest neighbours of M samples; results of chunks are merged by `less`."""

    distance: Tensor  # (M,)
    place: Tensor  # (M,) int64: index of the neighbour

    def less(self, other: "Nearest") -> "Nearest":
        """Elementwise the nearer neighbour; on ties the first."""
        better = (other.distance < self.distance) | (
            (other.distance == self.distance) & (other.place < self.place)
        )
        return Nearest(
            torch.where(better, other.distance, self.distance),
            torch.where(better, other.place, self.place),
        )


def nearest(x: Tensor, many: Tensor, first_place: int = 0) -> Nearest:
    """Nearest neighbours of samples x (M, D) in `many` (N, D), indexed from first_place."""
    distance, index = _distances(x, many).min(1)
    return Nearest(distance, index + first_place)
