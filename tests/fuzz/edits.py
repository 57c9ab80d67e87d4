"""Edits of honest data: values that readers stumble over, changes of JSON, of bytes and of files.

An edit is a dict of JSON values, so a case of edits can be kept in a file:

    {"op": "set", "at": [...], "value": V}      a value within a JSON document; {"op": "drop", ...}: without it;
                                                {"op": "double", ...}: an item of a list twice
    {"op": "text", "old": S, "new": S}          a piece of text
    {"op": "splice", "start": I, "stop": J, "data": B}, {"op": "flip", "byte": I, "bit": K}, {"op": "size", "size": N}
    {"op": "link", "to": PATH}, {"op": "fifo"}, {"op": "folder"}, {"op": "remove"}, {"op": "swap", "with": FILE}

Each names its "file". B: text, {"base64": ...} or {"repeat": text, "times": n}. "{outside}" in any text stands for the
folder of canaries.
"""

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

Edit = dict[str, Any]

NAMES = (
    "../outside/canary", "../../outside/canary", "../../../outside/canary", "../../../../outside/canary",
    "../../../../../outside/canary", "{outside}/canary", "{outside}/new", "{outside}", "..", ".", "/", "", "a/b",
    "a\x00b",
    "LOCK", "index.json", "manifest.json", "con\x1b[31mtrol", "\ud800", "x" * 300, "part-000000.parquet", ".tmp-x",
    "~", "-",
)  # fmt: skip
"""File names in a place where another one belongs."""
NUMBERS = (-1, 0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, 10**30,
    -(2**63), 0.5,
           -0.0, 1e308, float("nan"), float("inf"), float("-inf"), 1e-320)  # fmt: skip
OTHERS = (
    None,
    True,
    False,
    "",
    "0",
    "1",
    "nan",
    [],
    {},
    [None],
    [[]],
    {"a": 1},
    [1, 2, 3],
    "x" * 5000,
    "\u202e",
    "\x1b[2J",
)

_LARGEST = 1 << 24
"""Bytes of a file above which it is a sparse one that an edit made; no other edit reads it."""


def nasty(random: Random) -> Any:
    """A value that does not belong where it is put."""
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 7:
        return random.choice(NAMES)
    if kind < 9:
        return random.choice(OTHERS)
    return nested(random.choice((3, 50, 5000)), random.choice(("list", "dict")))


def nested(depth: int, kind: str) -> Any:
    """A value of many levels, written as an edit's marker: JSON's own writer would not take it."""
    return {"nested": depth, "kind": kind}


def places(value: Any, before: tuple = ()) -> Iterator[tuple]:
    """The path of every value within a JSON value, without the whole."""
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield (*before, key)
        yield from places(item, (*before, key))


def at(value: Any, path: Sequence) -> Any:
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


def json_edit(random: Random, file: str, value: Any) -> Edit:
    """An edit of a JSON document somewhere within it."""
    path = random.choice(list(places(value)) or [()])
    here = at(value, path)
    kind = random.randrange(10)
    if kind == 0 and path:
        return {"op": "drop", "file": file, "at": list(path)}
    if kind == 1 and path and isinstance(at(value, path[:-1]), list):
        return {"op": "double", "file": file, "at": list(path)}
    if kind <= 3 and isinstance(here, int) and not isinstance(here, bool):
        return {
            "op": "set",
            "file": file,
            "at": list(path),
            "value": here + random.choice((-1, 1, 7, -here - 1, 10**6)),
        }
    if kind <= 3 and isinstance(here, str):
        new = random.choice((here[:-1], here + "0", here.upper(), f"../{here}", f"{here}/../{here}", f" {here}"))
        return {"op": "set", "file": file, "at": list(path), "value": new}
    if kind == 4:
        other = at(value, random.choice(list(places(value))))
        return {"op": "set", "file": file, "at": list(path), "value": other}
    return {"op": "set", "file": file, "at": list(path), "value": nasty(random)}


def text_edit(random: Random, file: str, data: bytes) -> Edit:
    """An edit of a JSON document's text."""
    kind = random.randrange(6)
    size = len(data)
    if kind == 0:
        new = random.choice(
            ("\ufeff", "[" * 100_000, '{"a":' * 100_000, "NaN", "9" * 5000, "\x00", "{}", "[]", "null", '"')
        )
        return {"op": "splice", "file": file, "start": 0, "stop": random.choice((0, size)), "data": new}
    if kind == 1:
        return {"op": "size", "file": file, "size": random.randrange(size + 1)}
    if kind == 2:
        return {
            "op": "splice",
            "file": file,
            "start": size,
            "stop": size,
            "data": random.choice(("\n\n", "x", "{}", "\x00")),
        }
    return bytes_edit(random, file, data)


