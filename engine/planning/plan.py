"""The plan of a run: time, memory and disk space of every stage, and which stages do not fit.

The estimates come from formulas (costs.py, memory.py) and a device's data sheet (devices.py). docs/plan.md compares
them with measurements.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from gradstore.engine.assessing.refit import ENOUGH, HELD_OUT
from gradstore.engine.gradients.budget import LEAST, MOST_SAMPLED, allowance
from gradstore.engine.planning import costs, memory
from gradstore.engine.planning.costs import Work, Workload
from gradstore.engine.planning.devices import Hardware
from gradstore.engine.planning.shapes import ModelShape
from gradstore.engine.sketches.fitting import passed
from gradstore.errors import RequestError, check_number
from gradstore.layout import row_arrays

_HELD_OUT = len(range(0, ENOUGH, HELD_OUT))
_SAMPLE = ENOUGH - _HELD_OUT
"""Problems that a new store's projection is fitted to; `_HELD_OUT` more measure its fidelity."""
_EXACT = 200
"""Problems that `fidelity` measures exactly, together with their halves."""
_TOKEN_BYTES = 8
"""Bytes per prompt or response token in a JSONL rollout file, text included: 8.1 measured, 49,152 token ids."""
_VLLM_SHARE, _VLLM_SEQUENCES = 0.9, 256
"""vLLM's defaults: share of a GPU's memory, and sequences run together."""
_PICKED = 128
"""Problems of a training round, where none are asked for."""
_MOST_TOKENS = 10_000_000
"""Longest response that is planned for."""
_DISK_BANDWIDTH = 2e9
"""Bytes per second at which a query reads rows."""


@dataclass(frozen=True, slots=True)
class Request:
    """Size and settings of a run to plan."""

    n_pool: int
    n_rollouts: int
    n_response: int
    """Tokens of a response."""
    n_prompt: int = 200
    n_benchmark: int = 64
    n_picked: int = 0
    """Problems picked for a training round; 0: 128, or a smaller pool whole."""
    n_devices: int = 1
    rank: int = 16
    dim: int = 1024
    row_type: str = "int8"

    def __post_init__(self) -> None:
        if not self.n_picked:
            object.__setattr__(self, "n_picked", min(_PICKED, self.n_pool))
        for name, value in asdict(self).items():
            if isinstance(value, int):
                check_number(name.removeprefix("n_"), value, least=1)
        check_number("tokens", self.n_response, most=_MOST_TOKENS)
        if self.n_picked > self.n_pool:
            raise RequestError(f"picked is {self.n_picked}, more than the pool's {self.n_pool} problems")

    def load(self, n_problems: int) -> Workload:
        """Workload of n_problems of this run."""
        return Workload(n_problems, self.n_rollouts, self.n_prompt, self.n_response)


