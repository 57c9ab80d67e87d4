"""Peak memory in bytes on one device for each way of running a model, including the weights."""

from dataclasses import dataclass

from gradstore.engine.gradients.budget import allowance, formed_within, tokens_within
from gradstore.engine.gradients.passes import LOGIT_BYTES, LOGIT_BYTES_ON_CPU
from gradstore.engine.planning.costs import Workload
from gradstore.engine.planning.devices import Hardware
from gradstore.engine.planning.shapes import ModelShape
from gradstore.engine.sketches.fitting import _BESIDE, window_size
from gradstore.engine.sketches.spectrum import COLUMNS, WIDEST

FLOAT32 = 4
"""Bytes of a float32 number: the type of sides, cores, formed gradients and a probe's weights."""

_ON_THE_WAY = 2
"""During a backward, gradients as large as the activations of this many blocks exist at once."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a micro-batch, padding included."""

    sketching: int
    """With frozen weights."""
    with_inputs: int
    """If the layers' inputs are kept too."""


def recommended_tokens(shape: ModelShape, device: Hardware, taken: int | None = None) -> Tokens:
    """Micro-batch sizes that fit into memory: the default of `collect`.

    taken: bytes already in use; None: those of the weights.
    """
    taken = shape.weight_bytes if taken is None else taken
    free = max(0, device.memory - taken) if device.is_gpu else None
    may_take = allowance(shape.weight_bytes, free)
    return Tokens(
        tokens_within(may_take, shape.kept_bytes, on_gpu=device.is_gpu),
        tokens_within(may_take, shape.kept_bytes_with_inputs, on_gpu=device.is_gpu),
    )


def side_widths(shape: ModelShape) -> int:
    """Sum of the outputs and inputs of all sketched layers."""
    return sum(layer.n_inputs + layer.n_outputs for layer in shape.layers)


def wide(rank: int) -> int:
    """Directions of a fitted side, including the random ones."""
    return rank + rank // _BESIDE


def basis_bytes(shape: ModelShape, rank: int) -> int:
    """Bytes of a fitted basis, in memory and on disk: float32 sides with a quarter more random directions."""
    sides = (width for layer in shape.layers for width in (layer.n_inputs, layer.n_outputs))
    return FLOAT32 * wide(rank) * sum(width for width in sides if width > rank)


def logits_bytes(shape: ModelShape, load: Workload, n_tokens: int, device: Hardware) -> int:
    """Bytes of the logits held at once, their exponentials, and on a GPU their bfloat16 original."""
    limit = LOGIT_BYTES if device.is_gpu else LOGIT_BYTES_ON_CPU
    one = FLOAT32 * load.n_response * shape.vocabulary
    in_batch = max(1, min(n_tokens, load.body_tokens()) // load.n_response)
    held = one * min(in_batch, max(1, limit // one))
    return 2 * held + (held if device.is_gpu else 0)


def held_by_tokens(shape: ModelShape, load: Workload, n_tokens: int, kept_bytes: int) -> int:
    """Bytes of a micro-batch: activations kept by autograd, gradients of two blocks during the backward, and with
    shared prompts their keys and values, repeated and joined to those of every continuation."""
    n_tokens = min(n_tokens, load.body_tokens())
    held = n_tokens * kept_bytes * (1 + _ON_THE_WAY / shape.n_blocks)
    if load.body_tokens() < load.all_tokens:
        held += n_tokens * shape.key_value_bytes * (2 * load.n_prompt + load.n_response) / load.n_response
    return int(held)


def micro_batch(shape: ModelShape, load: Workload, n_tokens: int, device: Hardware, *, inputs_kept: bool = True) -> int:
    """Bytes of a micro-batch's activations and logits."""
    kept = shape.kept_bytes_with_inputs if inputs_kept else shape.kept_bytes
    return held_by_tokens(shape, load, n_tokens, kept) + logits_bytes(shape, load, n_tokens, device)


def sketching(shape: ModelShape, load: Workload, n_tokens: int, rank: int, device: Hardware) -> int:
    """Bytes for sketching: weights, sides, a micro-batch's activations and logits."""
    held = micro_batch(shape, load, n_tokens, device, inputs_kept=False)
    return shape.weight_bytes + basis_bytes(shape, rank) + held


def fitting(shape: ModelShape, load: Workload, n_tokens: int, rank: int, device: Hardware) -> int:
    """Bytes for fitting: as `sketching`, with kept inputs, sides of twice the rank, a window's products, all sums."""
    one = FLOAT32 * side_widths(shape) * 2 * rank
    products = one * (1 + window_size(one))
    sums = FLOAT32 * sum(
        width * (width if width <= max(WIDEST, COLUMNS * rank) else COLUMNS * rank)
        for layer in shape.layers
        for width in (layer.n_outputs, layer.n_inputs)
    )
    return shape.weight_bytes + products + sums + micro_batch(shape, load, n_tokens, device)


def forming(shape: ModelShape, problem: Workload, benchmark: Workload, n_tokens: int, device: Hardware) -> int:
    """Bytes for exact gradients of a block of layers: first the benchmark's, in as few micro-batches as possible; then
    beside it those of one problem at a time."""
    block = formed_block(shape, device)
    first, then = (micro_batch(shape, load, n_tokens, device) for load in (benchmark, problem))
    return shape.weight_bytes + block + max(first, block + then)


def formed_block(shape: ModelShape, device: Hardware) -> int:
    """Bytes of the block of layers formed at once; at least those of the largest layer."""
    sizes = [FLOAT32 * layer.n_weights for layer in shape.layers]
    free = max(0, device.memory - shape.weight_bytes) if device.is_gpu else None
    return min(sum(sizes), max(formed_within(shape.weight_bytes, free), max(sizes)))


def formed_blocks(shape: ModelShape, device: Hardware) -> int:
    """Passes over the rollouts for exact gradients: one per block of layers."""
    return -(-sum(FLOAT32 * layer.n_weights for layer in shape.layers) // formed_block(shape, device))


def probing(shape: ModelShape, load: Workload, device: Hardware, *, in_place: bool) -> int:
    """Bytes for probing. In place: float32 weights, a copy and the direction; as a branch: the weights in their own
    dtype and the direction."""
    weights = 3 * FLOAT32 * shape.n_parameters if in_place else shape.weight_bytes + FLOAT32 * shape.n_parameters
    return weights + logits_bytes(shape, load, load.response_tokens, device)


def training(shape: ModelShape, load: Workload, n_tokens: int, device: Hardware, n_devices: int) -> int:
    """Bytes for training: float32 weights, gradients and Adam's two moments, divided over the devices, and a
    micro-batch on each."""
    return 4 * FLOAT32 * shape.n_parameters // n_devices + micro_batch(shape, load, n_tokens, device)


def sampling(shape: ModelShape, load: Workload, at_once: int) -> int:
    """Bytes for sampling: weights, keys and values of the rollouts sampled together, and a step's logits in float64."""
    sequences = min(max(1, at_once // (load.n_prompt + load.n_response)), load.n_problems * load.n_rollouts)
    cache = sequences * (load.n_prompt + load.n_response) * shape.key_value_bytes
    return shape.weight_bytes + cache + 2 * 8 * sequences * shape.vocabulary
