"""The machine that a run uses: its device, its precision, its threads, its processes, and its description."""
import atexit
import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from run.files import InputError, one_line

FASTER = 1.1            # bf16 is used if its products are at least this many times as fast as those in fp32


# ------------------------------------------------------------------------------------------ device and precision
def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name; by default CUDA if there is a CUDA device, else the CPU.

    Raises InputError if there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("no program was tried on it")
    except (RuntimeError, AssertionError, TypeError) as error:      # torch's, for an unknown name or a missing GPU
        reason = one_line(error)[:80]
        raise InputError(f"device {str(name)!r} cannot be used ({reason}); expected cpu or, with a GPU, cuda") from None
    return device


def bf16_instructions() -> str | None:
    """The instructions that multiply bf16 matrices on this CPU: "AMX", "AVX-512" or None.

    The environment variable ONEDNN_MAX_CPU_ISA can forbid them to oneDNN, which does the products.
    """
    capabilities = torch.cpu.get_capabilities()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    unlimited = limit in ("", "ALL", "DEFAULT")
    if capabilities.get("amx_bf16") and (unlimited or "AMX" in limit):
        return "AMX"
    allowed = unlimited or any(name in limit for name in ("BF16", "FP16", "AMX", "AVX10"))
    return "AVX-512" if capabilities.get("avx512_bf16") and allowed else None


@cache
def fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are at least FASTER times as fast as in fp32 here; measured once per process.

    It is measured because a CPU's instructions do not tell: one CPU with bf16 instructions reached 99 GFLOP/s in bf16
    and 156 in fp32.
    """
    return product_seconds(device, torch.float32) >= FASTER * product_seconds(device, torch.bfloat16)


def product_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a product of two square matrices, the fastest of four runs; on a CPU by one thread."""
    size = 4096 if device.type == "cuda" else 256
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    with torch_threads(1):
        for _ in range(4):
            begin = time.perf_counter()
            product = matrix @ matrix
            product[0, 0].item()                            # waits for a GPU
            times.append(time.perf_counter() - begin)
    return min(times)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of the matrix products for "fp32", "bf16" or "auto"; InputError for another word.

    "auto" is bf16 if it is fast in every process of torchrun, so that all use the same type.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"precision is {precision!r}; expected auto, fp32 or bf16")
    if precision == "auto":
        slow = torch.tensor([float(not fast_bf16(device))])
        slow_processes, = sum_over_processes([slow])
        return torch.float32 if slow_processes > 0 else torch.bfloat16
    return torch.bfloat16 if precision == "bf16" else torch.float32


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on this device. A plain .to(device) would wait until the GPU has done all its earlier work."""
    return tensor.to(device, non_blocking=True)


def random_generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator of random numbers on this device."""
    return torch.Generator(device).manual_seed(seed)


def seeded(seed: int, make: Callable):
    """make(), with weights drawn from the seed; the random numbers of the caller go on as if nothing had been drawn.

    torch.manual_seed would also set the generators of all GPUs, so only the CPU's generator is set and put back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products take this type. It holds for one thread, so every thread enters its own.

    There is no cache of cast weights. All threads would share it, and a thread that leaves its context would empty it
    for the others. Then gradients would be added in a random order, and rounding would differ between runs.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


# ------------------------------------------------------------------------------------------------------- threads
@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """This thread computes with `count` torch threads inside the context; also a decorator, @torch_threads(1).

    With one thread, no operation waits for a core that another process has taken.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """A pool of threads that compute side by side, each with its own share of the cores.

        both = Workers(2, device)
        both.map(direction, [0, 1])         # [direction(0), direction(1)], on a CPU at the same time

    The torch threads are divided among `count` threads, at least one for each. On a GPU there is no pool: the calls
    run one after the other, since a GPU runs each of them in parallel by itself.
    """

    def __init__(self, count: int, device: torch.device):
        self.pool = None
        if device.type == "cpu":
            share = max(1, torch.get_num_threads() // count)
            self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,))

    def map(self, call: Callable, *arguments: Iterable) -> list:
        """[call(a, b, ..) for a, b, .. in zip(*arguments)], in order; raises what a call raises."""
        if self.pool is None:
            return [call(*values) for values in zip(*arguments, strict=True)]
        return list(self.pool.map(call, *arguments))


def map_on_cores(call: Callable, items: Sequence, device: torch.device, max_workers: int = 8) -> list:
    """[call(item) for item in items], on a CPU one item per core at a time, on a GPU one after the other.

    The result of an item does not depend on the number of cores, up to rounding. At most `max_workers` items are under
    way at a time, since each takes memory.
    """
    count = min(torch.get_num_threads(), len(items), max_workers)
    if count < 2 or device.type != "cpu":
        return [call(item) for item in items]
    workers = Workers(count, device)
    with workers.pool, torch_threads(torch.get_num_threads()):      # workers change torch's default; put it back
        return workers.map(call, items)


