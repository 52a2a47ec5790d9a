"""NCFM: dataset distillation by neural characteristic function matching (Wang et al., 2025)."""

from ncfm.api import Settings, distill, evaluate
from ncfm.synthetic import SyntheticSet
from ncfm.synthetic import load_synthetic as load

__all__ = ["Settings", "SyntheticSet", "distill", "evaluate", "load"]
