"""The store of policy-gradient sketches: versioned, append-only, crash-safe, plain Zarr v3.

    store = gradstore.create("pool.gs", dim=4096, fingerprint={...})
    store.add_problems("pool", gradstore.read_problems("pool.jsonl"))
    with store.writer("pool", step=0) as writer:
        writer.append(ids, sketches)
    view = store.view("pool", at=0)

The engine's public names are here too: `gradstore.collect`, `gradstore.search`, `gradstore.select` and so on. All names
are listed in `__init__.pyi` and load on first use, so that `import gradstore` costs nothing and never imports torch,
zarr or pyarrow. docs/format.md describes the files.
"""

from gradstore import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