# ----------------------------------------------------------------------------------------------------- processes
def started_by_torchrun() -> bool:
    """Whether torchrun started this process. Some builds of torch, for Windows or macOS, cannot join processes."""
    return dist.is_available() and dist.is_torchelastic_launched()


def join_processes() -> tuple[int, int]:
    """(rank, number of processes) under torchrun, whose process group this process joins; (0, 1) without it."""
    if not started_by_torchrun():
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            processes = int(os.environ["LOCAL_WORLD_SIZE"])
            if processes > torch.cuda.device_count():
                raise InputError(f"{processes} processes need as many GPUs, but there are {torch.cuda.device_count()}; "
                                 "choose a smaller --nproc_per_node, or set CUDA_VISIBLE_DEVICES= to use the CPU")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def refuse_processes(name: str) -> None:
    """Raises InputError if torchrun started several processes for a script that does not share its work."""
    if started_by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
        raise InputError(f"{name} does not share its work with other processes; start it without torchrun")


def sum_over_processes(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sum of each tensor over the processes of torchrun; for one process the tensors themselves.

    Dense tensors travel as one. Sparse ones travel through the CPU, since gloo can add them and nccl cannot.
    """
    if not started_by_torchrun() or not dist.is_initialized() or dist.get_world_size() == 1:
        return tensors
    dense = [tensor for tensor in tensors if not tensor.is_sparse]
    flat = torch.cat([tensor.flatten() for tensor in dense]) if dense else torch.zeros(0)
    dist.all_reduce(flat)
    sums = iter(flat.split([tensor.numel() for tensor in dense]))
    results = []
    for tensor in tensors:
        if tensor.is_sparse:
            on_cpu = tensor.cpu().coalesce()
            dist.all_reduce(on_cpu)
            results.append(on_cpu.to(tensor.device))
        else:
            results.append(next(sums).view_as(tensor))
    return results


def sum_gradients(weights: list[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
    """Replaces every .grad by its sum over the processes of torchrun; returns the sum of the losses, a scalar."""
    *gradients, total = sum_over_processes([*(weight.grad for weight in weights), loss])
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    return total


def end_with_parent() -> None:
    """Kills this process, a worker, when its parent ends, however it ends. Only Linux can do this; else no effect."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG


# -------------------------------------------------------------------------------------------------------- memory
def keep_freed_memory() -> None:
    """Lets glibc keep the large blocks that a training step frees, for all threads together, and reuse them.

    By default glibc returns them to the system and asks for them again, page by page, which took a quarter of a step.
    The setting holds for the whole process, so its memory does not shrink. With another C library nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)                                                 # M_ARENA_MAX: one pool for all threads
        raised = libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)         # M_MMAP_THRESHOLD; old versions: 32 MB
        if raised:
            libc.mallopt(-1, 2**31 - 1)                                     # M_TRIM_THRESHOLD


def keep_memory_flat() -> None:
    """Keeps memory from growing with the number of batches, if almost each has another shape; before the first batch.

    oneDNN, which computes on a CPU, would keep what it prepares for each of 1,024 shapes. It takes less than 1 ms to
    prepare it again.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    keep_freed_memory()


def peak_memory_gb() -> float | None:
    """Largest resident memory of this process so far, in GB; None on Windows.

    On Linux it is VmHWM, because ru_maxrss begins with the value of the process that started this one.
    """
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e9
    try:
        import resource
    except ImportError:         # Windows does not have it
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


# --------------------------------------------------------------------------------------------------- description
def describe(device: torch.device) -> dict:
    """What the numbers were measured on, for the JSON files.

    device: name of the GPU or CPU that trains; cpu: name of the CPU; bf16_hardware: whether bf16 is fast on the device.
    """
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    if limit:
        cpu = f"{cpu}, {limit} at most"
    about = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.system(),
             "bf16_hardware": fast_bf16(device)}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)} | about
    return {"device": cpu, "bf16_by": bf16_instructions()} | about


def versions() -> dict:
    """Versions of what the numbers depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def provenance(device: torch.device, seconds: float) -> dict:
    """How the numbers of a JSON file were made; seconds: from command to file."""
    program = Path(sys.argv[0]).resolve()
    name = f"report/{program.name}" if program.parent.name == "report" else program.name
    return {"command": " ".join(["python", name, *sys.argv[1:]]), "versions": versions(),
            "machine": describe(device), "minutes": seconds / 60, "peak_memory_gb": peak_memory_gb()}
