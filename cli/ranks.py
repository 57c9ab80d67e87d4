"""Commands on several ranks: `torchrun --nproc-per-node N -m gradstore collect ...`.

torchrun starts the same command N times. A command that divides its work has its model sharded over these ranks
(FSDP2); all run the same steps, and rank 0 alone writes and speaks. The first rank that fails says why, in one line,
and torchrun ends the others. Other commands are refused: they would do the same work N times.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.cli.show import show_from
from gradstore.cli.threads import suit_threads
from gradstore.errors import GradstoreError, RequestError

if TYPE_CHECKING:
    import torch
    from torch import nn

_PATIENCE = 60.0
"""Seconds that a rank waits to be ended by torchrun."""
_FAILED = "gradstore/first-to-fail"
"""Key in the ranks' common store: the rank that failed first."""


def n_ranks() -> int:
    """Number of ranks that torchrun started this command on; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def leads() -> bool:
    """Whether this process is rank 0, which alone writes, or the only one."""
    return n_ranks() == 1 or os.environ.get("RANK", "0") == "0"


def check_divided(command: str, *refused: str) -> None:
    """RequestError if torchrun started several ranks and the command was given options that need one process."""
    if n_ranks() > 1 and refused:
        raise RequestError(f"{command} {refused[0]} runs in one process: leave torchrun out, or the option")


@contextmanager
def as_rank(command: str, *, divided: bool) -> Iterator[None]:
    """Run a command in the context as one of torchrun's ranks; no effect without torchrun.

    divided: whether the command divides its work over ranks; RequestError if it does not and there are several.
    """
    if n_ranks() == 1:
        yield
        return
    if not leads():
        show_from(logging.ERROR)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)
    if not divided:
        if leads():
            raise RequestError(f"{command} runs in one process: start it without torchrun, which started {n_ranks()}")
        time.sleep(_PATIENCE)  # torchrun ends this rank when rank 0 has said so; ending first would end rank 0
        sys.exit(2)
    import torch
    import torch.distributed as dist
    from typer import Exit

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        dist.barrier()
    except (Exit, SystemExit):
        raise
    except BaseException as error:
        _end_unless_first()
        if isinstance(error, RuntimeError) and "Connection closed by peer" in str(error):
            raise GradstoreError(
                "another rank ended without a word: what was published is kept, the same command goes on from there"
            ) from None
        raise
    dist.destroy_process_group()


def _end_unless_first() -> None:
    """End this process in silence if another rank failed before it: the error here may only follow from that one."""
    import torch.distributed as dist

    own = os.environ["RANK"]
    try:
        first = dist.distributed_c10d._get_default_store().compare_set(_FAILED, "", own).decode()
    except Exception:  # noqa: BLE001 (the common store has ended with the others)
        first = ""
    if first != own:
        sys.stderr.flush()
        os._exit(1)


def load_policy(
    model: str | Path,
    adapter: str | Path | None,
    device: str | None,
    dtype: "torch.dtype | None" = None,
    *,
    trust_remote_code: bool,
) -> "nn.Module":
    """`load_model`, sharded over the ranks if there are several; each on the GPU of its number unless it is `cpu`.

    In one process, torch then has the threads that suit the model (threads.py).
    """
    from gradstore.engine.gradients.models import checked_device, load_model

    if n_ranks() == 1:
        policy = load_model(model, adapter, device, dtype, trust_remote_code=trust_remote_code)
        suit_threads(policy)
        return policy
    from gradstore.engine.gradients.sharded_models import load_sharded

    device = checked_device(device)
    if device.startswith("cuda"):
        device = checked_device(f"cuda:{os.environ['LOCAL_RANK']}")
    return load_sharded(model, adapter, device, dtype, trust_remote_code=trust_remote_code)
