"""The graph of imports between the files of the packages: `python -m tests.layers` prints its rooms and its circles.

A room is a folder of the engine or of the trainer, or one of the packages. An import inside a function counts; one that
only type checkers read does not.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("gradstore", "engine", "trainer", "analysis", "cli", "demo")
"""Folders of the repository; all but the first are packages inside gradstore, by links."""
Graph = Mapping[str, set[str]]
"""File -> files it imports, as dotted names."""


def files() -> dict[str, Path]:
    """Dotted name -> file, of every module that is installed."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT)
            if not any((ROOT / parent).is_symlink() for parent in place.parents):
                parts = [*([] if folder == "gradstore" else ["gradstore"]), *place.with_suffix("").parts]
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Names that a file imports, `package.name` for `from package import name`, with their lines."""
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", node.lineno) for alias in node.names)


def graph(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which files each one imports."""
    found = {}
    for name, path in modules.items():
        wanted = {one if one in modules else one.rpartition(".")[0] for one, _ in imported(path)}
        found[name] = (wanted & modules.keys()) - {name}
    return found


def room(name: str) -> str:
    """The room of a file."""
    parts = name.split(".")
    if len(parts) < 3 or parts[1] not in ("engine", "trainer"):
        package = parts[1] if len(parts) > 1 else ""
        return f"gradstore.{package}" if package in FOLDERS else "gradstore"
    return ".".join(parts[:3])


def rooms(edges: Graph) -> dict[str, set[str]]:
    """Which rooms each room imports from; `python -m gradstore` starts the command line and is in no room."""
    found: dict[str, set[str]] = {}
    for name, wanted in edges.items():
        if name != "gradstore.__main__":
            found.setdefault(room(name), set()).update(room(other) for other in wanted)
    return {name: wanted - {name} for name, wanted in found.items()}


def circle(edges: Graph) -> list[str]:
    """One circle of imports, or nothing."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The tree's nodes, without those under `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from _nodes(child)


def main() -> None:
    """Prints the rooms, lowest first, with what they import, and the circles."""
    edges = graph(files())
    between = rooms(edges)
    counted = Counter(room(name) for name in edges)
    for name in TopologicalSorter(between).static_order():
        print(f"{name} ({counted[name]} files): {', '.join(sorted(between.get(name, ())))}")
    print(f"{len(edges)} files, circle of files: {circle(edges) or 'none'}, of rooms: {circle(between) or 'none'}")


if __name__ == "__main__":
    main()
