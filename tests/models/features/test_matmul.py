"""Products by convolution, on one thread and several, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.features import matmul as products
from models.features.matmul import (
    FEW_ROWS,
    Linear,
    add_product,
    at_once,
    fp32_settings,
    full_precision,
    linear,
    set_fp32,
)
from tests.models.banks import seeded
from tests.threads import torch_threads


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    with torch_threads(request.param):
        yield request.param


@pytest.fixture
def convolutions(monkeypatch):
    """Counts convolutions; fails where PyTorch has not both libraries, and they never run."""
    counted = []

    def counting(function):
        def call(*args, **kwargs):
            counted.append(function.__name__)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(products.F, "conv2d", counting(F.conv2d))
    monkeypatch.setattr(products, "conv2d_weight", counting(products.conv2d_weight))
    return counted


def both_libraries():
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("num_rows", [0, 1, FEW_ROWS - 16, FEW_ROWS, FEW_ROWS + 1, 2000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_those_of_float64(num_rows, with_bias, convolutions, threads):
    rows, weight = drawn(num_rows, 152), drawn(154, 153)[:, :-1]
    bias = drawn(154) if with_bias else None
    product = linear(rows, weight, bias)
    exact = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product.double(), exact, rtol=1e-6, atol=1e-4)
    assert product.is_contiguous()
    expected = num_rows >= FEW_ROWS and (threads > 1 or num_rows % 16 == 0)
    assert bool(convolutions) == (expected and both_libraries())


def test_rows_need_not_be_contiguous(convolutions):
    rows = drawn(8, 1024)
    weight = drawn(5, 8)
    torch.testing.assert_close(linear(rows.T, weight), rows.T @ weight.T)
    wide = drawn(1024, 11)[:, 2:10]
    torch.testing.assert_close(linear(wide, weight), wide @ weight.T)
    assert len(convolutions) == 2 * both_libraries()


@pytest.mark.parametrize("num_rows", [3, 4096])
def test_outer_products_are_added_in_place(num_rows, convolutions):
    left, right = drawn(num_rows, 20), drawn(num_rows, 30)
    sums = torch.ones(20, 50)
    add_product(sums[:, 10:40], left, right)
    expected = torch.ones(20, 50, dtype=torch.float64)
    expected[:, 10:40] += left.double().T @ right.double()
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-3)
    assert len(convolutions) == (num_rows == 4096) * both_libraries()


def test_a_layer_has_the_gradients_of_pytorchs_own(convolutions):
    own, theirs = Linear(40, 24), nn.Linear(40, 24)
    theirs.load_state_dict(own.state_dict())
    rows = drawn(1024, 40)
    found = []
    for layer in (own, theirs):
        inputs = rows.clone().requires_grad_()
        layer(inputs).tanh().sum().backward()
        found.append((layer.weight.grad, layer.bias.grad, inputs.grad))
    assert len(convolutions) == both_libraries()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_float64_stays_exact(convolutions):
    rows, weight = drawn(1024, 30, dtype=torch.float64), drawn(7, 30, dtype=torch.float64)
    assert torch.equal(linear(rows, weight), F.linear(rows, weight))
    assert convolutions == []


def test_exported_graphs_do_not_depend_on_the_number_of_rows(convolutions):
    rows = torch.export.Dim("rows", min=2, max=100_000)
    layer = Linear(8, 3)
    program = torch.export.export(
        layer, (drawn(1024, 8),), dynamic_shapes={"rows": {0: rows}}
    ).module()
    assert convolutions == []
    few = drawn(5, 8)
    torch.testing.assert_close(program(few), layer(few))


def precisions():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return (torch.get_float32_matmul_precision(),)
    onednn = torch.backends.mkldnn
    settings = torch.backends.cuda.matmul, onednn.matmul, onednn.conv
    return tuple(setting.fp32_precision for setting in settings)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_reduced_precision_is_off_inside_and_back_outside(setting):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        outside = precisions()
        with full_precision(torch.device("cpu")):
            assert set(precisions()) <= {"ieee", "highest"}
        assert precisions() == outside
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def test_convolutions_may_not_take_bfloat16_either():
    """Products of many rows are convolutions."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has no such setting")
    setting = torch.backends.mkldnn.conv
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "bf16"
        with full_precision(torch.device("cpu")):
            assert setting.fp32_precision == "ieee"
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before


def test_cuda_computes_float32_as_it_is_told():
    """PyTorch itself begins with TF32 in convolutions."""
    before = fp32_settings()
    try:
        for mode in ("tf32", "ieee"):
            set_fp32(mode)
            assert fp32_settings() == [mode, mode]
            with full_precision(torch.device("cpu")):
                assert fp32_settings() == ["ieee", mode]  # products alone
            assert fp32_settings() == [mode, mode]
            # Raises where the older and the newer names contradict each other.
            assert torch.backends.cudnn.allow_tf32 == (mode == "tf32")
    finally:
        set_fp32("ieee")
        torch.backends.cudnn.allow_tf32 = before[1] == "tf32"


def test_only_a_gpu_computes_more_at_once_than_a_cpu():
    assert at_once(1024, torch.device("cpu")) == 1024
    assert at_once(1024, torch.device("cuda", 1)) > 1024