@dataclass(frozen=True, slots=True)
class Stage:
    """A command, or a part of one."""

    name: str
    seconds: float
    memory_bytes: int
    """Peak memory on one device; for a query, on the host."""
    disk_bytes: int = 0
    """Bytes left on disk."""
    note: str = ""
    fits: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages of a run, with the assumptions."""

    model: str
    n_parameters: int
    device: str
    n_devices: int
    micro_batch_tokens: int
    """Default of `collect`."""
    micro_batch_tokens_with_inputs: int
    """Default of fitting, exact gradients and training."""
    row_bytes: int
    sketched_share: float
    """Share of the parameters that are sketched; embeddings are not."""
    stages: list[Stage]
    assumptions: list[str]
    problems: list[str] = field(default_factory=list)
    """Stages that do not fit, each with a setting that makes it fit."""

    def describe(self) -> dict:
        """The fields as a JSON-ready dict."""
        return asdict(self)


def plan(shape: ModelShape, request: Request, device: Hardware) -> Plan:
    """Compute the plan of a run, by arithmetic only."""
    tokens = memory.recommended_tokens(shape, device)
    row_bytes = sum(array.row_bytes for array in row_arrays(request.dim, request.row_type))
    stages = [
        *_rollouts(shape, request, device),
        _fit(shape, request, device, tokens.with_inputs),
        _collect(shape, request, device, tokens.sketching, row_bytes),
        _fidelity(shape, request, device, tokens.with_inputs),
        _probe(shape, request, device),
        _training(shape, request, device),
        _query(request, row_bytes),
    ]
    n_sketched = sum(layer.n_weights for layer in shape.layers)
    return Plan(
        shape.name,
        shape.n_parameters,
        device.name,
        request.n_devices,
        tokens.sketching,
        tokens.with_inputs,
        row_bytes,
        min(1.0, n_sketched / shape.n_parameters),
        stages,
        _assumptions(request, device),
        _problems(stages, device),
    )


def _stage(name: str, work: Work, held: int, n_devices: int, device: Hardware, disk: int = 0, note: str = "") -> Stage:
    seconds = work.seconds(device, n_devices)
    return Stage(name, seconds, held, disk, note, held <= device.memory)


def _rollouts(shape: ModelShape, request: Request, device: Hardware) -> list[Stage]:
    """Stages of sampling: by transformers, and on a GPU by vLLM, which fills the remaining memory with its KV cache."""
    load = request.load(request.n_pool + request.n_benchmark)
    free = max(0, device.memory - shape.weight_bytes) if device.is_gpu else None
    at_once = {"transformers": min(MOST_SAMPLED, allowance(shape.weight_bytes, free) // shape.key_value_bytes)}
    if device.is_gpu:
        in_cache = max(0, int(_VLLM_SHARE * device.memory) - shape.weight_bytes) // shape.key_value_bytes
        at_once["vllm"] = min(in_cache, _VLLM_SEQUENCES * (request.n_prompt + request.n_response))
    stages = []
    for backend, n_tokens in at_once.items():
        work = costs.sampled(shape, load, max(LEAST, n_tokens))
        held = memory.sampling(shape, load, max(LEAST, n_tokens))
        note = f"{max(LEAST, n_tokens):,} tokens at once"
        disk = load.all_tokens * _TOKEN_BYTES
        stages.append(_stage(f"rollouts, {backend}", work, held, request.n_devices, device, disk, note))
    return stages


def _fit(shape: ModelShape, request: Request, device: Hardware, n_tokens: int) -> Stage:
    n_sample = min(_SAMPLE, request.n_pool)
    load, n_run = request.load(n_sample + request.n_benchmark), passed(n_sample, request.n_benchmark)
    one = costs.one_sided(shape, load, request.rank)
    measured = request.load(min(_HELD_OUT, request.n_pool) + request.n_benchmark)
    exact = costs.weight_gradients(shape, measured).times(memory.formed_blocks(shape, device))
    held = max(memory.fitting(shape, load, n_tokens, request.rank, device), _forming(shape, request, device, n_tokens))
    disk = memory.basis_bytes(shape, request.rank)
    passes = n_run / load.n_problems
    note = (
        f"{passes:.2g} passes over {load.n_problems} problems, then exact scores of {measured.n_problems}; one device"
    )
    return _stage("fit and measure", one.times(passes).plus(exact), held, 1, device, disk, note)


def _collect(shape: ModelShape, request: Request, device: Hardware, n_tokens: int, row_bytes: int) -> Stage:
    load = request.load(request.n_pool + request.n_benchmark)
    work = costs.sketch(shape, load, memory.wide(request.rank))
    held = memory.sketching(shape, load, n_tokens, request.rank, device)
    note = f"micro-batches of {n_tokens:,} tokens"
    return _stage("sketches", work, held, request.n_devices, device, load.n_problems * row_bytes, note)


def _fidelity(shape: ModelShape, request: Request, device: Hardware, n_tokens: int) -> Stage:
    n_sample = min(_EXACT, request.n_pool)
    load = request.load(2 * n_sample + request.n_benchmark)  # the two halves of a problem cost as much as the whole
    n_blocks = memory.formed_blocks(shape, device)
    work = costs.weight_gradients(shape, load).times(n_blocks)
    held = _forming(shape, request, device, n_tokens)
    note = f"{n_sample} problems and their halves, {n_blocks} blocks of layers; one device"
    return _stage("fidelity", work, held, 1, device, 0, note)


def _forming(shape: ModelShape, request: Request, device: Hardware, n_tokens: int) -> int:
    return memory.forming(shape, request.load(1), request.load(request.n_benchmark), n_tokens, device)


def _probe(shape: ModelShape, request: Request, device: Hardware) -> Stage:
    load = request.load(request.n_pool)
    held = memory.probing(shape, load, device, in_place=True)
    note = "weights moved in place, float32"
    if held > device.memory or device.is_gpu:
        held = memory.probing(shape, load, device, in_place=False)
        note = "a low-rank branch (--rank) beside the weights"
    return _stage(
        "probe", costs.forward(shape, load).times(2), held, request.n_devices, device, 0, f"two forwards; {note}"
    )


def _training(shape: ModelShape, request: Request, device: Hardware) -> Stage:
    load = request.load(request.n_picked)
    states = 4 * memory.FLOAT32 * shape.n_parameters // request.n_devices
    n_tokens = memory.recommended_tokens(shape, device, states).with_inputs
    held = memory.training(shape, load, n_tokens, device, request.n_devices)
    work = costs.weight_gradients(shape, load).plus(Work(0.0, 0.0, 7.0 * memory.FLOAT32 * shape.n_parameters))
    note = f"the update of {load.n_problems} problems, Adam in float32 over {request.n_devices} device(s)"
    return _stage("training round", work, held, request.n_devices, device, 0, note)


def _query(request: Request, row_bytes: int) -> Stage:
    size = request.n_pool * row_bytes
    return Stage("query", size / _DISK_BANDWIDTH, size, 0, "on the host; rows stay in the page cache")


def _problems(stages: Sequence[Stage], device: Hardware) -> list[str]:
    remedies = {
        "rollouts": "more GPUs a copy (vLLM's tensor parallel), or a smaller dtype",
        "fit and measure": "a smaller --rank, a random basis, or --modules with fewer layers",
        "sketches": "a smaller --token-budget, or --modules with fewer layers",
        "fidelity": "--modules with fewer layers, or leave it out: nothing else needs it",
        "probe": "a LoRA adapter, whose direction is small, or a sharded policy (verl, FSDP2)",
        "training round": "more --gpus, LoRA, or a trainer that offloads (verl)",
    }
    return [
        f"{stage.name}: needs {stage.memory_bytes / 1e9:.0f} GB, one {device.name} has {device.memory / 1e9:.0f}: "
        f"{remedies[stage.name.split(',')[0]]}"
        for stage in stages
        if not stage.fits
    ]


def _assumptions(request: Request, device: Hardware) -> list[str]:
    peaks = (
        f"{device.name}: {device.flops / 1e12:.3g} TFLOP/s of which {device.utilisation:.0%} are reached, "
        f"{device.memory / 1e9:.0f} GB, {device.bandwidth / 1e12:.2g} TB/s of which {device.bandwidth_used:.0%} are"
    )
    return [
        peaks,
        f"prompts of {request.n_prompt} tokens, responses of {request.n_response}, all of one length, none equal",
        f"every problem has a signal; a benchmark of {request.n_benchmark} problems is rolled out and collected too",
        f"fitted basis of rank {request.rank}, {request.dim} dimensions as {request.row_type}",
        "sampling reads the weights once for each token of a batch; reading and writing files is not counted",
    ]
