"""A rollout engine for verl made of transformers alone, for machines without vLLM.

verl imports it through actor_rollout_ref.model.external_lib, and uses it as rollout.name=transformers. One Ray actor
holds the model and answers requests one after another, so that a response depends on the weights, the prompt and the
request's seed and on nothing else that is being generated.
"""

from collections.abc import AsyncIterator, Iterable
from typing import Any

import ray
import torch
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "transformers"


class TransformersServer:
    """The Ray actor that generates."""

    def __init__(self, path: str, response_length: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._response_length = response_length
        self._step: int | None = None

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **unused: Any
    ) -> TokenOutput:
        """One response, with the log-probability of each token at the request's temperature."""
        temperature = float(sampling_params.get("temperature", 1.0))
        random = torch.Generator()
        if sampling_params.get("seed") is None:
            random.seed()
        else:
            random.manual_seed(int(sampling_params["seed"]))
        longest = min(self._response_length, int(sampling_params.get("max_tokens") or self._response_length))
        tokens, logprobs, finished = self._sample(list(prompt_ids), temperature, random, longest)
        return TokenOutput(
            token_ids=tokens,
            log_probs=logprobs,
            stop_reason="completed" if finished else "length",
            extra_fields={"global_steps": self._step},
        )

    @torch.no_grad()
    def _sample(
        self, prompt_ids: list[int], temperature: float, random: torch.Generator, longest: int
    ) -> tuple[list[int], list[float], bool]:
        end = self._model.config.eos_token_id
        given, cache = torch.tensor([prompt_ids]), None
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < longest:
            out = self._model(input_ids=given, past_key_values=cache, use_cache=True)
            logprobs_V = (out.logits[0, -1] / (temperature or 1.0)).log_softmax(-1)
            if temperature:
                token = int(torch.multinomial(logprobs_V.double().exp(), 1, generator=random))
            else:
                token = int(logprobs_V.argmax())
            tokens.append(token)
            logprobs.append(float(logprobs_V[token]))
            if token == end:
                return tokens, logprobs, True
            given, cache = torch.tensor([[token]]), out.past_key_values
        return tokens, logprobs, False

    async def load(self, weights: dict[str, torch.Tensor], step: int | None) -> None:
        """Take over the trainer's weights; an unknown name raises."""
        result = self._model.load_state_dict(weights, strict=False)
        if result.unexpected_keys:
            raise ValueError(f"weights of another model: {result.unexpected_keys}")
        self._model.tie_weights()
        self._step = step

    async def ready(self, *args: Any, **options: Any) -> None:
        """There is nothing to wake, to put to sleep or to clear."""

    wake_up = sleep = abort_all_requests = resume_generation = ready
    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = ready


class TransformersReplica(RolloutReplica):
    """Starts the server in place of a vLLM or SGLang one."""

    async def launch_servers(self) -> None:
        path = getattr(self.model_config, "local_path", None) or self.model_config.path
        # A model without training ends no turn: a quarter of the response each leaves room for the tool's answer.
        longest = self.config.response_length // (4 if self.config.multi_turn.enable else 1)
        server = (
            ray.remote(TransformersServer)
            .options(name=_server_name(self.replica_rank), max_concurrency=1000)
            .remote(path, longest)
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle, self._server_address = server, f"127.0.0.1:{self.replica_rank}"


class TransformersAdapter(BaseRollout):
    """The trainer's side: hands every replica the actor's weights."""

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", global_steps: int | None = None, **unused: Any
    ) -> None:
        copied = {name: tensor.detach().cpu().clone() async for name, tensor in _each(weights)}
        if torch.distributed.get_rank() == 0:
            for replica in range(torch.distributed.get_world_size()):
                try:
                    server = ray.get_actor(_server_name(replica))
                except ValueError:
                    break
                await server.load.remote(copied, global_steps)


async def _each(weights: Iterable | AsyncIterator) -> AsyncIterator[tuple[str, torch.Tensor]]:
    if hasattr(weights, "__aiter__"):
        async for item in weights:
            yield item
    else:
        for item in weights:
            yield item


def _server_name(replica: int) -> str:
    return f"transformers_server_{replica}"


_ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.TransformersAdapter"
RolloutReplicaRegistry.register(NAME, lambda: TransformersReplica)
