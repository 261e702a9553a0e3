import gc
import threading

import numpy as np
import pytest
import torch

from datasets.reading.loading import ArrayDataset, BatchLoader
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError
from datasets.synthetic import ImagesAt
from models.backbone.extractor import FrozenExtractor
from models.backbone.raw_images import RawImages
from tests.models.banks import seeded
from tests.utils.features.test_bank import Scaled, numbered, numbers
from utils.errors import UsageError
from utils.features import streamed as streamed_features
from utils.features.bank import FeatureBank
from utils.features.extraction import CACHES, extract_features
from utils.features.streamed import StreamedFeatures


class Images(ArrayDataset):
    """Images that note which of them were read; those at `missing` cannot be."""

    def __init__(self, images, missing=()):
        super().__init__(images, PairTransform(images.shape[1], None, "opencv_square"))
        self.missing = missing
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return (index, f"no image {index}") if index in self.missing else super().__getitem__(index)


def constant(count, missing=()):
    """Images of 4 x 4 pixels whose every pixel is the image's number."""
    return Images(numbered(count).permute(0, 2, 3, 1).contiguous().numpy(), missing)


def load(images, *, size=4, skip=False, workers=0):
    return BatchLoader(images, batch_size=size, workers=workers, skip_unreadable=skip)


def stream(images, extractor=None, **options):
    return StreamedFeatures.of(extractor or Scaled(), load(images, **options))


def stored(images, extractor=None, **options):
    return FeatureBank.extract(extractor or Scaled(), load(images, **options))


