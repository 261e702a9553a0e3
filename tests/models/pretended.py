"""A CUDA device that any machine has: tensors in main memory that say they are on a GPU.

What a GPU would refuse is refused: an operation on tensors of two devices, random numbers of one
device drawn by a generator of the other. What makes a host wait for its GPU is noted, and goes on.
The numbers are real, so what only runs on a GPU is run and can be compared.

For PyTorch itself the tensors are on "meta", which needs no driver; only `Tensor.device` says
"cuda". So C++ does not choose what it would for CUDA (cuDNN, fused attention): no kernel of a GPU
is tested here.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.__future__ import set_overwrite_module_params_on_conversion
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from models.training import generators

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda", 0)
READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "_linalg_check_errors"),
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
}
"""Operations whose result, or its size, the host must know."""
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}
TO_HOST, TO_DEVICE = "copy to the host", "copy to the device"


@dataclass(frozen=True)
class Wait:
    """Something for which the host waits until the device has done all it was given.

    Attributes:
        what: the operation.
        places: the suite's functions that were running, "file:function", innermost first.
    """

    what: str
    places: tuple[str, ...]

    def is_in(self, place):
        """Whether a file or function, "file" or "file:function", was running."""
        return any(one == place or one.startswith(f"{place}:") for one in self.places)


class OnDevice(Tensor):
    """A tensor on the device; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device="meta",
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self, **options):
        return f"OnDevice({self.held})"

    @property
    def device(self):
        return DEVICE

    @property
    def is_cuda(self):
        return True

    @property
    def is_meta(self):
        return False

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("an array of a tensor on a GPU: .cpu() first")

    def __array__(self, *options):
        return self.numpy()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # What functions in Python return is of this class only where an operation made it so.
        return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError(f"{operation} after the device was there")


class Device(TorchDispatchMode):
    """Runs operations on such tensors.

    Attributes:
        waits: what the host waited for.
    """

    def __init__(self):
        super().__init__()
        self.waits = []
        self._generators = []

    def generator(self, device):
        """Make a generator, as `torch.Generator` does."""
        made = torch.Generator()
        if torch.device(device).type == "cuda":
            self._generators.append(made)
        return made

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = operation._schema.name.removeprefix("aten::")
        leaves = tree_leaves((args, kwargs))
        there = [one for one in leaves if isinstance(one, OnDevice)]
        here = [one for one in leaves if isinstance(one, Tensor) and not isinstance(one, OnDevice)]
        is_there = bool(there)
        if kwargs.get("device") is not None:
            is_there = torch.device(kwargs["device"]).type != "cpu"
            kwargs["device"] = torch.device("cpu")
        if name == "copy_" or name in INDEXING:
            is_there = isinstance(args[0], OnDevice)
        if name not in COPIES:
            self._check_devices(operation, name, args, there, here)
        self._check_generators(operation, leaves, is_there)
        what = self._wait(name, args, kwargs, there, is_there)
        if what is not None:
            self.waits.append(Wait(what, places()))
        wrapped = {id(one.held): one for one in there}
        bare = tree_map(lambda one: one.held if isinstance(one, OnDevice) else one, (args, kwargs))
        with torch._C._DisableTorchDispatch():
            found = operation(*bare[0], **bare[1])
            if there and torch.Tag.inplace_view in operation.tags:
                operation(*args, **kwargs)  # the shape that PyTorch sees

        def wrap(one):
            if not isinstance(one, Tensor):
                return one
            known = wrapped.get(id(one))
            return OnDevice(one) if known is None and is_there else one if known is None else known

        return args[0] if name == "copy_" else tree_map(wrap, found)

    @staticmethod
    def _check_devices(operation, name, args, there, here):
        # A GPU takes single numbers and indices from the host, but writes none of these.
        first = args[0] if args else None
        changed = first if name.endswith("_") or name in INDEXING else None
        mixed = any(one.ndim for one in here) if name not in INDEXING else False
        if there and (mixed or any(one is changed for one in here)):
            shapes = [(str(one.device), tuple(one.shape)) for one in [*there, *here]]
            raise RuntimeError(f"{operation} of tensors on two devices: {shapes}")

    def _check_generators(self, operation, leaves, is_there):
        # The objects differ that stand for one generator.
        ours = {one._cdata for one in self._generators}
        given = [one for one in leaves if isinstance(one, torch.Generator)]
        if any((one._cdata in ours) != is_there for one in given):
            raise RuntimeError(f"{operation} draws on one device by a generator of another")

    @staticmethod
    def _wait(name, args, kwargs, there, is_there):
        if name in COPIES:
            source = args[1] if name == "copy_" else args[0]
            blocks = not kwargs.get("non_blocking") and not (name == "copy_" and any(args[2:]))
            if isinstance(source, OnDevice) == is_there or (is_there and not blocks):
                return None
            # To the host a copy is waited for in any case: the next line may read it.
            return TO_DEVICE if is_there else TO_HOST
        if name in INDEXING and is_there:
            if any(one is not None and not isinstance(one, OnDevice) for one in args[1]):
                return TO_DEVICE
            masks = [one for one in args[1] if one is not None and one.dtype == torch.bool]
            # One number at the places of a mask needs no list of them.
            fills = name not in {"index", "_unsafe_index"} and args[2].numel() == 1
            return "index by a mask" if masks and not fills else None
        if name == "repeat_interleave" and kwargs.get("output_size") is None and there:
            return name
        return name if name in READS and there else None


def places():
    """The suite's functions that are running, "file:function", innermost first."""
    found, frame = [], sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "models") or file.is_relative_to(ROOT / "utils"):
            found.append(f"{file.relative_to(ROOT).as_posix()}:{frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(found)


@contextlib.contextmanager
def pretended_device(monkeypatch):
    """Let "cuda" be such a device within the block, which it gives."""
    device = Device()
    lifts = torch._C._only_lift_cpu_tensors()
    with monkeypatch.context() as patch:
        drawing = SimpleNamespace(Generator=device.generator, randint=torch.randint)
        patch.setattr(generators, "torch", drawing)
        # Beneath a fake mode PyTorch does not look for a driver.
        with FakeTensorMode(allow_non_fake_inputs=True), device:
            torch._C._set_only_lift_cpu_tensors(True)
            try:
                yield device
            finally:
                torch._C._set_only_lift_cpu_tensors(lifts)


def moved(module):
    """A module, all of which is put on the device."""
    set_overwrite_module_params_on_conversion(True)
    try:
        return module.to("cuda") if isinstance(module, nn.Module) else module
    finally:
        set_overwrite_module_params_on_conversion(False)


class BankOn:
    """A bank of tests, whose features are read on a device, without a wait for the copy."""

    held_out = None

    def __init__(self, device, bank):
        self.device, self.bank, self.channels = device, bank, bank.channels

    def __len__(self):
        return len(self.bank)

    def subset(self, rows):
        return BankOn(self.device, self.bank.subset(rows))

    def batches(self, batch_size, *, generator=None):
        for one in self.bank.batches(batch_size, generator=generator):
            yield one.to(self.device, non_blocking=True)

    def stage_batches(self, batch_size, *, generator=None):
        for stages in self.bank.stage_batches(batch_size, generator=generator):
            yield [one.to(self.device, non_blocking=True) for one in stages]
