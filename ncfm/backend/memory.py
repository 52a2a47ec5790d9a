"""Keep glibc from returning freed blocks to the system."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 32 * 2**20  # bytes; the largest M_MMAP_THRESHOLD that every glibc accepts


def keep_freed_memory() -> bool:
    """Let glibc's malloc reuse blocks of up to 32 MiB instead of returning them to the system.

    Otherwise each activation on a CPU is memory mapped anew, and the system clears it page by page,
    which takes a third of an eager step's time. It holds for the whole process. Returns whether
    glibc is in use; with another C library nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )
