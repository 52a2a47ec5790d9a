"""What is at hand here: a compiler, a processor that multiplies bfloat16."""

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
        logger.warning("torch.compile does not work here, going on without: %s", reason)
        return False
    return True


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this is a CPU with instructions for products in bfloat16: AVX512_BF16 or AMX."""
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))
