"""CRC-32C of large arrays in several threads at once.

google_crc32c holds the interpreter's lock while it works on anything but `bytes`, so the threads of a scan would check
their chunks one after the other. Its wheels bring the C library that it wraps (github.com/google/crc32c); a call of it
through ctypes releases the lock. Where the library is not found, the result is the same and only takes longer.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import google_crc32c
import numpy as np

from gradstore.durable import crc32c


def crc32c_of(array: np.ndarray) -> int:
    """CRC-32C of a contiguous array's bytes; other threads run meanwhile."""
    extend = _library_call()
    if extend is None or not array.flags.c_contiguous:
        return crc32c(array)
    return extend(0, array.ctypes.data, array.nbytes)


@cache
def _library_call() -> Callable[[int, int, int], int] | None:
    """`crc32c_extend(start, address, bytes)` of the C library; None if there is none beside google_crc32c."""
    beside = Path(google_crc32c.__file__).parent.with_name("google_crc32c.libs")
    for path in sorted(beside.glob("libcrc32c*.so*")):
        try:
            extend = ctypes.CDLL(str(path)).crc32c_extend
        except (OSError, AttributeError):
            continue
        extend.argtypes, extend.restype = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint32
        if extend(0, b"123456789", 9) == 0xE3069283:  # The check value of CRC-32C.
            return extend
    return None
