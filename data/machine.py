"""What a run is measured on, and which arithmetic that machine is good at."""
import atexit
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data.files import InputError


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def bf16_by() -> str | None:
    """The instructions by which this CPU multiplies bf16 matrices: "AMX", "AVX-512" or none.

    oneDNN's variable ONEDNN_MAX_CPU_ISA can keep it from using them.
    """
    can, most = torch.cpu.get_capabilities(), os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    free = most in ("", "ALL", "DEFAULT")
    if can.get("amx_bf16") and (free or "AMX" in most):
        return "AMX"
    later = free or any(name in most for name in ("BF16", "FP16", "AMX", "AVX10"))
    return "AVX-512" if can.get("avx512_bf16") and later else None


def fast_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bf16 matrices in hardware; emulated they take several times as long as fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bf16_by() is not None


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of the matrix products for "auto" (bf16 where it is fast), "fp32" or "bf16"; InputError for another word."""
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"precision is {precision!r}; expected auto, fp32 or bf16")
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and fast_bf16(device)) else torch.float32


def join_processes() -> tuple[int, int]:
    """(rank, processes): those of torchrun, whose group this process joins, or (0, 1)."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def sum_over_processes(tensors: list[torch.Tensor]) -> None:
    """Adds up each tensor over the processes of torchrun, in place; nothing to do for one process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def on_each_core(call: Callable, items: Sequence, device: torch.device, most: int = 8) -> None:
    """Calls with each item; on a CPU every core has items of its own, since one small product does not fill several.

    What a call computes depends on its item alone, up to the rounding of a product on one core or several. At most
    `most` items are under way, as each takes memory; more cores than that share them.
    """
    cores = torch.get_num_threads()
    workers = min(cores, len(items), most)
    if device.type != "cpu" or workers < 2:
        for item in items:
            call(item)
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(-(-cores // workers),)) as pool:
            list(pool.map(call, items))
    finally:
        torch.set_num_threads(cores)        # for threads yet to come; this one's number never changed


def keep_freed_memory() -> None:
    """Lets glibc reuse the large blocks that a step frees; by default it returns them and faults them in anew.

    A step of training did so with 4,000 to 16,000 pages, up to 6 % of its time. It holds for the whole process;
    elsewhere than in glibc nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):      # M_MMAP_THRESHOLD; before glibc 2.35 at most 32 MB
            libc.mallopt(-1, 2**31 - 1)                             # M_TRIM_THRESHOLD


def end_with_parent() -> None:
    """Has this process killed when its parent ends, however that ends; on Linux, elsewhere nothing."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG


def machine(device: torch.device) -> dict:
    """What the numbers were measured on, in public terms; a CPU is named with the limit that oneDNN keeps to."""
    about = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system(),
             "bf16_hardware": fast_bf16(device)}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)} | about
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return {"device": f"{name}, {most} at most" if most else name, "bf16_by": bf16_by()} | about


def versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far.

    From Linux's own count where it is there: ru_maxrss (KiB on Linux, bytes on macOS) begins with that of the process
    which started this one.
    """
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024 / 1e9
    import resource  # not on Windows, where the rest runs
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e9 if sys.platform == "darwin" else most * 1024 / 1e9
