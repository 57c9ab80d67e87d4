"""Arrays read by other libraries, which know only the Zarr format."""

from pathlib import Path

import numpy as np


def by_zarr(path: Path) -> np.ndarray:
    import zarr

    return zarr.open_array(path, mode="r")[...]


def by_tensorstore(path: Path) -> np.ndarray:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, open=True, read=True).result().read().result()
