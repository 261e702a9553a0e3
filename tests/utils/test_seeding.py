import random

import numpy as np
import torch

from utils.seeding import seed_everything


def draws(generator):
    return (
        random.random(),
        float(np.random.rand()),  # noqa: NPY002  the global state is what is seeded
        torch.rand(3).tolist(),
        torch.rand(3, generator=generator).tolist(),
    )


def test_one_seed_gives_every_generator_again():
    first, again, other = (draws(seed_everything(seed)) for seed in (4, 4, 5))
    assert first == again
    for one, two in zip(first, other, strict=True):
        assert one != two


def test_generator_is_its_own_and_lives_on_the_cpu():
    generator = seed_everything(4)
    expected = torch.rand(3, generator=generator)
    generator = seed_everything(4)
    assert generator.device.type == "cpu"
    torch.rand(10)
    assert torch.equal(torch.rand(3, generator=generator), expected)
