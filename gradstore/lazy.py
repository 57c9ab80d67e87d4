"""Public names that load when first used (PEP 562), so that importing a package costs nothing."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def names_of(package: str, module_of: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose public names live in its modules.

    module_of: name -> module of the package. A module must not be called like a public name: importing it would put
    the module where the name belongs.
    """

    def get(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
