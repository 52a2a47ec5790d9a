"""Fingerprints of results, and versions of the code that produced them."""

import dataclasses
import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def fingerprint(*parts: object) -> str:
    """16 hex digits that change with any part: dataclasses, strings, numbers, lists and
    dictionaries of them.
    """
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def canonical_json(value: object) -> str:
    """JSON with sorted keys; dataclasses become dictionaries of their fields, or their `identity`
    if they have that method.
    """
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    if callable(identity := getattr(value, "identity", None)):
        return identity()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"cannot fingerprint a {type(value).__name__}: {value!r}")


def dotted(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        inner = isinstance(value, Mapping)
        flat |= dotted(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def peak_rss_bytes() -> int:
    """Peak resident memory of this process."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def code_versions() -> dict[str, str]:
    """Versions of Python and packages, and the state of the git checkout if there is one."""
    packages = ("ncfm-ray", "ray", "torch", "torchvision", "numpy")
    versions = {"python": sys.version.split()[0]}
    for package in packages:
        versions[package] = (
            version(package) if _installed(package) else "not installed (run from its source tree)"
        )
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        versions["git"] = f"unknown ({error})"
    else:
        versions["git"] = done.stdout.strip() or "not a git checkout"
    return versions


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
