"""FLOPs, traffic and memory of one pass over rollouts, for each way of running a model.

Per token, with frozen weights, a layer I -> O takes 2 I O FLOPs forward and as many for its input gradient; a weight
gradient takes 2 I O more. A sketch adds 2 R (I + O + R), two sides and their product (engine/sketches/sketcher.py).
Attention takes 4 W FLOPs forward for each key that a token sees, W being heads times their width, and 2.5 times that
backward. What is no matrix product (norms, activations, softmax) is bound by memory: it is counted as bytes that are
read and written, in proportion to what autograd keeps and to the logits.

Dimension letters: R width of a side, O and I a layer's outputs and inputs.
"""

from dataclasses import dataclass, replace

from gradstore.engine.gradients.budget import MOST_SAMPLED
from gradstore.engine.planning.devices import Hardware
from gradstore.engine.planning.shapes import ModelShape

_BACKWARD_ATTENTION = 2.5
"""Products of attention's backward for each of its forward: scores are computed again."""
_FORWARD_TRAFFIC, _BACKWARD_TRAFFIC = 2.0, 3.0
"""Times that what autograd keeps of a token goes through memory, forward and backward."""
_LOGIT_FORWARD, _LOGIT_BACKWARD = 5.0, 3.0
"""Times that a token's float32 logits go through memory."""
_SHARING_PAYS = 0.85
"""Share of the tokens below which prompts are run once for all their rollouts (engine/gradients/microbatch.py)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Rollouts that go through a model."""

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
        """Tokens of all prompts and responses, each prompt as often as it has rollouts."""
        return self.n_problems * self.n_rollouts * (self.n_prompt + self.n_response)

    def body_tokens(self, *, sharing: bool = True) -> int:
        """Tokens that go through the transformer, prompts run once where that spares enough."""
        shared = self.response_tokens + self.n_problems * self.n_prompt
        return shared if sharing and shared < _SHARING_PAYS * self.all_tokens else self.all_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """What one pass takes, whatever the device."""

    flops: float
    """In the weights' dtype."""
    projection_flops: float
    """In float32."""
    traffic: float
    """Bytes read and written beside matrix products."""

    def times(self, factor: float) -> "Work":
        """So many such passes."""
        return Work(factor * self.flops, factor * self.projection_flops, factor * self.traffic)

    def plus(self, other: "Work") -> "Work":
        """Both passes."""
        return Work(
            self.flops + other.flops,
            self.projection_flops + other.projection_flops,
            self.traffic + other.traffic,
        )

    def seconds(self, device: Hardware, n_devices: int = 1) -> float:
        """On so many devices that share the problems."""
        arithmetic = self.flops / device.flops + self.projection_flops / device.flops_float32
        moved = self.traffic / (device.bandwidth * device.bandwidth_used)
        return (arithmetic / device.utilisation + moved) / n_devices


def forward(shape: ModelShape, load: Workload, *, sharing: bool = True, head_everywhere: bool = False) -> Work:
    """A forward; head_everywhere: the output layer sees the prompts too."""
    n_body = load.body_tokens(sharing=sharing)
    n_head = n_body if head_everywhere else load.response_tokens
    flops = 2.0 * (shape.body_weights * n_body + shape.head_weights * n_head) + _attention(shape, load, sharing)
    logits = 4.0 * shape.vocabulary * load.response_tokens
    return Work(flops, 0.0, _FORWARD_TRAFFIC * shape.kept_bytes * n_body + _LOGIT_FORWARD * logits)


def input_gradients(shape: ModelShape, load: Workload, *, sharing: bool = True) -> Work:
    """A forward, and a backward to the inputs of every layer but the weights of none."""
    run = forward(shape, load, sharing=sharing)
    n_body = load.body_tokens(sharing=sharing)
    flops = 2.0 * (shape.body_weights * n_body + shape.head_weights * load.response_tokens)
    flops += _BACKWARD_ATTENTION * _attention(shape, load, sharing)
    logits = 4.0 * shape.vocabulary * load.response_tokens
    traffic = _BACKWARD_TRAFFIC * shape.kept_bytes * n_body + _LOGIT_BACKWARD * logits
    return run.plus(Work(flops, 0.0, traffic))


def sketch(shape: ModelShape, load: Workload, rank: int, *, sharing: bool = True) -> Work:
    """A sketch with sides of this width."""
    return input_gradients(shape, load, sharing=sharing).plus(_projected(shape, load, rank, rank, sharing))


def one_sided(shape: ModelShape, load: Workload, rank: int, *, sharing: bool = True) -> Work:
    """A pass of the fit: with sides of twice the rank, and the product of either with the other's whole vectors."""
    return input_gradients(shape, load, sharing=sharing).plus(_projected(shape, load, 4 * rank, 0, sharing))


def weight_gradients(shape: ModelShape, load: Workload, *, sharing: bool = True, head_everywhere: bool = False) -> Work:
    """A forward and a backward with the weight gradient of every layer: 6 I O in all."""
    run = input_gradients(shape, load, sharing=sharing)
    n_body = load.body_tokens(sharing=sharing)
    n_head = n_body if head_everywhere else load.response_tokens
    more = 2.0 * (shape.body_weights * n_body + shape.head_weights * n_head)
    more += 4.0 * shape.head_weights * (n_head - load.response_tokens)
    return run.plus(Work(more, 0.0, 0.0))


def sampled(shape: ModelShape, load: Workload, at_once: int = MOST_SAMPLED) -> Work:
    """Sampling: each batch reads the weights once for every token, and each sequence its own keys and values.

    at_once: tokens whose keys and values are held together.
    """
    run = forward(shape, replace(load, n_response=1))
    tokens = float(load.response_tokens)
    sequences = max(1, at_once // (load.n_prompt + load.n_response))
    weights = shape.weight_bytes * tokens / min(sequences, load.n_problems * load.n_rollouts)
    cached = shape.key_value_bytes * tokens * (load.n_prompt + load.n_response / 2)
    flops = 2.0 * (shape.body_weights + shape.head_weights) * tokens
    return run.plus(Work(flops, 0.0, weights + cached + _LOGIT_FORWARD * 4.0 * shape.vocabulary * tokens))


def _attention(shape: ModelShape, load: Workload, sharing: bool) -> float:
    """FLOPs of attention's forward; a token sees half of its own part on average, and the whole prompt before it."""
    response = load.response_tokens * (load.n_prompt + load.n_response / 2)
    n_prompts = load.body_tokens(sharing=sharing) - load.response_tokens
    return 4.0 * shape.n_blocks * shape.attention_width * (response + n_prompts * load.n_prompt / 2)


def _projected(shape: ModelShape, load: Workload, rank: int, core: int, sharing: bool) -> Work:
    """Both sides of every layer, and a product of `core` by `rank` for each token; the output layer sees responses."""
    flops = 0.0
    for layer in shape.layers:
        n_tokens = load.response_tokens if layer.n_outputs == shape.vocabulary else load.body_tokens(sharing=sharing)
        flops += 2.0 * rank * (layer.n_inputs + layer.n_outputs + core) * layer.uses * n_tokens
    return Work(0.0, flops, 0.0)
