"""Options of the audit stage, apart from what it imports."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How the distilled set is compared with the real one."""

    networks: tuple[str, ...] = ()
    """Extractors, as model.name takes them, trained on the real images from a seed that the
    distillation has not used; none: that of model."""
    num_freqs: int = 1024
    """Frequencies t ~ N(0, I) of the characteristic functions of normalised features."""
    feature_dim: int = 256
    """Features are projected on so many random orthonormal directions for moments and neighbours;
    the characteristic functions take all of them."""
    neighbours: int = 5
    """k of precision, recall, density and coverage (literature: 3 to 5)."""
    samples: int = 2000
    """Real images whose neighbours are looked at; moments and CFs are of all."""
    draws: int = 3
    """Random sets of each kind; their spread says what a difference means."""

    def __post_init__(self) -> None:
        for name in ("num_freqs", "feature_dim", "neighbours", "samples", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
