"""An event loop in a thread of its own, for requests that any thread waits for, with or without a loop of its own."""

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class OwnLoop:
    """Runs coroutines in its thread. `close` ends it; it ends with the object too.

    process: the process whose loop it is; after a fork the child has no such thread and needs a loop of its own.
    """

    def __init__(self, name: str, at_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """name: the thread's. at_end: what closes what the coroutines use; run in the loop when it is closed."""
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _stop, self._loop, thread, at_end, self.process)

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin the work; its result comes later."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result; it is cancelled if the caller is interrupted."""
        future = self.begin(work)
        try:
            return future.result()
        finally:
            future.cancel()

    async def awaited(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result, awaited in the caller's loop; it is cancelled with the caller."""
        return await asyncio.wrap_future(self.begin(work))


async def all_done(work: Iterable[Callable[[], Coroutine[Any, Any, None]]], most: int) -> None:
    """Run pieces of work, `most` at a time; the first failure cancels the others and is raised."""
    pieces = iter(work)

    async def run() -> None:
        for piece in pieces:
            await piece()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(most):
                group.create_task(run())
        return
    except ExceptionGroup as failures:
        failure = failures.exceptions[0]
    raise failure


def _stop(
    loop: asyncio.AbstractEventLoop, thread: threading.Thread, at_end: Callable[[], Coroutine], process: int
) -> None:
    """End a loop; nothing in a forked process, whose connections are its parent's."""
    if process != os.getpid():
        return
    closing = asyncio.run_coroutine_threadsafe(at_end(), loop)
    closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    if thread is not threading.current_thread():  # the last reference may end in the loop itself
        thread.join(timeout=5)
    if not thread.is_alive():
        loop.close()
