"""Attention that a mask guides, against timm's own blocks with a mask of all pairs."""

import pytest
import timm
import torch
from einops import rearrange
from safetensors.torch import save_file
from timm.models.vision_transformer import Attention, Block

from models.discovery.anomalyncd.mgvit import MaskGuidedViT, guided
from models.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:RANDOM BACKBONE WEIGHTS")
SIZE = 64


@pytest.fixture(scope="module")
def whole_vit():
    """timm's network with a classifier, far enough from its start that masks matter."""
    torch.manual_seed(3)
    net = timm.create_model("test_vit", pretrained=False, num_classes=7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture(scope="module")
def weights_file(whole_vit, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(whole_vit.state_dict(), path)
    return path


def build(weights="random", *, mask_layers=4, trained_blocks=1, size=SIZE):
    return MaskGuidedViT(
        "test_vit", str(weights), size, mask_layers=mask_layers, trained_blocks=trained_blocks
    )


def shown(count=3, size=SIZE, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    squares = torch.rand(count, 1, size // 8, size // 8, generator=g) < 0.5
    masks = squares.repeat_interleave(8, 2).repeat_interleave(8, 3).to(torch.uint8) * 255
    return images, masks


def reference(net, images, masks, mask_layers, mean=0.5, std=0.5):
    """timm's blocks, each with a mask of all pairs of tokens; patches by a loop."""
    side = images.shape[-1] // 16
    tokens = net.patch_embed((images / 255 - mean) / std)
    tokens = net._pos_embed(tokens)
    B, N, _ = tokens.shape
    pairs = torch.ones(B, 1, N, N, dtype=torch.bool)
    for b in range(B):
        for row in range(side):
            for column in range(side):
                patch = masks[b, 0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                pairs[b, 0, 0, 1 + row * side + column] = (patch / 255).mean() >= 0.5
    assert not pairs[:, 0, 0].all()
    for i, block in enumerate(net.blocks):
        is_guided = i >= len(net.blocks) - mask_layers
        tokens = block(tokens, attn_mask=pairs) if is_guided else block(tokens)
    return net.norm(tokens)[:, 0]


@pytest.mark.parametrize(
    ("mask_layers", "trained_blocks"), [(4, 1), (1, 2), (6, 6), (0, 1), (2, 3)]
)
def test_the_class_token_alone_is_masked(whole_vit, weights_file, mask_layers, trained_blocks):
    vit = build(weights_file, mask_layers=mask_layers, trained_blocks=trained_blocks)
    images, masks = shown()
    with torch.no_grad():
        expected = reference(whole_vit, images, masks, mask_layers)
        unmasked = whole_vit.forward_features((images / 255 - 0.5) / 0.5)[:, 0]
        found = vit(images, masks)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    differs = not torch.allclose(found, unmasked, atol=1e-3)
    assert differs == (mask_layers > 0)


def test_a_full_mask_is_timms_class_token(whole_vit, weights_file):
    """At another size than the weights were made for, as timm resamples the positions."""
    vit = build(weights_file)
    images, _ = shown()
    with torch.no_grad():
        expected = whole_vit.forward_features((images / 255 - 0.5) / 0.5)[:, 0]
        found = vit(images, torch.full((3, 1, SIZE, SIZE), 255, dtype=torch.uint8))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert vit.weights_source == str(weights_file)
    assert not vit.random_weights
    assert vit.weights_digest != build().weights_digest


def test_a_hidden_patch_in_the_last_block_does_not_count(weights_file):
    vit = build(weights_file, mask_layers=1)
    tokens = torch.randn(1, 17, 64, generator=torch.Generator().manual_seed(1))
    visible = torch.ones(1, 17, dtype=torch.bool)
    visible[0, 5] = False
    hidden, seen = tokens.clone(), tokens.clone()
    hidden[0, 5] *= -1
    seen[0, 6] *= -1
    before = vit.class_token(tokens, visible)
    assert torch.equal(vit.class_token(hidden, visible), before)
    assert not torch.allclose(vit.class_token(seen, visible), before)


def test_an_empty_mask_leaves_the_class_token_to_itself(weights_file):
    vit = build(weights_file, mask_layers=3, trained_blocks=3)
    visible = vit.visible(torch.zeros(2, 1, SIZE, SIZE, dtype=torch.uint8))
    assert visible.nonzero().tolist() == [[0, 0], [1, 0]]
    g = torch.Generator().manual_seed(1)
    tokens, others = torch.randn(2, 17, 64, generator=g), torch.randn(2, 17, 64, generator=g)
    others[:, 0] = tokens[:, 0]
    found = vit.class_token(tokens, visible)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(vit.class_token(others, visible), found)


def test_half_of_a_patch_makes_it_visible():
    vit = build()
    masks = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.uint8)
    masks[0, 0, :8, :16] = 255  # half of patch 0
    masks[0, 0, :8, 16:32] = 255
    masks[0, 0, 7, 31] = 0  # a pixel less than half of patch 1
    masks[0, 0, 16:32, 32:48] = 128  # all of patch 6, 128 of 255 inside
    masks[0, 0, 16:32, 48:64] = 127
    assert vit.visible(masks)[0].nonzero().flatten().tolist() == [0, 1, 1 + 6]


def test_one_image_is_as_in_a_batch():
    vit = build()
    images, masks = shown(4)
    with torch.no_grad():
        together = vit(images, masks)
        alone = torch.cat([vit(images[i : i + 1], masks[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def odd_block(*, gated=False, **options):
    torch.manual_seed(0)
    block = Block(32, 4, **options)
    if gated:
        block.attn = Attention(32, 4, gated=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": True},
        {"qk_norm": True},
        {"init_values": 0.1},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"gated": True},
    ],
    ids=str,
)
def test_all_layers_of_a_block_are_used(options):
    block = odd_block(**options)
    tokens = torch.randn(2, 6, 32)
    visible = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    pairs = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    pairs[:, 0, 0] = visible
    with torch.no_grad():
        expected = block(tokens, attn_mask=pairs)
        torch.testing.assert_close(guided(block, tokens, visible), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(guided(block, tokens, None), block(tokens), atol=1e-5, rtol=1e-5)
        alone = guided(block, tokens, visible, only_class=True)
    torch.testing.assert_close(alone, expected[:, :1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropped", [{"drop_path": 1.0}, {"proj_drop": 1.0}])
def test_dropout_and_drop_path_count_in_training(dropped):
    block = odd_block(**dropped).train()
    tokens = torch.randn(2, 6, 32)
    assert torch.equal(guided(block, tokens, None), tokens)
    assert not torch.equal(guided(block.eval(), tokens, None), tokens)


def test_attention_dropout_counts_in_training():
    block = odd_block(attn_drop=0.5)
    tokens = torch.randn(2, 6, 32)
    assert torch.equal(guided(block, tokens, None), guided(block, tokens, None))
    block.train()
    for only_class in (False, True):
        once, again = (guided(block, tokens, None, only_class=only_class) for _ in range(2))
        assert not torch.equal(once[:, 0], again[:, 0])


def test_frozen_blocks_have_no_graph_and_are_not_saved():
    vit = build(mask_layers=4, trained_blocks=2)
    names = {name.split(".")[1] for name in vit.state_dict()}
    assert names == {"0", "1"}
    assert all(name.startswith("trained.") for name in vit.state_dict())
    images, masks = shown()
    visible = vit.visible(masks)
    tokens = vit.frozen_tokens(images, visible)
    assert not tokens.requires_grad
    assert tokens.shape == (3, 17, 64)
    vit.class_token(tokens, visible).sum().backward()
    assert all(p.grad is not None for p in vit.parameters())
    (frozen,) = vit._frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert not vit.train()._frozen[0].training


def test_all_of_it_moves():
    vit = build().to(torch.float64)
    (frozen,) = vit._frozen
    assert {p.dtype for p in (*vit.parameters(), *frozen.parameters())} == {torch.float64}
    assert vit.mean.dtype == torch.float64


def test_blocks_are_restored():
    vit = build()
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(1)
    vit.restore()
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())


@pytest.mark.filterwarnings("default:RANDOM BACKBONE WEIGHTS")
def test_random_weights_are_always_the_same_and_say_so():
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="measures no method"):
        one = build()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="measures no method"):
        other = build()
    assert torch.equal(torch.get_rng_state(), state)
    assert one.weights_digest == other.weights_digest
    assert one.random_weights


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ("test_resnet", "is a ResNet"),
        ("test_vit2", "has no class token"),
        ("vit_small_patch14_reg4_dinov2", "register"),
        ("deit_tiny_distilled_patch16_224", "distillation"),
        ("vit_tiny_r_s16_p8_224", "square patches"),
        ("vit_tinny_patch16_224", "near it: .*vit_tiny_patch16_224"),
    ],
)
def test_other_backbones_are_refused(backbone, words):
    with pytest.raises(ModelError, match=words):
        MaskGuidedViT(backbone, "random", 224, mask_layers=1, trained_blocks=1)


def test_sizes_that_do_not_fit_are_refused(weights_file):
    with pytest.raises(ModelError, match=r"6 blocks, fewer than mask layers, 9") as caught:
        build(mask_layers=9)
    assert caught.value.change == {"mask_layers": "at most 6"}
    with pytest.raises(ModelError, match="trained blocks"):
        build(trained_blocks=7)
    with pytest.raises(ModelError, match="multiple of 16 pixels, not 70") as caught:
        build(size=70)
    assert caught.value.change == {"image_size": "64"}
    with pytest.raises(ModelError, match="does not exist"):
        build(weights=weights_file.with_name("other.pth"))


@pytest.mark.parametrize("size", [224, 48])
def test_positions_of_timms_tiny_network(size):
    """At its own size of 224, and resampled to another one, which it takes only if told to."""
    vit = MaskGuidedViT("vit_tiny_patch16_224", "random", size, mask_layers=9, trained_blocks=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    images, _ = shown(1, size)
    mask = torch.full((1, 1, size, size), 255, dtype=torch.uint8)
    with torch.no_grad():
        expected = net.forward_features((images / 255 - 0.5) / 0.5)[:, 0]
        torch.testing.assert_close(vit(images, mask), expected, atol=1e-5, rtol=1e-5)
    assert vit.num_tokens == 1 + (size // 16) ** 2


def test_tokens_of_a_patch_are_where_the_mask_has_it():
    """Rows first in both: a mask of one patch shows that patch alone, in all blocks."""
    vit = build(mask_layers=6, trained_blocks=6)
    images, _ = shown(1)
    masks = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.uint8)
    masks[0, 0, 16:32, 48:64] = 255
    visible = vit.visible(masks)
    tokens = vit.frozen_tokens(images, visible)
    changed = images.clone()
    changed[0, :, 16:32, 48:64] = 255 - changed[0, :, 16:32, 48:64]
    differs = (vit.frozen_tokens(changed, visible) != tokens).any(dim=2)
    assert torch.equal(differs[:, 1:], visible[:, 1:])
    assert rearrange(visible[:, 1:], "1 (h w) -> h w", h=4)[1, 3]
