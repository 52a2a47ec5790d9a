"""Weights of a network from a file."""

import hashlib
import logging
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SHOWN = 10  # names in an error


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that torch.save wrote; nothing else in
    such a file is loaded. Raises ValueError if it is neither.
    """
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a broken or an unsafe file, in many classes
        state = error  # not shown: PyTorch's text advises to load the file without checks
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"weights {path} must be a safetensors file, or a state dict (tensors by name) that "
            f"torch.save wrote, got {type(state).__name__}"
        )
    return state


def load_weights(
    path: str, network: nn.Module, head: nn.Module, head_name: str | tuple[str, ...]
) -> None:
    """Load a file into a network and its head, whose tensors the file has below `head_name`. A head
    of other shapes, or none, leaves `head` as it is, and is logged.

    Raises ValueError, with their names, if other tensors are missing, unexpected or of other
    shapes.
    """
    heads = (head_name,) if isinstance(head_name, str) else head_name
    prefixes = tuple(f"{name}." for name in heads)
    state = read_weights(path)
    theirs = {k: v for k, v in state.items() if not k.startswith(prefixes)}
    ours = {k: v for k, v in network.state_dict().items() if not k.startswith(prefixes)}
    wrong = {
        "missing": sorted(ours.keys() - theirs),
        "unexpected": sorted(theirs.keys() - ours),
        "of another shape": sorted(
            k for k in ours.keys() & theirs if ours[k].shape != theirs[k].shape
        ),
    }
    if any(wrong.values()):
        parts = [
            f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"
            for what, names in wrong.items()
            if names
        ]
        raise ValueError(f"weights {path} are not this network's; {'; '.join(parts)}")
    own = {f"{prefixes[0]}{k}": v for k, v in head.state_dict().items()}
    if all(k in state and state[k].shape == v.shape for k, v in own.items()):
        ours |= own
    else:
        _warn_once(f"weights {path} have no head of this shape: it starts fresh")
    for name, tensor in ours.items():
        tensor.copy_(state[name])


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def weights_digest(path: str) -> str:
    """SHA-256 of a file; computed again only if it changes."""
    return _digest(path, Path(path).stat().st_mtime_ns)


@cache
def _digest(path: str, _mtime: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
