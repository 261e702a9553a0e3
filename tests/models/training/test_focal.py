import math

import pytest
import torch
import torch.nn.functional as F

from models.training.focal import focal_loss
from tests.models.banks import seeded


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 4.0])
def test_loss_is_that_of_each_pixel_by_hand(gamma):
    logits = torch.randn(2, 2, 3, 4, generator=seeded())
    masks = torch.rand(2, 3, 4, generator=seeded(1)) < 0.4
    total = 0.0
    for image in range(2):
        for y in range(3):
            for x in range(4):
                normal, anomalous = logits[image, :, y, x].tolist()
                p = 1 / (1 + math.exp(normal - anomalous))
                p = p if masks[image, y, x] else 1 - p
                total -= (1 - p) ** gamma * math.log(p)
    assert focal_loss(logits, masks, gamma=gamma).item() == pytest.approx(total / 24, rel=1e-5)


def test_without_focus_it_is_the_cross_entropy():
    logits = torch.randn(3, 2, 5, 5, generator=seeded())
    masks = torch.rand(3, 5, 5, generator=seeded(1)) < 0.5
    wanted = F.cross_entropy(logits, masks.long())
    torch.testing.assert_close(focal_loss(logits, masks, gamma=0.0), wanted)


def test_what_is_right_counts_for_nothing_and_what_is_wrong_stays_finite():
    logits = torch.tensor([-200.0, 200.0]).view(1, 2, 1, 1).requires_grad_()
    right, wrong = (focal_loss(logits, torch.tensor([[[m]]]), gamma=2.0) for m in (True, False))
    assert right.item() == 0
    assert wrong.item() == pytest.approx(400)
    for loss in (right, wrong):
        (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert slope.isfinite().all()
