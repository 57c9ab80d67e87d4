"""Calls that every process of a run makes together, led by the first.

Process 0 has the store and decides. Whenever it needs the policy, it names a method and its arguments, and every
process calls that method of its own part of the policy. A failure on any process fails the call on the first one, so
that no process is left waiting. One process alone calls directly.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from gradstore.errors import GradstoreError, RequestError

T = TypeVar("T")

_CALL, _DONE, _FAILED = "call", "done", "failed"


class Lockstep:
    """The processes of a run, each with its own part of the policy."""

    def __init__(self, part: Any, rank: int, world: int) -> None:
        """part: the object whose methods are called."""
        self._part, self.rank, self.world = part, rank, world

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method on every process; the results in the order of the ranks. On process 0, inside `lead`.

        RequestError or GradstoreError if the call failed anywhere.
        """
        if self.world > 1:
            _send((_CALL, (method, arguments)))
        return self._run(method, arguments)

    def lead(self, work: Callable[[], T]) -> T:
        """Run `work` on process 0 while the others answer its calls; returns its result on every process.

        GradstoreError on the others if it failed.
        """
        if self.world == 1:
            return work()
        if self.rank:
            return self._follow()
        try:
            result = work()
        except BaseException as error:
            _send((_FAILED, str(error)))
            raise
        _send((_DONE, result))
        return result

    def _follow(self) -> Any:
        while True:
            kind, value = _send(None)
            if kind == _DONE:
                return value
            if kind == _FAILED:
                raise GradstoreError(f"the round failed on process 0: {value}")
            method, arguments = value
            try:
                self._run(method, arguments)
            except GradstoreError:
                continue  # process 0 has the same error, and ends the round

    def _run(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        if self.world == 1:
            return [getattr(self._part, method)(*arguments)]
        found, error = None, None
        try:
            found = getattr(self._part, method)(*arguments)
        except Exception as raised:  # noqa: BLE001 (whatever it is, the other processes must hear of it)
            error = raised
        told = gather_object([(found, None if error is None else (isinstance(error, RequestError), str(error)))])
        for rank, (_, failure) in enumerate(told):
            if failure is not None:
                kind = RequestError if failure[0] else GradstoreError
                raise kind(failure[1] if failure[0] else f"process {rank}: {failure[1]}") from error
        return [result for result, _ in told]


def _send(message: Any) -> Any:
    """Process 0's message, on every process."""
    box = [message]
    broadcast_object_list(box, from_process=0)
    return box[0]
