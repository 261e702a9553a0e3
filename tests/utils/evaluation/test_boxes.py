"""Images that are no squares, padded: what lies in the margins counts nowhere."""

import pytest
import torch

from configs.tiles import Tiling
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


class Places(FirstChannel):
    """Tells as norm which position is looked at."""

    objective = torch.ones(1)

    def geometry(self, _, maps):
        places = maps.flatten(1).argmax(1).float()
        return places, -places


@pytest.mark.parametrize("map_size", [6, 12])
def test_norm_and_angle_are_of_the_highest_position_inside(bank, map_size):
    bank.boxes = BOXES * map_size // 6
    bank.stages[0][0, 0, 0, 0] = 100  # in a margin
    scores = score_all(Places(), bank, Scoring(map_size), geometry=True)
    for place, whole, (top, left, h, w) in zip(
        scores.norms, bank.stages[0][..., 0], BOXES.tolist(), strict=True
    ):
        row, column = divmod(int(place), 6)
        assert top <= row < top + h
        assert left <= column < left + w
        assert whole[row, column] == whole[top : top + h, left : left + w].max()


def test_of_windows_it_is_the_highest_position_that_sees_the_image():
    """Two windows a side of 8 pixels overlap by 4 of 12; the image has the lowest two rows."""
    maps = torch.rand(1, 1, 4 * 4, 4, generator=seeded(0))  # four windows below each other
    bank = bank_of(maps)
    bank.boxes = torch.tensor([[10, 0, 2, 12]])
    tiling = Tiling(12, 8, 2)
    scores = score_all(Places(), bank, Scoring(12, tiling=tiling), geometry=True)
    windows = maps.reshape(4, 4, 4)
    lower = windows[2:, 3]  # rows 10 and 11 are seen by the lower windows' last positions
    window, column = divmod(int(lower.argmax()), 4)
    assert int(scores.norms[0]) == 3 * 4 + column
    assert windows[2 + window, 3, column] == lower.max()


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
