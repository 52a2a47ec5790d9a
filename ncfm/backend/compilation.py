"""Whether torch.compile works here."""

import functools
import logging

import torch

logger = logging.getLogger(__name__)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether a compiled function runs on such a device; a warning says why not.

    On a CPU it needs a C++ compiler. The trial takes a few seconds, once a process.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device_type))
    except RuntimeError as error:  # of the several kinds of torch._dynamo and torch._inductor
        reason = str(error).strip().splitlines()[0]
        logger.warning("torch.compile does not work here, falling back to eager layers: %s", reason)
        return False
    return True