def bytes_edit(random: Random, file: str, data: bytes) -> Edit:
    """An edit of a file's bytes."""
    size = len(data)
    kind = random.randrange(7)
    if kind <= 1 and size:
        return {"op": "flip", "file": file, "byte": random.randrange(size), "bit": random.randrange(8)}
    if kind == 2:
        return {
            "op": "size",
            "file": file,
            "size": random.choice((0, 1, size // 2, max(0, size - 1), size + 1, size * 3)),
        }
    if kind == 3:
        return {"op": "size", "file": file, "size": random.choice((1 << 31, 1 << 33, 1 << 40))}
    start = random.randrange(min(size, 256) if random.random() < 0.7 and size else size + 1)
    stop = min(size, start + random.choice((1, 2, 4, 8, 64)))
    if kind == 4:
        return {
            "op": "splice",
            "file": file,
            "start": start,
            "stop": stop,
            "data": {"repeat": random.choice("\x00\x01~"), "times": stop - start},
        }
    if kind == 5:
        word = random.choice(NUMBERS[:18])
        raw = int(word).to_bytes(16, "little", signed=word < 0)[: random.choice((1, 2, 4, 8))]
        return {
            "op": "splice",
            "file": file,
            "start": start,
            "stop": start + len(raw),
            "data": {"base64": base64.b64encode(raw).decode()},
        }
    raw = random.randbytes(stop - start)
    return {
        "op": "splice",
        "file": file,
        "start": start,
        "stop": stop,
        "data": {"base64": base64.b64encode(raw).decode()},
    }


def file_edit(random: Random, file: str, files: Sequence[str]) -> Edit:
    """An edit of what a file is."""
    kind = random.randrange(8)
    if kind <= 2:
        to = random.choice(
            (
                "{outside}/canary",
                "{outside}/folder",
                "{outside}",
                "{outside}/new",
                "/dev/zero",
                ".",
                file.rpartition("/")[2],
            )
        )
        return {"op": "link", "file": file, "to": to}
    if kind == 3:
        return {"op": "fifo", "file": file}
    if kind == 4:
        return {"op": "folder", "file": file}
    if kind == 5:
        return {"op": "swap", "file": file, "with": random.choice(files)}
    return {"op": "remove", "file": file}


def payload(data: Any) -> bytes:
    """The bytes that a case gives: text, {"base64": ...} or {"repeat": text, "times": n}."""
    if isinstance(data, str):
        return data.encode("utf-8", "surrogatepass")
    if "base64" in data:
        return base64.b64decode(data["base64"])
    return payload(data["repeat"]) * data["times"]


def dumped(value: Any) -> bytes:
    """JSON text of a value with edits' markers in it."""
    deep: list[str] = []

    def marked(item: Any) -> Any:
        if isinstance(item, dict) and item.keys() == {"nested", "kind"} and isinstance(item["nested"], int):
            depth = min(item["nested"], 1 << 20)
            deep.append("[" * depth + "]" * depth if item["kind"] == "list" else '{"a":' * depth + "1" + "}" * depth)
            return f"\ue000{len(deep) - 1}\ue001"
        if isinstance(item, dict):
            return {key: marked(one) for key, one in item.items()}
        return [marked(one) for one in item] if isinstance(item, list) else item

    text = json.dumps(marked(value), sort_keys=True, separators=(",", ":"))
    for number, inner in enumerate(deep):
        text = text.replace(json.dumps(f"\ue000{number}\ue001"), inner)
    return text.encode()


def apply(edits: Sequence[Edit], root: Path, outside: Path, sealed: Callable[[Path, bytes], bytes]) -> None:
    """Make edits of the files below a folder.

    sealed(path, text): the text of a JSON document with its checksum made right, or as it is.
    """
    for edit in edits:
        edit = json.loads(json.dumps(edit).replace("{outside}", json.dumps(str(outside))[1:-1]))
        path = root / edit["file"]
        try:
            _apply(edit, root, path, sealed)
        except (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):
            continue  # an earlier edit of the case took what this one needs


def _apply(edit: Edit, root: Path, path: Path, sealed: Callable[[Path, bytes], bytes]) -> None:
    op = edit["op"]
    inside = [
        path.parent if op in ("link", "fifo", "folder", "remove", "write") else path,
        root / edit.get("with", "."),
    ]
    if any(one.resolve() != one.absolute() for one in inside) or not (path.is_file() or inside[0] != path):
        return  # the edit itself must not go through a link that an earlier one made
    if path.is_file() and path.stat().st_size > _LARGEST:
        return
    if op == "swap" and not (path.is_file() and (root / edit["with"]).is_file()):
        return  # reading a pipe would wait for its other end
    if op in ("set", "drop", "double"):
        _edit_json(edit, path, sealed)
    elif op == "flip":
        data = bytearray(path.read_bytes())
        data[edit["byte"]] ^= 1 << edit["bit"]
        path.write_bytes(data)
    elif op == "splice":
        data = bytearray(path.read_bytes())
        data[edit["start"] : edit["stop"]] = payload(edit["data"])
        path.write_bytes(data)
    elif op == "size":
        os.truncate(path, edit["size"])
    elif op == "swap":
        one, other = path.read_bytes(), (root / edit["with"]).read_bytes()
        path.write_bytes(other)
        (root / edit["with"]).write_bytes(one)
    else:
        _remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if op == "link":
            path.symlink_to(edit["to"])
        elif op == "fifo":
            os.mkfifo(path)
        elif op == "folder":
            path.mkdir()
        elif op == "write":
            path.write_bytes(payload(edit["data"]))


def _edit_json(edit: Edit, path: Path, sealed: Callable[[Path, bytes], bytes]) -> None:
    value = json.loads(path.read_bytes())
    *before, last = edit["at"]
    holder = at(value, before)
    if edit["op"] == "set":
        holder[last] = edit["value"]
    elif edit["op"] == "drop":
        del holder[last]
    else:
        holder.insert(last, holder[last])
    path.write_bytes(sealed(path, dumped(value)))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
