"""How long stages run on a cluster."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How long stages run on a cluster."""

    log_every: int = 10
    """Distillation steps between two rows of metrics."""
    checkpoint_every_s: float = 30.0
    """Seconds between two checkpoints."""
    checkpoints_kept: int = 2
    max_failures: int = 3
    """How often a group of workers is started again after one of them failed; -1 without limit."""
    min_workers: int | None = None
    """If nodes are lost, go on with as few workers as this; default: wait until they are back."""
    collective_timeout_s: float = 600.0
    """How long workers wait for each other before they fail and name the one that did not come."""
    straggler_factor: float = 2.0
    """A worker this many times slower than the others is named in the log."""
    local_directory: str | None = None
    """Where a node keeps the decoded real images; $NAMES in it are the node's environment
    variables. Default: beside the shards, or below $TMPDIR if they are not on the node's own disk.
    """

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
        if not self.straggler_factor > 1:
            raise ValueError(f"straggler_factor must exceed 1, got {self.straggler_factor}")
