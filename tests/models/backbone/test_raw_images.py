import torch

from models.backbone.raw_images import RawImages
from utils.features.bank import FeatureBank


class Loader:
    def __init__(self, images):
        self.images = images
        self.num_images = len(images)
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
