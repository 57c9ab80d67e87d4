"""A sampling back end of many workers over Ray, each with a replica of the policy: for `rollout`.

The workers sample. Rewards are computed in the driver while they do: limits, credentials and caches of rewards stay in
one place, and a reward function need not be installed elsewhere.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gradstore.engine.cluster.pool import Cost, Pool, Window
from gradstore.engine.gradients.models import load_tokenizer
from gradstore.trainer.sampling.backends import Backend, Call, Response, load_backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """How a worker loads its back end; plain values, to be sent."""

    backend: str
    model: str | Path
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> "_Sampling":
        return _Sampling(load_backend(self.backend, self.model, **self.options))


class OnWorkers:
    """A `Backend` whose calls are spread over workers, several at once; as a context manager it ends them.

    All workers must have the same settings (weights, dtype, tokens sampled at once): the last bits of a response's
    log-probabilities depend on its batch.
    """

    def __init__(self, replica: Replica, *, workers: int, cpus: int = 1, gpus: int = 0) -> None:
        """The sizes are those of `Pool`."""
        trusted = bool(replica.options.get("trust_remote_code"))
        self.tokenizer = load_tokenizer(replica.model, trust_remote_code=trusted)
        self._pool = Pool(replica, workers=workers, cpus=cpus, gpus=gpus)
        self._settings, self.context = self._pool.about()

    def __enter__(self) -> "OnWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    @property
    def costs(self) -> list[Cost]:
        """What each worker has done."""
        return self._pool.costs

    def settings(self) -> dict[str, Any]:
        """Those of one worker's back end: the responses are the same."""
        return dict(self._settings)

    def generate(
        self, prompts: list[list[int]], n: int, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[list[Response]]:
        """As `Backend.generate`, on one worker."""
        call = Call(
            prompts=prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        (responses,) = self.generate_each([call])
        return responses

    def generate_each(self, calls: Iterable[Call]) -> Iterator[list[list[Response]]]:
        """As `ManyAtOnce.generate_each`."""
        return self._pool.map(Window((replace(call, name=""),), len(call.prompts), call.name) for call in calls)


class _Sampling:
    """The function of a worker."""

    def __init__(self, backend: Backend) -> None:
        self.about = (backend.settings(), backend.context)
        self._backend = backend

    def __call__(self, call: Call) -> list[list[Response]]:
        return call.of(self._backend)
