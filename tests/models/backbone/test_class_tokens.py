import json

import pytest
import torch

from models.backbone.extractor import FrozenExtractor
from models.building import build_extractor
from models.errors import ModelError
from models.method import find_method
from tests.models.banks import draw_images, seeded


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("test_vit", (0, 2)),
        ("vit_small_patch14_reg4_dinov2.lvd142m", (11,)),
        ("vit_small_patch16_dinov3.lvd1689m", (3, 11)),
        ("vit_base_patch32_clip_224.openai", (1,)),
    ],
)
def test_the_pooled_feature_is_the_class_token(backbone, layers):
    torch.manual_seed(0)
    extractor = FrozenExtractor(backbone, layers, weights="random", pool="class_token")
    model = extractor.net.net.model
    (patch,) = set(model.patch_embed.patch_size)
    images = torch.randint(256, (2, 3, 4 * patch, 4 * patch), generator=seeded(0)).byte()
    tokens = {}
    for layer in layers:
        model.blocks[layer].register_forward_hook(
            lambda *given, layer=layer: tokens.update({layer: given[2]})
        )
    found = extractor.stage_maps(images)
    assert len(found) == len(layers)
    for one, layer in zip(found, layers, strict=True):
        assert one.shape == (2, model.embed_dim, 1, 1)
        torch.testing.assert_close(one[..., 0, 0], tokens[layer][:, 0])
    assert extractor.assemble(found).shape == (2, extractor.channels, 1, 1)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit2", "swin_tiny_patch4_window7_224"])
def test_a_backbone_without_one_says_so(backbone):
    with pytest.raises(ModelError, match=f"{backbone} has no class token: use --pool mean"):
        FrozenExtractor(backbone, (1,), weights="random", pool="class_token")


def test_tokens_are_other_features_than_averages():
    def built(pool):
        torch.manual_seed(0)
        return build_extractor(find_method("knn"), "test_vit", (1, 2), weights="random", pool=pool)

    mean, token = built("mean"), built("class_token")
    assert json.dumps(mean.fingerprint()) != json.dumps(token.fingerprint())
    assert mean.weights_digest == token.weights_digest
    images = draw_images(2)
    assert not torch.equal(mean(images), token(images))
