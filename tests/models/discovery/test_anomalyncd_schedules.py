"""What changes from epoch to epoch, which pieces make a batch, and which options are refused."""

import dataclasses

import pytest
import torch

from configs.anomalyncd import AnomalyNcdOptions
from models.discovery.anomalyncd.sampling import draw_epoch
from models.discovery.anomalyncd.schedules import learning_rates, teacher_temperatures


def temperatures(warmup, repeats, epochs):
    return teacher_temperatures(0.07, 0.04, warmup=warmup, repeats=repeats, epochs=epochs)


def test_the_teacher_of_the_released_configuration():
    expected = [0.07, 0.06667, 0.06333, 0.06, 0.05667, 0.05333, 0.05, 0.04667, 0.04333, 0.04]
    found = temperatures(40, 4, 50)
    assert found[:40] == pytest.approx([value for value in expected for _ in range(4)], abs=5e-6)
    assert found[40:] == [0.04] * 10


def test_a_warmup_that_is_no_multiple_has_a_shorter_last_step():
    assert temperatures(5, 2, 7) == pytest.approx([0.07, 0.07, 0.055, 0.055, 0.04, 0.04, 0.04])
    assert len(temperatures(30, 4, 50)) == 50
    assert temperatures(0, 4, 3) == [0.04] * 3
    assert temperatures(3, 4, 3) == [0.07] * 3


def test_learning_rates_fall_along_a_cosine():
    found = learning_rates(0.003, 50)
    assert found[0] == 0.003
    assert found[25] == pytest.approx((0.003 + 3e-6) / 2)
    assert found[-1] == pytest.approx(3e-6 + 0.5 * (0.003 - 3e-6) * (1 - 0.99802673), rel=1e-6)
    assert found == sorted(found, reverse=True)


def test_every_batch_has_both_sorts_of_pieces():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        draws = draw_epoch(9, 4, 2, generator)
        assert [len(d.labelled) + len(d.unlabelled) for d in draws] == [2] * 6  # 13 = 6 * 2 + 1
        assert all(len(d.labelled) == len(d.unlabelled) == 1 for d in draws)
    assert [len(d.labelled) + len(d.unlabelled) for d in draw_epoch(9, 4, 5, generator)] == [
        5,
        5,
        3,
    ]
    assert len(draw_epoch(1, 1, 32, generator)) == 1


def test_half_of_what_is_drawn_has_labels_however_many_there_are():
    draws = draw_epoch(1278, 128, 32, torch.Generator().manual_seed(1))
    labelled = torch.cat([d.labelled for d in draws])
    unlabelled = torch.cat([d.unlabelled for d in draws])
    assert len(draws) == 44
    assert len(labelled) + len(unlabelled) == 1278 + 128
    assert 0.46 < len(labelled) / 1406 < 0.54
    assert labelled.max() > 1200
    assert labelled.unique().numel() < len(labelled) < 1278  # with replacement
    assert unlabelled.min() == 0
    assert unlabelled.max() == 127
    again = draw_epoch(1278, 128, 32, torch.Generator().manual_seed(1))
    assert all(torch.equal(a.labelled, b.labelled) for a, b in zip(draws, again, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 1}, r"--method.batch-size 1 must be at least 2"),
        ({"epochs": 10}, r"--method.warmup-epochs 40 is more than --method.epochs 10"),
        ({"image_size": 288}, r"--method.image-size 288 is larger than --method.resize 256"),
        ({"stored_views": 1}, r"--method.stored-views 1 must be 0, or 2 or above"),
        ({"sup_weight": 1.0}, r"--method.sup-weight 1.0 must be at least 0 and below 1"),
        ({"anomaly_threshold": 2.0}, r"--method.anomaly-threshold 2.0 must be in 0 to 1"),
        ({"trained_blocks": 0}, r"--method.trained-blocks 0 must be above 0"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(AnomalyNcdOptions(), **changes)


def test_options_are_the_released_ones():
    options = AnomalyNcdOptions()
    assert (options.resize, options.image_size, options.mask_layers) == (256, 224, 9)
    assert (options.sup_weight, options.entropy_weight, options.weight_decay) == (0.3, 4, 5e-5)
    assert AnomalyNcdOptions(epochs=1, warmup_epochs=0, anomaly_threshold=None).epochs == 1
