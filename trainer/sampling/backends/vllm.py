"""Sampling with vLLM, for GPUs: same interface and conventions as the transformers back end.

Install vLLM with `gradstore[gpu]`. The same call returns the same responses only on the same machine: vLLM's batches
depend on memory and on its version.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.engine.gradients.models import load_tokenizer
from gradstore.errors import RequestError
from gradstore.trainer.sampling.backends import Response, derived_seed, end_tokens

BLOCKS, BLOCK_BYTES = 64, 4096


class VllmBackend:
    """Samples from a model that vLLM has loaded."""

    def __init__(self, engine: Any, tokenizer: Any, settings: dict[str, Any], end_ids: list[int]) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.context: int | None = engine.llm_engine.model_config.max_model_len
        self._settings, self._end_ids = settings, end_ids

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        trust_remote_code: bool = False,
        **engine_options: Any,
    ) -> "VllmBackend":
        """max_model_len: maximum tokens per sequence; a value below the model's own limit saves memory.

        trust_remote_code: run Python code that the model's folder brings.

        engine_options: further arguments of `vllm.LLM` (tensor_parallel_size, gpu_memory_utilization, ...).
        """
        if importlib.util.find_spec("vllm") is None:
            raise RequestError(
                "the vllm back end needs vLLM, which is not installed: pip install 'gradstore[gpu]', "
                "or use the transformers back end"
            )
        import vllm

        settings = {"backend": "vllm", "model": str(model), "weights": folder_digest(Path(model)), "dtype": dtype}
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        try:
            engine = vllm.LLM(
                model=str(model),
                dtype=dtype,
                max_model_len=max_model_len,
                trust_remote_code=trust_remote_code,
                generation_config="vllm",  # not the model's own sampling defaults, which change the distribution
                logprobs_mode="raw_logprobs",  # at temperature 1, before top-p
                disable_log_stats=True,
                **engine_options,
            )
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:400]
            raise RequestError(f"{model}: vLLM refuses these settings: {reason}") from None
        end_ids = end_tokens(generation_config(model), tokenizer)
        return cls(engine, tokenizer, settings | {"engine_options": engine_options}, end_ids)

    def settings(self) -> dict[str, Any]:
        return self._settings

    def generate(
        self, prompts: list[list[int]], n: int, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[list[Response]]:
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                n=n,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_new_tokens,
                seed=derived_seed(seed, number),
                stop_token_ids=self._end_ids,
                logprobs=0,  # only the sampled token's
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        outputs = self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [[self._response(completion) for completion in output.outputs] for output in outputs]

    def _response(self, completion: Any) -> Response:
        ids = list(completion.token_ids)
        logprobs = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
        stopped = bool(ids) and ids[-1] in self._end_ids
        return Response(
            np.asarray(ids, dtype=np.int64), np.asarray(logprobs, dtype=np.float32), "stop" if stopped else "length"
        )


def generation_config(model: str | Path) -> Any:
    """A model's generation config; None if it has none."""
    import transformers

    try:
        return transformers.GenerationConfig.from_pretrained(model)
    except OSError:
        return None  # the file is optional


def folder_digest(folder: Path) -> str:
    """Digest of a model folder's weight files, 16 hexadecimal digits: names, sizes, 64 evenly spaced blocks per file.

    "" if the model is not a local folder; then only its hub id identifies it.
    """
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("config.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(BLOCKS):
                file.seek(max(size - BLOCK_BYTES, 0) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]
