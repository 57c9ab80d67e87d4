"""Public names of a package, which load on first use from its `__init__.pyi`, and the version, which all share."""

from collections.abc import Callable

import lazy_loader

from gradstore.errors import near_miss


def attach(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package; `file` is its `__init__.py`."""
    public, _, names = lazy_loader.attach_stub(package, file)

    def load(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("gradstore")
        try:
            return public(name)
        except AttributeError:
            if name in names:
                raise
            raise AttributeError(f"{package} has no {name!r}{near_miss(name, names)}") from None

    return load, lambda: [*names, "__version__"], names
