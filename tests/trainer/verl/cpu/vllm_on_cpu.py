"""vLLM on the processor as verl's rollout engine: its weights stay loadable.

Named as vLLM's worker extension (engine_kwargs.vllm.worker_extension_cls), so that vLLM's worker imports it before the
model is built. vLLM packs the weights of linear layers for the processor and drops the originals; weights loaded later
would go nowhere. And verl hands weights over in a buffer that it fills again, of which a model on the processor would
keep views.
"""

from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.utils
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

_receive = bucketed_weight_transfer.BucketedWeightReceiver.receive_weights


def _receive_copies(self: Any, on_bucket_received: Callable) -> Any:
    def on_copies(weights: Any, *more: Any) -> Any:
        return on_bucket_received([(name, tensor.clone()) for name, tensor in weights], *more)

    return _receive(self, on_copies)


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


bucketed_weight_transfer.BucketedWeightReceiver.receive_weights = _receive_copies
vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm = _plain_linear


class CpuExtension(vLLMColocateWorkerExtension):
    """verl's own; importing this module is what matters."""
