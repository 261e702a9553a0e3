"""Images that are no squares, padded: what lies in the margins counts nowhere."""

import pytest
import torch

from models.detector import Detector
from tests.models.banks import seeded
from tests.utils.banks import bank_of, set_of
from utils.evaluation.scoring import Scoring, inside_boxes, score_all
from utils.features.joined import join_features

BOXES = torch.tensor([[1, 0, 4, 6], [0, 2, 6, 3], [0, 0, 6, 6], [2, 0, 2, 6]])
LABELS = [0, 1, 1, 0]


class FirstChannel(Detector):
    def forward(self, features):
        return features[:, 0]


@pytest.fixture
def bank():
    bank = bank_of(torch.rand(4, 1, 6, 6, generator=seeded(0)))
    bank.boxes = BOXES
    return bank


def cut_out(maps):
    """The pixels of each image that lie in its box."""
    return [m[t : t + h, left : left + w] for m, (t, left, h, w) in zip(maps, BOXES, strict=True)]


def test_boxes_become_pixels():
    inside = inside_boxes(BOXES, 6)
    assert inside.sum((1, 2)).tolist() == [24, 18, 36, 12]
    assert inside[1, :, 2:5].all()
    assert torch.equal(inside_boxes(BOXES, 6, 2), inside[:, ::2, ::2])


def test_a_score_is_the_maximum_inside(bank):
    raw = bank.stages[0][..., 0].clone()
    raw[0, 0, 0] = 100  # in a margin
    bank.stages[0][0, 0, 0, 0] = 100
    scores = score_all(FirstChannel(), bank, Scoring(6))
    expected = [part.max() for part in cut_out(raw)]
    assert scores.images.tolist() == pytest.approx([float(v) for v in expected])
    for found, part in zip(scores.maps, cut_out(raw), strict=True):
        assert found.min() == part.min()
        assert found.max() == part.max()


def test_pixel_metrics_are_of_the_pixels_inside(bank):
    masks = torch.zeros(4, 6, 6, dtype=torch.bool)
    masks[1, 1:3, 3], masks[2, 4, 1:5] = True, True
    test = set_of(bank, LABELS, masks=masks, map_size=6)
    scores = test.score(FirstChannel())
    values = test.measure(scores).values
    pixels = torch.cat([part.flatten() for part in cut_out(scores.maps)])
    truth = torch.cat([part.flatten() for part in cut_out(masks)])
    above = (pixels[truth][:, None] > pixels[~truth]).double()
    above += (pixels[truth][:, None] == pixels[~truth]).double() / 2
    assert values["pixel_auroc"] == pytest.approx(above.mean().item())
    assert test.aurocs(scores)[1] == pytest.approx(values["pixel_auroc"])
    everywhere = set_of(
        bank_of(bank.stages[0].permute(0, 3, 1, 2)), LABELS, masks=masks, map_size=6
    )
    other = everywhere.measure(everywhere.score(FirstChannel())).values
    assert other["pixel_auroc"] != values["pixel_auroc"]
    assert 0 <= values["aupro"] <= 1


def test_boxes_go_with_their_images(bank):
    assert torch.equal(bank.subset([3, 1]).boxes, BOXES[[3, 1]])
    assert torch.equal(bank.subset([3]).join(bank.subset([0, 1])).boxes, BOXES[[3, 0, 1]])
    both = join_features([bank, bank.subset([2])])
    assert torch.equal(both.subset([4, 0]).boxes, BOXES[[2, 0]])
    plain = bank_of(torch.zeros(2, 1, 6, 6))
    assert plain.subset([0]).boxes is None
    assert join_features([plain, plain]).boxes is None
