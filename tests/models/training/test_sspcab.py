import pytest
import torch
import torch.nn.functional as F

from models.training.networks.sspcab import Sspcab
from tests.models.banks import seeded

SIZES = [(1, 0), (1, 1), (2, 1), (1, 3)]


def built(kernel=1, dilation=1, channels=3):
    torch.manual_seed(2)
    return Sspcab(channels, kernel=kernel, dilation=dilation, reduction=2)


@pytest.mark.parametrize(("kernel", "dilation"), SIZES)
@pytest.mark.parametrize("place", [(4, 5), (0, 0), (8, 3)])
def test_a_position_is_predicted_without_itself_from_four_corners_around(kernel, dilation, place):
    block, (y, x) = built(kernel, dilation), place
    features = torch.randn(1, 3, 9, 9, generator=seeded()).requires_grad_()
    predicted = block.predict(features)
    assert predicted.shape == features.shape
    # Of the sums before the ReLU, which would hide what a negative one sees.
    changed = features.detach().clone()
    changed[0, :, y, x] += 5
    assert torch.equal(block.predict(changed)[0, :, y, x], predicted[0, :, y, x])
    near, far = dilation + 1, dilation + kernel
    seen = {
        (y + a * i, x + b * j)
        for i in range(near, far + 1)
        for j in range(near, far + 1)
        for a in (-1, 1)
        for b in (-1, 1)
    }
    block.excitation = torch.nn.Identity()
    with torch.no_grad():
        for corner in block.corners:
            corner.weight.abs_()
            corner.bias.fill_(1)
    (slope,) = torch.autograd.grad(block.predict(features.abs())[0, :, y, x].sum(), features)
    found = {(int(i), int(j)) for _, _, i, j in slope.nonzero()}
    assert found == {(i, j) for i, j in seen if 0 <= i < 9 and 0 <= j < 9}


@pytest.mark.parametrize(("kernel", "dilation"), SIZES)
def test_predictions_are_those_of_one_large_masked_kernel(kernel, dilation):
    block = built(kernel, dilation)
    side = 2 * kernel + 2 * dilation + 1
    whole = torch.zeros(3, 3, side, side)
    top, bottom = slice(0, kernel), slice(side - kernel, side)
    places = [(top, top), (bottom, top), (top, bottom), (bottom, bottom)]
    for corner, (rows, columns) in zip(block.corners, places, strict=True):
        whole[:, :, rows, columns] = corner.weight.detach()
    bias = torch.stack([corner.bias for corner in block.corners]).sum(dim=0)
    features = torch.randn(2, 3, 7, 6, generator=seeded())
    wanted = F.relu(F.conv2d(features, whole, bias, padding=side // 2))
    torch.testing.assert_close(block.predict(features), wanted)


def test_channels_are_weighted_by_what_all_are_on_average():
    block = built()
    features = torch.randn(2, 3, 5, 5, generator=seeded())
    predicted = block.predict(features)
    first, _, second, _ = block.excitation
    hidden = F.relu(F.linear(predicted.mean(dim=(2, 3)), first.weight, first.bias))
    weights = torch.sigmoid(F.linear(hidden, second.weight, second.bias))
    assert hidden.shape == (2, 1)
    torch.testing.assert_close(block(features), predicted * weights[:, :, None, None])


def test_a_single_position_has_nothing_around_it():
    block = built()
    one, other = (torch.randn(1, 3, 1, 1, generator=seeded(seed)) for seed in (1, 2))
    assert torch.equal(block(one), block(other))
