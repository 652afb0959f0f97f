"""A pretended GPU, so that a machine without one finds code that would fail or wait on a GPU.

    with far_device() as far:
        x = torch.ones(2, 3).to("cuda")     # x.device is cuda:0, and so is that of everything computed from x
        x + torch.ones(2, 3)                # AssertionError: torch.Tensor.add mixes cpu and cuda tensors
        x.sum().item()                      # 6.0
        far.waits                           # ["to(cuda) in example.py:2", "item in example.py:4"]: Python waits

Every tensor is a plain CPU tensor, and torch computes as always, autograd included. A tensor pretends to be on the GPU
if its memory is marked. As on a real GPU, this holds for everything that shares the memory: views, .data, parameters.

How: while a `TorchFunctionMode` is active, torch calls `__torch_function__` instead of every function that Python code
calls, with this function and its arguments. Here it answers questions about the device, refuses arguments from two
devices, notes what makes a program wait, runs the function, and marks the memory of the results. It sees one thread
only, which is enough, because the scripts start no threads for a GPU.

It does not notice operations that torch lacks for GPUs, and allows `coalesce()`, which waits for a GPU too.
"""
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
READ_VALUES = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__format__", "__repr__",
               "__contains__", "is_nonzero", "equal", "allclose"}
READ_A_SIZE = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"}
UPLOAD = {"tensor", "as_tensor", "asarray"}                                 # torch.tensor([1.0], device="cuda")
MAY_MIX = {"copy_", "data", "_has_compatible_shallow_copy_type"}            # they replace values, or compute nothing


class Generator(torch.Generator):
    """A CPU generator that says it is the GPU's if it was made for the GPU."""
    device = CPU

    def __new__(cls, device: torch.device | str = CPU):
        generator = super().__new__(cls)
        generator.device = CUDA if torch.device(device).type == "cuda" else CPU
        return generator


def parts(value) -> Iterator[Tensor | Generator]:
    """All tensors and generators in arguments or results."""
    if isinstance(value, (Tensor, Generator)):
        yield value
    elif isinstance(value, dict):
        yield from parts(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from parts(part)


def caller() -> str:
    """File and line of the code outside torch and this file that called torch."""
    inside = (str(Path(torch.__file__).parent), __file__)
    frame = sys._getframe()
    while frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Far(TorchFunctionMode):
    """See the top of this file. waits: what would have made the program wait for a GPU, and where."""

    def __init__(self):
        super().__init__()
        self.waits = []
        self.marked = {}        # address of a block of memory -> weak reference, without which it could be used again

    def memory(self, tensor: Tensor) -> list[torch.UntypedStorage]:
        """The blocks of memory of a dense or sparse tensor."""
        dense = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        return [part.untyped_storage() for part in dense]

    def mark(self, result) -> None:
        """Puts all tensors in a result on the device."""
        for tensor in parts(result):
            for block in self.memory(tensor):
                self.marked[block._cdata] = StorageWeakRef(block)

    def device(self, part: Tensor | Generator) -> torch.device:
        """The device that a tensor or generator pretends to be on."""
        if isinstance(part, Generator):
            return part.device
        marked = any(block._cdata in self.marked for block in self.memory(part))
        return CUDA if marked else part.device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        path = (resolve_name(function) or function.__name__).removesuffix(".__get__").removesuffix(".__set__")
        name = path.split(".")[-1]
        method = len(args) > 0 and isinstance(args[0], Tensor)
        if method and name in ("device", "is_cuda", "is_cpu"):
            device = self.device(args[0])
            return device if name == "device" else name == f"is_{device.type}"
        if method and name in ("to", "cuda", "cpu"):
            return self.move(name, *args, **kwargs)
        devices = {self.device(part) for part in parts([args, kwargs]) if name in MAY_MIX or not self.is_number(part)}
        if len(devices) > 1 and name not in MAY_MIX:
            raise AssertionError(f"{path} mixes {' and '.join(sorted(d.type for d in devices))} tensors in {caller()}")
        far = devices == {CUDA}
        if far and name in ("numpy", "__array__"):
            raise AssertionError(f"{path} takes no cuda tensor in {caller()}")
        if kwargs.get("device") is not None:                                # a factory, such as torch.zeros
            far = torch.device(kwargs["device"]).type == "cuda"
            kwargs = kwargs | {"device": CPU if far else kwargs["device"]}
        copied = name == "copy_" and len(devices) > 1
        if copied or (far and self.waits_for_values(name, args)):
            self.waits.append(f"{name} in {caller()}")
        result = function(*args, **kwargs)
        if far:
            self.mark(result)
        return result

    def is_number(self, part: Tensor | Generator) -> bool:
        """Whether it is a CPU tensor without dimensions, which operations on a GPU take as a number."""
        return isinstance(part, Tensor) and part.dim() == 0 and self.device(part) == CPU

    def waits_for_values(self, name: str, args: tuple) -> bool:
        """Whether an operation on the device must know values: they are read, or decide the size of the result."""
        if name in ("__getitem__", "__setitem__"):
            return any(part.dtype == torch.bool for part in parts(args[1]))         # x[mask]
        return name in READ_VALUES | READ_A_SIZE | UPLOAD

    def move(self, name: str, tensor: Tensor, *args, **kwargs) -> Tensor:
        """tensor.to(..), .cuda() or .cpu(): a copy if the device changes. Only a non-blocking upload does not wait."""
        args = [self.device(value) if isinstance(value, Tensor) else value for value in args]       # x.to(y)
        if name != "to":
            args.insert(0, name)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        source = self.device(tensor)
        target = source if device is None else device
        if target.type == "cuda":
            target = CUDA
        result = tensor.to(dtype or tensor.dtype)
        if target != source:
            if target == CPU or not non_blocking:
                self.waits.append(f"to({target.type}) in {caller()}")
            result = result.clone() if result is tensor else result
        if target == CUDA:
            self.mark(result)
        return result


@contextmanager
def far_device() -> Iterator[Far]:
    """The context in which "cuda" is the pretended GPU."""
    resolve_name(torch.add)         # fills torch's table of names before the mode is active
    with warnings.catch_warnings(), patch.object(torch, "Generator", Generator), Far() as far:
        warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")
        warnings.filterwarnings("ignore", "PyTorch was compiled without cuDNN")
        yield far
