"""FLOPs and memory traffic of one pass over rollouts, for each way of running a model.

Per token, with frozen weights, a layer I -> O takes 2 I O FLOPs forward and as many for its input gradient; a weight
gradient takes 2 I O more. A sketch adds 2 R (I + O + R), two sides and their product (engine/sketches/sketcher.py).
Attention takes 4 W FLOPs forward for each key that a token sees, W being heads times their width, and 2.5 times that
backward. All other operations (norms, activations, softmax) are bound by memory. They count as bytes read and written,
in proportion to the bytes that autograd keeps and to the logits.

Dimension letters: R width of a side, O and I a layer's outputs and inputs.
"""

from dataclasses import dataclass, replace

from gradstore.engine.gradients.budget import MOST_SAMPLED
from gradstore.engine.planning.devices import Hardware
from gradstore.engine.planning.shapes import ModelShape

_BACKWARD_ATTENTION = 2.5
"""FLOPs of attention's backward relative to its forward: the scores are computed again."""
_FORWARD_TRAFFIC, _BACKWARD_TRAFFIC = 2.0, 3.0
"""Times that the activations kept by autograd go through memory, forward and backward."""
_LOGIT_FORWARD, _LOGIT_BACKWARD = 5.0, 3.0
"""Times that a token's float32 logits go through memory, forward and backward."""
_SHARING_PAYS = 0.85
"""Prompts are shared if this leaves less than this share of the tokens (engine/gradients/microbatch.py)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Size of a set of rollouts that go through a model."""

    n_problems: int
    n_rollouts: int
    n_prompt: int
    """Tokens of a prompt."""
    n_response: int
    """Tokens of a response."""

    @property
    def response_tokens(self) -> int:
        """Tokens of all responses."""
        return self.n_problems * self.n_rollouts * self.n_response

    @property
    def all_tokens(self) -> int:
        """Tokens of all prompts and responses; a prompt counts once per rollout."""
        return self.n_problems * self.n_rollouts * (self.n_prompt + self.n_response)

    def body_tokens(self, *, sharing: bool = True) -> int:
        """Tokens that go through the transformer; prompts are run once if that saves enough."""
        shared = self.response_tokens + self.n_problems * self.n_prompt
        return shared if sharing and shared < _SHARING_PAYS * self.all_tokens else self.all_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """Cost of one pass, independent of the device."""

    flops: float
    """FLOPs in the weights' dtype."""
    projection_flops: float
    """FLOPs in float32."""
    traffic: float
    """Bytes read and written outside matrix products."""

    def times(self, factor: float) -> "Work":
        """Cost of `factor` such passes."""
        return Work(factor * self.flops, factor * self.projection_flops, factor * self.traffic)

    def plus(self, other: "Work") -> "Work":
        """Cost of both passes."""
        return Work(
            self.flops + other.flops, self.projection_flops + other.projection_flops, self.traffic + other.traffic
        )

    def seconds(self, device: Hardware, n_devices: int = 1) -> float:
        """Seconds on n_devices that share the problems."""
        arithmetic = self.flops / device.flops + self.projection_flops / device.flops_float32
        moved = self.traffic / (device.bandwidth * device.bandwidth_used)
        return (arithmetic / device.utilisation + moved) / n_devices


def forward(shape: ModelShape, load: Workload, *, sharing: bool = True, head_everywhere: bool = False) -> Work:
    """Cost of a forward. head_everywhere: the output layer also runs on the prompts."""
    n_body = load.body_tokens(sharing=sharing)
    n_head = n_body if head_everywhere else load.response_tokens
    flops = 2.0 * (shape.body_weights * n_body + shape.head_weights * n_head) + _attention(shape, load, sharing)
    logits = 4.0 * shape.vocabulary * load.response_tokens
    return Work(flops, 0.0, _FORWARD_TRAFFIC * shape.kept_bytes * n_body + _LOGIT_FORWARD * logits)


def input_gradients(shape: ModelShape, load: Workload, *, sharing: bool = True) -> Work:
    """Cost of a forward, and of a backward with input gradients but no weight gradients."""
    run = forward(shape, load, sharing=sharing)
    n_body = load.body_tokens(sharing=sharing)
    flops = 2.0 * (shape.body_weights * n_body + shape.head_weights * load.response_tokens)
    flops += _BACKWARD_ATTENTION * _attention(shape, load, sharing)
    logits = 4.0 * shape.vocabulary * load.response_tokens
    traffic = _BACKWARD_TRAFFIC * shape.kept_bytes * n_body + _LOGIT_BACKWARD * logits
    return run.plus(Work(flops, 0.0, traffic))


def sketch(shape: ModelShape, load: Workload, rank: int, *, sharing: bool = True) -> Work:
    """Cost of a sketch with sides of width `rank`."""
    return input_gradients(shape, load, sharing=sharing).plus(_projected(shape, load, rank, rank, sharing))


def one_sided(shape: ModelShape, load: Workload, rank: int, *, sharing: bool = True) -> Work:
    """Cost of a pass of the fit: projection to sides of twice the rank, and its product with the full-width vectors."""
    return input_gradients(shape, load, sharing=sharing).plus(_projected(shape, load, 4 * rank, 0, sharing))


def weight_gradients(shape: ModelShape, load: Workload, *, sharing: bool = True, head_everywhere: bool = False) -> Work:
    """Cost of a forward and a backward with the weight gradient of every layer: 6 I O in total."""
    run = input_gradients(shape, load, sharing=sharing)
    n_body = load.body_tokens(sharing=sharing)
    n_head = n_body if head_everywhere else load.response_tokens
    more = 2.0 * (shape.body_weights * n_body + shape.head_weights * n_head)
    more += 4.0 * shape.head_weights * (n_head - load.response_tokens)
    return run.plus(Work(more, 0.0, 0.0))


def sampled(shape: ModelShape, load: Workload, at_once: int = MOST_SAMPLED) -> Work:
    """Cost of sampling: for every token, each batch reads the weights, and each sequence its own keys and values.

    at_once: tokens whose keys and values are in memory together.
    """
    run = forward(shape, replace(load, n_response=1))
    tokens = float(load.response_tokens)
    sequences = max(1, at_once // (load.n_prompt + load.n_response))
    weights = shape.weight_bytes * tokens / min(sequences, load.n_problems * load.n_rollouts)
    cached = shape.key_value_bytes * tokens * (load.n_prompt + load.n_response / 2)
    flops = 2.0 * (shape.body_weights + shape.head_weights) * tokens
    return run.plus(Work(flops, 0.0, weights + cached + _LOGIT_FORWARD * 4.0 * shape.vocabulary * tokens))


def _attention(shape: ModelShape, load: Workload, sharing: bool) -> float:
    """FLOPs of attention's forward; on average a response token sees the whole prompt and half of the response."""
    response = load.response_tokens * (load.n_prompt + load.n_response / 2)
    n_prompts = load.body_tokens(sharing=sharing) - load.response_tokens
    return 4.0 * shape.n_blocks * shape.attention_width * (response + n_prompts * load.n_prompt / 2)


def _projected(shape: ModelShape, load: Workload, rank: int, core: int, sharing: bool) -> Work:
    """Cost of projecting to both sides of every layer, plus a `core` x `rank` product per token. The output layer sees
    responses only."""
    flops = 0.0
    for layer in shape.layers:
        n_tokens = load.response_tokens if layer.n_outputs == shape.vocabulary else load.body_tokens(sharing=sharing)
        flops += 2.0 * rank * (layer.n_inputs + layer.n_outputs + core) * layer.uses * n_tokens
    return Work(0.0, flops, 0.0)
