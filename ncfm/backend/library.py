"""Compile the native kernels (`native/kernels.cpp`) for the processor at hand, and load them.

That takes some seconds, so the result is kept in the user's cache directory, under a name that
follows from sources, flags, compiler, processor and C library.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ncfm.tensor_files import file_sha256

SOURCE = Path(__file__).with_name("native") / "kernels.cpp"
FOR_PROCESSOR = ["-O3", "-march=native"]
FLAGS = [*FOR_PROCESSOR, "-ffp-contract=fast", "-std=gnu++17", "-fopenmp", "-shared", "-fPIC"]

logger = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled by $CXX (`c++`); None, and a warning that says why, if that fails."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    try:
        kept = _cache() / f"kernels-{_key(compiler)}.so"
        return _loaded(kept) or _compiled(compiler, kept)
    except (OSError, subprocess.CalledProcessError) as error:
        message = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        logger.warning(
            "no C++ compiler with OpenMP ($CXX, or c++): falling back to PyTorch layers; "
            "distillation takes up to three times as long, training twice: %s",
            (message or str(error)).strip().splitlines()[0],
        )
        return None


def _cache() -> Path:
    """$XDG_CACHE_HOME/ncfm, or ~/.cache/ncfm; an unwritable path if there is no home directory."""
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"], "ncfm")
    try:
        return Path.home() / ".cache/ncfm"
    except RuntimeError:
        return Path(os.devnull, "ncfm")


def _key(compiler: list[str]) -> str:
    """Hash of everything the compiled kernels follow from. The macros that the compiler predefines
    name its version and what the processor can do.
    """
    macros = _run([*compiler, *FOR_PROCESSOR, "-dM", "-E", "-x", "c++", os.devnull])
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.iterdir())]
    system = (platform.system(), *platform.libc_ver())
    return hashlib.sha256("\0".join([*FLAGS, macros, *system, *sources]).encode()).hexdigest()[:16]


def _loaded(path: Path) -> ctypes.CDLL | None:
    """The cached library; None if it is missing or damaged. The hash is checked before loading:
    a truncated library would kill the process.
    """
    try:
        if file_sha256(path) == path.with_suffix(".sha256").read_text(encoding="ascii"):
            return ctypes.CDLL(str(path))
    except (OSError, ValueError):
        return None
    return None


def _compiled(compiler: list[str], kept: Path) -> ctypes.CDLL:
    """Compile, load, and keep for other processes where the cache can be written."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.so"
        _run([*compiler, *FLAGS, str(SOURCE), "-o", str(made)])
        loaded = ctypes.CDLL(str(made))
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            made.with_suffix(".sha256").write_text(file_sha256(made), encoding="ascii")
            for suffix in (".so", ".sha256"):
                beside = kept.with_suffix(f"{suffix}.{platform.node()}.{os.getpid()}")
                shutil.copyfile(made.with_suffix(suffix), beside)
                beside.replace(kept.with_suffix(suffix))
        except OSError as error:
            logger.info("the compiled kernels are not kept: %s", error)
        return loaded


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
