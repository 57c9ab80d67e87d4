"""`plan`: what a run takes, before anything is loaded."""

from typing import Annotated

from gradstore.cli.app import command, opt
from gradstore.cli.query import Json
from gradstore.cli.show import duration, print_json, print_line, print_table
from gradstore.wording import size


@command(
    panels={"What is asked": "model pool rollouts tokens prompt_tokens benchmark picks", "On what": "device gpus"},
    example="gradstore plan --model Qwen/Qwen3-8B --pool 10000 --rollouts 16 --tokens 1000 --device h100 --gpus 8",
)
def plan(
    model: Annotated[str, opt("Folder, config.json, or a known name such as Qwen/Qwen3-8B.")],
    pool: Annotated[int, opt("Problems of the pool.", min=1)],
    rollouts: Annotated[int, opt("Rollouts of each problem.", min=1)],
    tokens: Annotated[int, opt("Tokens of a response.", min=1)],
    device: Annotated[str, opt("h100, h200, a100-80gb, a100-40gb, l40s, 4090 or cpu.")] = "h100",
    gpus: Annotated[int, opt("Devices that share the work.", min=1)] = 1,
    prompt_tokens: Annotated[int, opt("Tokens of a prompt.", min=1)] = 200,
    benchmark: Annotated[int, opt("Problems of the benchmark.", min=1)] = 64,
    picks: Annotated[int | None, opt("Problems of a training round [default: 128, or the pool].", min=1)] = None,
    rank: Annotated[int, opt("Width of each side of a layer's projection.", min=1)] = 16,
    dim: Annotated[int, opt("Dimensions of a sketch.", min=1)] = 1024,
    dtype: Annotated[str, opt("Row type: int8, int4, 1bit, fp16 or fp32.")] = "int8",
    json: Json = False,
) -> None:
    """Time, memory and disk of every stage, from the model's configuration alone."""
    from gradstore.engine.planning.devices import hardware
    from gradstore.engine.planning.plan import Request
    from gradstore.engine.planning.plan import plan as planned
    from gradstore.engine.planning.shapes import shape_of
    from gradstore.errors import check_known
    from gradstore.layout import DTYPES

    check_known("--dtype", dtype, DTYPES)
    request = Request(pool, rollouts, tokens, prompt_tokens, benchmark, picks or 0, gpus, rank, dim, dtype)
    machine = hardware(device)
    found = planned(shape_of(model, dtype=machine.dtype), request, machine)
    if json:
        print_json(found.describe())
        return
    print_table(
        f"{model}: {found.n_parameters / 1e9:.2f} billion parameters, {found.sketched_share:.0%} of them sketched, on "
        f"{found.n_devices} x {found.device}",
        ["stage", "time", "memory", "disk", "fits", "how"],
        [
            [
                stage.name,
                duration(stage.seconds),
                size(stage.memory_bytes),
                size(stage.disk_bytes) if stage.disk_bytes else "",
                "yes" if stage.fits else "NO",
                stage.note,
            ]
            for stage in found.stages
        ],
        right=["time", "memory", "disk"],
        spare=["disk"],
    )
    print_line(
        f"\nMicro-batches by default: {found.micro_batch_tokens:,} tokens, {found.micro_batch_tokens_with_inputs:,} "
        f"where layers' inputs are kept. A row takes {found.row_bytes} bytes."
    )
    for problem in found.problems:
        print_line(f"does not fit: {problem}")
    print_line("Assumed: " + "; ".join(found.assumptions) + ".")