def assert_same_bits(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_a_reading_in_order_is_that_of_a_bank(batch_size, workers):
    images = constant(10)
    streamed, bank = stream(images, workers=workers), stored(images)
    assert (len(streamed), streamed.indices, streamed.channels) == (10, list(range(10)), 6)
    assert_same_bits(streamed.batches(batch_size), bank.batches(batch_size))
    pairs = zip(streamed.stage_batches(batch_size), bank.stage_batches(batch_size), strict=True)
    for found, expected in pairs:
        assert_same_bits(found, expected)


def test_epochs_are_shuffled_as_those_of_a_bank():
    images = constant(10)
    streamed, bank = stream(images), stored(images)
    ours, theirs = seeded(), seeded()
    before = torch.get_rng_state()
    for _ in range(3):
        assert_same_bits(streamed.batches(4, generator=ours), bank.batches(4, generator=theirs))
    assert torch.equal(torch.get_rng_state(), before), "the global generator has a say"


def test_nothing_is_read_before_it_is_asked_for_and_each_image_once_a_reading():
    images, extractor = constant(10), Scaled()
    streamed = stream(images, extractor)
    assert (images.read, extractor.num_seen, streamed.nbytes) == ([], 0, 0)
    for reading in (1, 2):
        assert numbers(streamed.batches(3)) == list(range(10))
        assert images.read == list(range(10)) * reading
        assert extractor.num_seen == 10 * reading
    images.read.clear()
    some = streamed.subset([7, 2, 5])
    assert images.read == []
    assert (len(some), some.indices, some.channels) == (3, [7, 2, 5], 6)
    assert numbers(some.batches(2)) == images.read == [7, 2, 5]
    again = some.subset(np.array([2, 0]))
    assert numbers(again.batches(1)) == again.indices == [5, 7]
    shuffled = some.batches(2, generator=seeded())
    assert_same_bits(shuffled, stored(images).subset([7, 2, 5]).batches(2, generator=seeded()))


def test_the_backbone_gets_batches_of_the_loaders_size():
    sizes = []

    class Watched(Scaled):
        def stage_maps(self, images):
            sizes.append(len(images))
            return super().stage_maps(images)

    streamed = stream(constant(10), Watched())
    for batch_size in (1, 4, 64):
        sizes.clear()
        list(streamed.batches(batch_size))
        assert sizes == [4, 4, 2]
    # Any other last batch is filled up: those of a bank had four images.
    for rows, expected in (([0, 1, 2, 3, 7], [4, 4]), ([9], [4]), ([8, 9], [2]), ([9, 8], [4])):
        sizes.clear()
        assert numbers(streamed.subset(rows).batches(2)) == rows
        assert sizes == expected
    sizes.clear()
    assert numbers(stream(constant(3), Watched()).subset([2, 0]).batches(2)) == [2, 0]
    assert sizes == [3]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_joined_features_are_those_of_joined_banks(seed):
    first, second = constant(10), constant(6)
    extractor = Scaled(2.0)
    ours = stream(first).subset([8, 1, 3]).join(stream(second, extractor))
    theirs = stored(first).subset([8, 1, 3]).join(stored(second, Scaled(2.0)))
    assert ours.indices == theirs.indices == list(range(9))
    for batch_size in (1, 2, 4, 20):
        generators = [None if seed is None else seeded(seed) for _ in range(2)]
        assert_same_bits(
            ours.batches(batch_size, generator=generators[0]),
            theirs.batches(batch_size, generator=generators[1]),
        )
    rows = [4, 0, 8, 2]
    assert_same_bits(ours.subset(rows).batches(3), theirs.subset(rows).batches(3))
    extractor.num_seen = 0
    list(ours.subset([0, 1]).batches(3))
    assert extractor.num_seen == 0, "images that were not asked for were read"
    three = ours.join(stream(first))
    assert numbers(three.subset([1, 9, 18]).batches(3)) == [1, 0, 9]


def test_some_images_of_a_data_set_keep_their_indices():
    some = ImagesAt(constant(10), [8, 1, 5])
    streamed, bank = stream(some), stored(some)
    assert streamed.indices == bank.indices == [8, 1, 5]
    assert numbers(streamed.subset([2, 0]).batches(4)) == [5, 8]


def test_unreadable_images_are_found_by_a_check_without_the_backbone():
    images, extractor = constant(10, missing=(0, 4, 5, 6, 7, 9)), Scaled()
    streamed = stream(images, extractor, skip=True)
    bank = stored(images, skip=True)
    assert images.read[:10] == list(range(10))
    assert extractor.num_seen == 0
    assert streamed.indices == bank.indices == [1, 2, 3, 8]
    assert streamed.skipped == bank.skipped == [f"no image {i}" for i in images.missing]
    assert streamed.extract_seconds > streamed.pass_seconds == 0
    images.read.clear()
    assert numbers(streamed.batches(3)) == numbers(bank.batches(3)) == [1, 2, 3, 8]
    assert images.read == [1, 2, 3, 8], "what cannot be read is not tried again"
    for features in (streamed, bank):  # rows of features are not positions in the data set
        last = features.subset([3])
        assert last.indices == numbers(last.batches(1)) == [8]
        assert last.skipped == features.skipped


def test_the_first_unreadable_image_stops_a_reading_with_the_message_of_a_bank():
    images = constant(10, missing=(6,))
    with pytest.raises(DataError, match=r"no image 6; pass --skip-unreadable") as of_bank:
        stored(images)
    batches = stream(images).batches(4)
    assert numbers([next(batches)]) == [0, 1, 2, 3]
    with pytest.raises(DataError) as of_stream:
        next(batches)
    assert str(of_stream.value) == str(of_bank.value)


@pytest.mark.parametrize("lost", [(3,), (4, 5, 6, 7), (9,), (0,), (8, 9)])
def test_an_image_that_is_lost_during_the_run_is_named(lost):
    images = constant(10)
    streamed = stream(images, skip=True)
    images.missing = lost
    message = rf"features: no image {lost[0]} \(it could be read before\)"
    with pytest.raises(UsageError, match=message):
        list(streamed.batches(4))


@pytest.mark.parametrize("features_of", [StreamedFeatures.of, FeatureBank.extract])
@pytest.mark.parametrize(
    ("count", "missing", "skip"), [(0, (), False), (0, (), True), (3, (0, 1, 2), True)]
)
def test_nothing_readable_is_named(features_of, count, missing, skip):
    loader = load(constant(count, missing), skip=skip)
    with pytest.raises(UsageError, match="wood: train features: not one image could be read"):
        features_of(Scaled(), loader, description="wood: train features")


@pytest.mark.parametrize("features_of", [StreamedFeatures.of, FeatureBank.extract])
@pytest.mark.parametrize("factor", [1e5, float("nan")])
def test_feature_beyond_the_range_is_named(features_of, factor):
    message = r"wood: a feature is not finite in torch\.float16"
    with pytest.raises(FloatingPointError, match=message):
        list(features_of(Scaled(factor), load(constant(4)), description="wood").batches(4))


def test_values_are_rounded_as_a_bank_stores_them():
    extractor = Scaled(1 / 3)
    (exact,) = StreamedFeatures.of(extractor, load(constant(4)), dtype=torch.float32).batches(4)
    (rounded,) = stream(constant(4), extractor).batches(4)
    assert not torch.equal(rounded, exact)
    assert torch.equal(rounded, exact.half().float())


def held_bytes():
    """Memory of all tensors in half precision, which only features are here."""
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.half]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("generator", [None, seeded()])
def test_memory_is_bounded_by_a_batch(generator):
    """Of the loader's, and of the reader's twice: as single images and joined."""
    per_image = 2 * 3 * (4 * 4 + 2 * 2)
    streamed = stream(constant(60)).join(stream(constant(40)))
    gc.collect()  # what earlier tests left
    before, most = held_bytes(), 0
    for features in streamed.batches(6, generator=generator):
        assert features.dtype == torch.float32
        most = max(most, held_bytes() - before)
    # Each of the two loaders has a batch of 4 in use; where one ends, a part of another's.
    assert 0 < most <= (2 * 4 + 4 + 2 * 6) * per_image
    assert most < 100 * per_image / 4
    assert held_bytes() == before


