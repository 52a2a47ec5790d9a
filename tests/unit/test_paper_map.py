"""The map from the paper to the code names what is there."""

import importlib
import pkgutil
import re
from typing import Any

import ncfm

TABLE = [line for line in (ncfm.__doc__ or "").splitlines() if line.startswith("| ")][1:]
MODULES = {
    m.name: importlib.import_module(f"ncfm.{m.name}") for m in pkgutil.iter_modules(ncfm.__path__)
}


def has(thing: Any, name: str) -> bool:
    return hasattr(thing, name) or name in getattr(thing, "__dataclass_fields__", {})


def is_there(name: str) -> bool:
    """`module.thing`, `module.Class.method`, `Class.field`, or a name that some module has."""
    first, *rest = name.split(".")
    places = [MODULES[first]] if first in MODULES else []
    places += [getattr(m, first) for m in MODULES.values() if hasattr(m, first)]
    for place in places:
        thing, found = place, True
        for part in rest:
            found = found and has(thing, part)
            thing = getattr(thing, part, None)
        if found:
            return True
    # a method or field whose class the row has named before
    classes = [c for m in MODULES.values() for c in vars(m).values() if isinstance(c, type)]
    return not rest and any(has(c, first) for c in classes if c.__module__.startswith("ncfm"))


def test_every_name_of_the_map_exists() -> None:
    names = [
        re.split(r"[ (]", quoted)[0]
        for row in TABLE
        for quoted in re.findall(r"`([^`]+)`", row.rpartition(" | ")[2])
    ]
    assert len(names) > 30
    assert [name for name in names if not is_there(name)] == []
    assert not is_there("discrepancy.no_such_function")  # negative control
    assert not is_there("NoSuchConfig.lr")
