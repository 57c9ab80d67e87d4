"""Most bytes that each way of running a model holds at once, on one device, the weights among them."""

from dataclasses import dataclass

from gradstore.engine.gradients.budget import allowance, formed_within, tokens_within
from gradstore.engine.gradients.passes import LOGIT_BYTES, LOGIT_BYTES_ON_CPU
from gradstore.engine.planning.costs import Workload
from gradstore.engine.planning.devices import Hardware
from gradstore.engine.planning.shapes import ModelShape
from gradstore.engine.sketches.fitting import _BESIDE, window_size
from gradstore.engine.sketches.spectrum import COLUMNS, WIDEST

FLOAT32 = 4
"""Bytes of a float32 number, in which sides, cores, formed gradients and a probe's weights are kept."""

_ON_THE_WAY = 2
"""Blocks whose activations' worth of gradients exists at once during a backward."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a micro-batch, padding included."""

    sketching: int
    """Where weights are frozen."""
    with_inputs: int
    """Where the layers' inputs are kept too."""


def recommended_tokens(shape: ModelShape, device: Hardware, taken: int | None = None) -> Tokens:
    """The micro-batches that memory leaves room for: what `collect` would choose by itself.

    taken: bytes that are held beside them; None: the weights.
    """
    taken = shape.weight_bytes if taken is None else taken
    free = max(0, device.memory - taken) if device.is_gpu else None
    may_take = allowance(shape.weight_bytes, free)
    return Tokens(
        tokens_within(may_take, shape.kept_bytes, on_gpu=device.is_gpu),
        tokens_within(may_take, shape.kept_bytes_with_inputs, on_gpu=device.is_gpu),
    )


def side_widths(shape: ModelShape) -> int:
    """Outputs and inputs of all sketched layers, added up."""
    return sum(layer.n_inputs + layer.n_outputs for layer in shape.layers)


def wide(rank: int) -> int:
    """Directions of a fitted side, those beside it counted."""
    return rank + rank // _BESIDE


def basis_bytes(shape: ModelShape, rank: int) -> int:
    """Bytes of a fitted basis: float32 sides, a quarter of their directions random; the file is as large."""
    return FLOAT32 * sum(
        (wide(rank) * layer.n_inputs if layer.n_inputs > rank else 0)
        + (wide(rank) * layer.n_outputs if layer.n_outputs > rank else 0)
        for layer in shape.layers
    )


def logits_bytes(shape: ModelShape, load: Workload, n_tokens: int, device: Hardware) -> int:
    """Bytes of the logits that are held at once, their exponentials, and on a GPU their bfloat16 original."""
    limit = LOGIT_BYTES if device.is_gpu else LOGIT_BYTES_ON_CPU
    one = FLOAT32 * load.n_response * shape.vocabulary
    in_batch = max(1, min(n_tokens, load.body_tokens()) // load.n_response)
    held = one * min(in_batch, max(1, limit // one))
    return 2 * held + (held if device.is_gpu else 0)


def held_by_tokens(shape: ModelShape, load: Workload, n_tokens: int, kept_bytes: int) -> int:
    """Bytes of a micro-batch: what autograd keeps, two blocks' worth of gradients on the way back, and where prompts
    are shared, their keys and values repeated for every continuation and joined to its own."""
    n_tokens = min(n_tokens, load.body_tokens())
    held = n_tokens * kept_bytes * (1 + _ON_THE_WAY / shape.n_blocks)
    if load.body_tokens() < load.all_tokens:
        held += n_tokens * shape.key_value_bytes * (2 * load.n_prompt + load.n_response) / load.n_response
    return int(held)


def sketching(shape: ModelShape, load: Workload, n_tokens: int, rank: int, device: Hardware) -> int:
    """Weights, sides, what autograd keeps of a micro-batch, and its logits."""
    return (
        shape.weight_bytes
        + basis_bytes(shape, rank)
        + held_by_tokens(shape, load, n_tokens, shape.kept_bytes)
        + logits_bytes(shape, load, n_tokens, device)
    )


def fitting(shape: ModelShape, load: Workload, n_tokens: int, rank: int, device: Hardware) -> int:
    """The same with inputs kept, sides of twice the rank, a window's products with them, and the sums of each layer."""
    one = FLOAT32 * side_widths(shape) * 2 * rank
    products = one * (1 + window_size(one))
    sums = FLOAT32 * sum(
        width * (width if width <= max(WIDEST, COLUMNS * rank) else COLUMNS * rank)
        for layer in shape.layers
        for width in (layer.n_outputs, layer.n_inputs)
    )
    return (
        shape.weight_bytes
        + products
        + sums
        + held_by_tokens(shape, load, n_tokens, shape.kept_bytes_with_inputs)
        + logits_bytes(shape, load, n_tokens, device)
    )


def forming(shape: ModelShape, problem: Workload, benchmark: Workload, n_tokens: int, device: Hardware) -> int:
    """Exact gradients of a block of layers: the benchmark's in as few micro-batches as can be, then beside it those of
    one problem after the other."""
    block = formed_block(shape, device)

    def held(load: Workload) -> int:
        kept = held_by_tokens(shape, load, n_tokens, shape.kept_bytes_with_inputs)
        return kept + logits_bytes(shape, load, n_tokens, device)

    return shape.weight_bytes + block + max(held(benchmark), block + held(problem))


def formed_block(shape: ModelShape, device: Hardware) -> int:
    """Bytes of the block of layers that is formed at once; at least the largest layer."""
    sizes = [FLOAT32 * layer.n_weights for layer in shape.layers]
    free = max(0, device.memory - shape.weight_bytes) if device.is_gpu else None
    return min(sum(sizes), max(formed_within(shape.weight_bytes, free), max(sizes)))


def formed_blocks(shape: ModelShape, device: Hardware) -> int:
    """Times that the rollouts are run for exact gradients: once for each block of layers."""
    return -(-sum(FLOAT32 * layer.n_weights for layer in shape.layers) // formed_block(shape, device))


def probing(shape: ModelShape, load: Workload, device: Hardware, *, in_place: bool) -> int:
    """In place: float32 weights, a copy and the direction; as a branch: the weights as they are and the direction."""
    weights = 3 * FLOAT32 * shape.n_parameters if in_place else shape.weight_bytes + FLOAT32 * shape.n_parameters
    return weights + logits_bytes(shape, load, load.response_tokens, device)


def training(shape: ModelShape, load: Workload, n_tokens: int, device: Hardware, n_devices: int) -> int:
    """Float32 weights, gradients and Adam's two moments, divided over the devices, and a micro-batch of each."""
    held = 4 * FLOAT32 * shape.n_parameters // n_devices
    return (
        held
        + held_by_tokens(shape, load, n_tokens, shape.kept_bytes_with_inputs)
        + logits_bytes(shape, load, n_tokens, device)
    )


def sampling(shape: ModelShape, load: Workload, at_once: int) -> int:
    """The weights, keys and values of the rollouts that are sampled together, and a step's logits in float64."""
    sequences = min(max(1, at_once // (load.n_prompt + load.n_response)), load.n_problems * load.n_rollouts)
    cache = sequences * (load.n_prompt + load.n_response) * shape.key_value_bytes
    return shape.weight_bytes + cache + 2 * 8 * sequences * shape.vocabulary
