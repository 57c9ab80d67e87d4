"""verl's platform interface for a machine without an accelerator.

verl loads it through VERL_USE_EXTERNAL_MODULES and picks it by VERL_PLATFORM=cpu; the training engine is then found
under another device's name (VERL_ENGINE_DEVICE=cuda), since verl registers none for "cpu". Ray hands out a made-up
"GPU" a worker (ray_init.num_gpus). Collectives go through gloo.
"""

import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.fsdp
import verl.utils.distributed
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _Nothing(types.ModuleType):
    """Stands in for torch.cuda: every function exists, takes anything and returns 0."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: 0


_DEVICE = _Nothing("torch.cpu_device")
_DEVICE.is_available = lambda: False  # type: ignore[attr-defined]
_DEVICE.current_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
_DEVICE.device_count = lambda: 1  # type: ignore[attr-defined]
_DEVICE.mem_get_info = lambda *args: (1 << 30, 1 << 30)  # type: ignore[attr-defined]
_DEVICE.get_device_name = lambda *args: "CPU"  # type: ignore[attr-defined]


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """The processor as verl's device."""

    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: _DEVICE)

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never found by probing, only asked for by VERL_PLATFORM

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def _join_over_gloo(timeout_second: float | None = None, backend: str | None = None) -> None:
    """verl's own asks for "cpu:gloo,cpu:gloo" here, which torch refuses."""
    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        backend="gloo",
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        timeout=timedelta(seconds=timeout_second) if timeout_second else None,
        init_method=os.environ.get("DIST_INIT_METHOD"),
    )


class _Unpinned(torch.distributed.fsdp.CPUOffloadPolicy):
    """verl offloads a reference policy to pinned memory, which there is not without an accelerator."""

    def __init__(self, pin_memory: bool = True) -> None:
        super().__init__(pin_memory=False)


verl.utils.distributed.initialize_global_process_group_ray = _join_over_gloo
torch.distributed.fsdp.CPUOffloadPolicy = _Unpinned
