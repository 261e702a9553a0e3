"""Random numbers on a device that follow from a CPU generator."""

import torch


def derived(generator: torch.Generator, device: torch.device | str) -> torch.Generator:
    """Return a generator on a device, seeded by one draw of a CPU generator.

    A step that draws from it costs no copy from the host, and whatever else the CPU generator
    draws, as the order of the images, stays the same however much is drawn.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)
