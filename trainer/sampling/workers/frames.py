"""Messages between processes: four bytes of length, then JSON. Nothing that a message says can run code."""

import json
import os
import struct
from collections.abc import Iterator
from typing import Any

LENGTH = struct.Struct(">I")
MOST = 1 << 30
"""Longest message in bytes."""


class BrokenFrameError(Exception):
    """The other side sent something that is no message."""


def encoded(message: Any) -> bytes:
    """The message as bytes of a frame. Half surrogate pairs survive, because JSON escapes them."""
    body = json.dumps(message, separators=(",", ":"), default=_plain).encode("ascii")
    return LENGTH.pack(len(body)) + body


def _plain(value: Any) -> Any:
    """Arrays and scalars of numpy, which data frames put into records, as lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is nothing that JSON can hold")


def write(fd: int, message: Any) -> None:
    """Write a whole frame to a blocking descriptor."""
    rest = memoryview(encoded(message))
    while rest:
        rest = rest[os.write(fd, rest) :]


def read(fd: int) -> Any:
    """Read a whole frame from a blocking descriptor; None where the other side has closed it."""
    inbox = Inbox()
    while True:
        data = os.read(fd, inbox.missing)
        if not data:
            return None
        for message in inbox.take(data):
            return message


class Inbox:
    """Collects the bytes of one sender, and gives its messages as they become complete."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._bytes = bytearray()

    @property
    def missing(self) -> int:
        """Number of bytes that the current message still lacks, as far as it is known."""
        if len(self._bytes) < LENGTH.size:
            return LENGTH.size - len(self._bytes)
        return min(1 << 20, LENGTH.size + LENGTH.unpack_from(self._bytes)[0] - len(self._bytes))

    def take(self, data: bytes) -> Iterator[Any]:
        """Add bytes, and give the messages that are complete now; BrokenFrameError after those before a broken one."""
        self._bytes += data
        while len(self._bytes) >= LENGTH.size:
            length = LENGTH.unpack_from(self._bytes)[0]
            if length > self._most:
                raise BrokenFrameError(f"a message of {length} bytes, at most {self._most} expected")
            if len(self._bytes) < LENGTH.size + length:
                break
            body = bytes(self._bytes[LENGTH.size : LENGTH.size + length])
            del self._bytes[: LENGTH.size + length]
            try:
                message = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise BrokenFrameError(f"a message that is not JSON: {error}") from None
            yield message
