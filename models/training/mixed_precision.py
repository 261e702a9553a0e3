"""Where heads train in bfloat16."""

import contextlib

import torch


def bfloat16_autocast(device: torch.device, *, wanted: bool) -> contextlib.AbstractContextManager:
    """Return bfloat16 autocast on CUDA devices that compute in it, and else no change.

    That is compute capability 8.0 and above. bfloat16 has the range of float32: no loss scaling.
    """
    if not wanted or device.type != "cuda":
        return contextlib.nullcontext()
    if torch.cuda.get_device_capability(device) < (8, 0):
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16)