def test_a_reading_that_is_dropped_stops_its_threads():
    images = constant(200)
    batches = stream(images, workers=2).batches(1)
    assert numbers([next(batches)]) == [0]
    batches.close()
    assert len(images.read) < 20
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())


def test_each_reading_has_its_progress_bar(monkeypatch):
    bars = []

    class Bar(streamed_features.tqdm):
        def __init__(self, **options):
            assert options.pop("disable") is None
            assert options["leave"] is False
            super().__init__(**options, disable=False)
            bars.append(self)

    monkeypatch.setattr(streamed_features, "tqdm", Bar)
    loaders = [load(constant(count, missing=(1,)), skip=True) for count in (10, 6)]
    first, second = (
        StreamedFeatures.of(Scaled(), loader, description=name)
        for loader, name in zip(loaders, ("wood", "pasted"), strict=True)
    )
    joined = first.join(second)
    for _ in range(2):
        list(joined.batches(4))
    checks = [("wood: which can be read", 10, 9), ("pasted: which can be read", 6, 5)]
    readings = [("wood", 9, 9), ("pasted", 5, 5)]
    assert [(bar.desc, bar.total, bar.n) for bar in bars] == checks + 2 * readings
    assert not Bar._instances, "a bar was left open"


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    return Images(rng.integers(0, 256, (22, 64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("pooled", [False, True])
def test_features_of_a_backbone(photos, pooled):
    extractor = FrozenExtractor("tf_efficientnet_lite0", (1, 2, 3), pool="mean" if pooled else None)
    streamed, bank = (make(photos, extractor, size=8) for make in (stream, stored))
    assert streamed.channels == bank.channels == extractor.channels
    for batch_size in (1, 5, 8, 32):
        assert_same_bits(streamed.batches(batch_size), bank.batches(batch_size))
    some = torch.tensor([3, 15, 0, 8, 9, 10, 11, 12, 2, 1])  # of the bank's whole batches
    for seed in (0, 1):
        ours, theirs = (f.subset(some).batches(5, generator=seeded(seed)) for f in (streamed, bank))
        assert_same_bits(ours, theirs)
    # The size of a batch may change how the backbone rounds: 6 of 22 images have another here.
    ours, theirs = (
        torch.cat(list(features.batches(8, generator=seeded()))) for features in (streamed, bank)
    )
    assert (ours != theirs).float().mean() < 1e-3
    assert torch.allclose(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("make", [stream, stored])
def test_features_can_be_trained_on(photos, make):
    extractor = FrozenExtractor("tf_efficientnet_lite0", (1,))
    weight = torch.ones(24, requires_grad=True)
    for features in make(photos, extractor).batches(3):
        (features * weight[:, None, None]).sum().backward()
    assert (weight.grad != 0).any()


def test_images_for_methods_that_train_a_backbone_stay_images(photos):
    streamed, bank = (make(photos, RawImages(None)) for make in (stream, stored))
    assert streamed.channels == bank.channels == 3
    found = list(streamed.batches(5, generator=seeded()))
    assert {batch.dtype for batch in found} == {torch.uint8}
    assert_same_bits(found, bank.batches(5, generator=seeded()))


@pytest.mark.parametrize("cache", CACHES)
def test_all_caches_give_the_same(cache, tmp_path):
    images, extractor = constant(10), Scaled()
    features = extract_features(
        extractor, load(images), cache=cache, description="wood", folder=tmp_path
    )
    assert numbers(features.batches(4)) == numbers(features.batches(4)) == list(range(10))
    assert extractor.num_seen == (20 if cache == "none" else 10)
    assert bool(list(tmp_path.iterdir())) == (cache == "disk")
    assert (features.nbytes == 0) == (cache == "none")


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_unknown_cache_and_a_disk_without_a_folder_are_refused(cache):
    message = f"store '{cache}' is not one of auto, device, host, disk, or has no folder"
    with pytest.raises(ValueError, match=message):
        extract_features(Scaled(), load(constant(2)), cache=cache, description="wood")
