"""Configuration of the distributed runtime."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Logging, checkpoints and fault tolerance of long stages."""

    log_every: int = 10
    """Distillation steps between metric rows."""
    checkpoint_every_s: float = 30.0
    """Least seconds between checkpoints."""
    checkpoint_share: float = 0.05
    """Largest part of the time that checkpoints of the distillation take: where one takes long, the
    next comes later."""
    checkpoints_kept: int = 2
    max_failures: int = 3
    """Restarts of a worker group after failures, reclaimed nodes not counted; -1: unlimited."""
    min_workers: int | None = None
    """Start, and go on when nodes are lost, with as few workers as this; those of nodes that come
    later join within a minute. Default: wait for all."""
    collective_timeout_s: float = 600.0
    """Seconds that workers wait for each other before they fail and name the missing one."""
    straggler_factor: float = 2.0
    """Log a worker that is this many times slower than the others."""
    local_directory: str | None = None
    """Directory of a node's decoded real images; $NAMES in it are environment variables of the
    node. Default: beside the shards if they are on a local disk, else below $TMPDIR."""

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoints_kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.min_workers is not None and self.min_workers < 1:
            raise ValueError(f"min_workers must be at least 1, got {self.min_workers}")
        if not self.collective_timeout_s > 0:
            raise ValueError(
                f"collective_timeout_s must be positive, got {self.collective_timeout_s}"
            )
        if not 0 < self.checkpoint_share <= 1:
            raise ValueError(f"checkpoint_share must be within (0, 1], got {self.checkpoint_share}")
        if not self.straggler_factor > 1:
            raise ValueError(f"straggler_factor must exceed 1, got {self.straggler_factor}")
