import torch

from models.backbone.extractor import FrozenExtractor
from models.backbone.raw_images import RawImages
from utils.features.bank import FeatureBank


class Loader:
    def __init__(self, images):
        self.images = images
        self.num_images = len(images)
        self.at_once = 2
        self.skipped = ()

    def __iter__(self):
        for start in range(0, len(self.images), 2):
            rows = range(start, min(start + 2, len(self.images)))
            yield type("Batch", (), {"indices": list(rows), "images": self.images[list(rows)]})


def test_a_bank_of_images_gives_back_the_images():
    images = torch.arange(5 * 3 * 4 * 4).remainder(256).to(torch.uint8).reshape(5, 3, 4, 4)
    source = RawImages(None)
    assert source.stage_channels == (3,)
    assert not source.random_weights
    bank = FeatureBank.extract(source, Loader(images))
    assert bank.channels == 3
    assert bank.nbytes == images.numel()
    stored = torch.cat(list(bank.batches(2)))
    assert stored.dtype == torch.uint8
    assert torch.equal(stored, images)
    chosen = torch.cat(list(bank.subset([3, 1]).batches(8)))
    assert torch.equal(chosen, images[[3, 1]])
    assert list(source.state_dict()) == []


def test_features_come_before_the_images_where_both_are_taken():
    torch.manual_seed(0)
    backbone = FrozenExtractor("test_resnet", (1, 2), weights="random")
    source = RawImages(backbone, backbone)
    assert source.stage_channels == (*backbone.stage_channels, 3)
    assert source.channels == backbone.channels
    assert source.random_weights
    assert source.weights_digest == backbone.weights_digest
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    *maps, last = source.stage_maps(images)
    assert torch.equal(last, images)
    for found, expected in zip(maps, backbone.stage_maps(images), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(source.assemble([*maps, last]), backbone.assemble(maps))


def test_what_is_stored_of_both_is_not_taken_for_the_features_alone():
    backbone = FrozenExtractor("test_resnet", (1, 2), weights="random")
    prints = [
        RawImages(None).fingerprint(),
        RawImages(backbone).fingerprint(),
        RawImages(backbone, backbone).fingerprint(),
        backbone.fingerprint(),
    ]
    assert prints[0] == prints[1] == {}  # images depend on no backbone
    assert prints[2].items() > prints[3].items()
