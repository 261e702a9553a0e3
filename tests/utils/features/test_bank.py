from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from models.backbone.extractor import FrozenExtractor
from utils.features.bank import FeatureBank

CPU = torch.device("cpu")


@dataclass
class Batch:
    indices: list[int]
    images: Tensor


class Loader:
    """Batches of `size` images in order; those at `missing` could not be read."""

    def __init__(self, images, size=4, missing=()):
        self.num_images = len(images)
        self.images, self.size, self.missing = images, size, missing
        self.at_once = size
        self.skipped = [(row, f"image {row} is unreadable") for row in missing]
        self.name = "numbers"

    def fingerprint(self):
        return {"images": self.name}

    def __iter__(self):
        for rows in torch.arange(self.num_images).split(self.size):
            kept = [row for row in rows.tolist() if row not in self.missing]
            if kept:
                yield Batch(kept, self.images[kept])


class Scaled:
    """An extractor whose two stages are multiples of the image: 3 channels at 4 x 4 and at 2 x 2.

    Each image is one constant value, so that features tell which image they are of.
    """

    device = CPU
    channels, stage_channels = 6, (3, 3)
    assemble = staticmethod(FrozenExtractor.assemble)

    def __init__(self, factor=1.0):
        self.factor = factor
        self.num_seen = 0

    def fingerprint(self):
        return {"factor": self.factor, "backbone": "scaled"}

    def stage_maps(self, images):
        self.num_seen += len(images)
        maps = images.float() * self.factor
        return [maps, -maps[:, :, ::2, ::2]]


def numbered(count):
    """Images (count, 3, 4, 4) whose every pixel is the image's number."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)


def numbers(batches):
    """Which images the features are of; both stages must agree."""
    found = []
    for features in batches:
        assert features.shape[1:] == (6, 4, 4)
        assert features.dtype == torch.float32
        assert torch.equal(features[:, :3], -features[:, 3:])
        found += features[:, 0, 0, 0].int().tolist()
    return found


@pytest.fixture
def bank():
    return FeatureBank.extract(Scaled(), Loader(numbered(10)))


@pytest.mark.parametrize("pooled", [False, True])
def test_stored_features_are_those_of_the_extractor(pooled):
    extractor = FrozenExtractor("tf_efficientnet_lite0", (1, 2, 3), pool="mean" if pooled else None)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=generator)
    bank = FeatureBank.extract(extractor, Loader(images, size=5))
    (stored,) = bank.batches(5)
    exact = extractor(images)
    assert stored.shape == exact.shape
    assert bank.channels == extractor.channels == stored.shape[1]
    # Half precision rounds by at most 2^-11 of the value; resizing averages the roundings.
    sizes = extractor.assemble([m.abs() for m in extractor.stage_maps(images)])
    assert ((stored - exact).abs() <= 1.01 * 2**-11 * sizes + 2**-24).all()
    assert not torch.equal(stored, exact)
    # The stages are kept at their own resolution.
    sides = (1, 1, 1) if pooled else (16, 8, 4)
    assert [tuple(s.shape) for s in bank.stages] == [
        (5, side, side, channels) for side, channels in zip(sides, (24, 40, 112), strict=True)
    ]
    assert bank.nbytes == sum(2 * s.numel() for s in bank.stages)


def test_float32_features_are_stored_to_the_bit():
    extractor = FrozenExtractor("tf_efficientnet_lite0", (2, 3))
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    bank = FeatureBank.extract(extractor, Loader(images), dtype=torch.float32)
    (stored,) = bank.batches(3)
    assert torch.equal(stored, extractor(images))


def test_order_and_batch_sizes(bank):
    assert len(bank) == 10
    assert bank.indices == list(range(10))
    assert [len(features) for features in bank.batches(4)] == [4, 4, 2]
    assert numbers(bank.batches(4)) == numbers(bank.batches(100)) == list(range(10))


def test_shuffling_is_complete_and_follows_the_generator(bank):
    generator = torch.Generator().manual_seed(3)
    epochs = [numbers(bank.batches(4, generator=generator)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
        assert epoch != list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]
    again = torch.Generator().manual_seed(3)
    torch.rand(5)  # the global generator has no say
    assert [numbers(bank.batches(4, generator=again)) for _ in range(3)] == epochs
    assert numbers(bank.batches(3, generator=torch.Generator().manual_seed(3))) == epochs[0]


def test_subset_is_a_view_in_the_order_asked_for(bank):
    subset = bank.subset([7, 2, 5])
    assert (len(subset), subset.indices, subset.channels) == (3, [7, 2, 5], 6)
    assert numbers(subset.batches(2)) == [7, 2, 5]
    assert subset.stages[0].data_ptr() == bank.stages[0].data_ptr()
    assert numbers(subset.subset([2, 0]).batches(2)) == [5, 7]
    assert subset.subset([2, 0]).indices == [5, 7]
    shuffled = numbers(subset.batches(2, generator=torch.Generator().manual_seed(0)))
    assert sorted(shuffled) == [2, 5, 7]
    assert numbers(bank.batches(4)) == list(range(10))


def test_other_dtypes_have_other_ranges():
    bank = FeatureBank.extract(Scaled(1e5), Loader(numbered(4)), dtype=torch.float32)
    (features,) = bank.batches(4)
    assert features.max().item() == 3e5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("store", "place"), [("auto", "cuda"), ("device", "cuda"), ("host", "cpu")]
)
def test_stores_on_a_gpu(store, place):
    extractor = Scaled()
    extractor.device = torch.device("cuda")
    bank = FeatureBank.extract(extractor, Loader(numbered(4)), store=store)
    assert bank.stages[0].device.type == place
    assert next(bank.batches(2)).device.type == "cuda"
