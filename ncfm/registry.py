"""Parts by name: the built-in ones of a registry, or a user's own by its dotted path."""

import importlib
from collections.abc import Mapping
from typing import Any


def lookup(field: str, name: str, known: Mapping[str, Any]) -> Any:
    """The part that a field of a configuration names: an entry of a registry, or an attribute of a
    module, `package.module.Class`, which is imported (on every worker: it must be installed there).

    Raises ValueError, with the known names, if it is neither, and if the import fails.
    """
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(
            f"{field} must be one of {', '.join(known)}, or a dotted path like "
            f"package.module.Class, got {name!r}"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field} {name!r} cannot be imported: {error}") from error
