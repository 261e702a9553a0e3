"""The most memory that a piece of work takes."""

import numpy as np
import psutil
import pytest
import torch

from utils.device import return_freed_memory
from utils.memory import peak_memory

SIZE = 400_000_000


def test_what_is_freed_before_the_end_is_counted():
    return_freed_memory()  # of other tests: the block would lie in it, and take nothing more
    before = psutil.Process().memory_info().rss
    with peak_memory(torch.device("cpu")) as peak:
        block = np.ones(SIZE, dtype=np.uint8)
        assert block[-1] == 1
        del block
    assert peak.num_bytes > before + 0.9 * SIZE


def test_it_is_told_where_the_work_fails_too():
    with pytest.raises(ValueError, match="too much"), peak_memory(torch.device("cpu")) as peak:
        raise ValueError("too much")
    assert peak.num_bytes > 0


def test_what_ran_before_is_given_back():
    block = torch.ones(SIZE, dtype=torch.uint8)
    used = psutil.Process().memory_info().rss
    del block
    return_freed_memory()
    assert psutil.Process().memory_info().rss < used - 0.9 * SIZE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_what_tensors_take():
    device = torch.device("cuda")
    torch.ones(SIZE, dtype=torch.uint8, device=device)  # before: does not count
    kept = torch.cuda.memory_allocated(device)
    with peak_memory(device) as peak:
        torch.ones(SIZE // 2, dtype=torch.uint8, device=device)
    assert SIZE // 2 <= peak.num_bytes - kept < SIZE
