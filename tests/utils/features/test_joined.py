"""Several sets of features that are read as one."""

import pytest
import torch

from tests.models.banks import seeded
from tests.utils.features.test_streamed import constant, stored, stream
from utils.features.joined import JoinedFeatures, join_features

COUNTS = (5, 1, 7)


def parts_of(kind):
    return [kind(constant(count), size=4) for count in COUNTS]


def values(features, *arguments, **options):
    """The first channel of each image, which is its number in its own set."""
    batches = list(features.batches(*arguments, **options))
    return [len(batch) for batch in batches], torch.cat(batches)[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("kind", [stored, stream])
def test_images_come_one_set_after_another(kind):
    parts = parts_of(kind)
    whole = join_features(parts)
    assert len(whole) == sum(COUNTS)
    assert whole.indices == list(range(13))
    assert whole.channels == parts[0].channels
    expected = [value for part in parts for value in values(part, 3)[1]]
    assert values(whole, 4) == ([4, 4, 4, 1], expected)
    order = torch.randperm(13, generator=seeded(3))
    found = values(whole, 6, generator=seeded(3))
    assert found == ([6, 6, 1], [expected[i] for i in order])


@pytest.mark.parametrize("kind", [stored, stream])
def test_some_of_the_images_in_any_order(kind):
    whole = join_features(parts_of(kind))
    everything = values(whole, 13)[1]
    rows = [12, 0, 5, 6, 4]
    some = whole.subset(rows)
    assert values(some, 2)[1] == [everything[row] for row in rows]
    assert values(some.subset(torch.tensor([3, 1])), 2)[1] == [everything[6], everything[0]]
    twice = some.join(whole.subset([7]))
    assert values(twice, 4)[1] == [*(everything[row] for row in rows), everything[7]]


def test_a_batch_has_the_layout_and_bits_of_its_parts():
    parts = parts_of(stored)
    whole = join_features(parts)
    assert isinstance(whole, JoinedFeatures)
    (mixed,) = whole.stage_batches(13)
    (alone,) = parts[0].stage_batches(5)
    for stage, part in zip(mixed, alone, strict=True):
        assert stage.dtype == part.dtype
        assert stage.shape[1:] == part.shape[1:]
        assert stage.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(stage[:5], part)
    assert whole.nbytes == sum(part.nbytes for part in parts)
    assert whole.extract_seconds == sum(part.extract_seconds for part in parts)


def test_what_is_held_out_of_all_is_held_out_of_the_whole():
    parts = parts_of(stored)
    assert join_features(parts).held_out is None
    parts[0].held_out = stored(constant(2))
    assert join_features(parts).held_out is None
    parts[1].held_out, parts[2].held_out = stored(constant(3)), stored(constant(4))
    whole = join_features(parts)
    assert len(whole.held_out) == 2 + 3 + 4
    assert whole.subset([0, 1]).held_out is whole.held_out
    assert join_features(parts[:1]) is parts[0]
