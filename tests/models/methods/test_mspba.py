import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models.backbone.extractor import FrozenExtractor, channels_first
from models.backbone.weights import load_backbone
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.mspba.clusters import cluster_loss, find_centres
from models.methods.mspba.losses import svdd_loss
from models.methods.mspba.mspba import Mspba, MspbaOptions
from models.methods.mspba.networks import (
    PUBLISHED,
    Head,
    PatchNetwork,
    PositionClassifier,
    choose_stage,
    stage_map,
)
from models.methods.mspba.sampling import (
    PatchSampler,
    crop,
    draw_corners,
    draw_neighbours,
    draw_triples,
    least_side,
    repeated,
)
from models.methods.mspba.windows import (
    draw_kept,
    embed_kept,
    embed_windows,
    spread,
    spreading,
    starts,
    window_corners,
)
from models.training.initial_weights import draw_convolution
from tests.models.banks import Bank, draw_images, seeded, told

SIZES = [(64, 256), (64, 127), (32, 100), (16, 31), (8, 15), (4, 7)]


# Sampling


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_a_neighbour_lies_in_its_direction_and_both_lie_inside(size, side):
    first, second, directions = draw_neighbours(20_000, side, size, seeded())
    assert directions.unique().tolist() == list(range(12))
    for corners in (first, second):
        assert corners.shape == (20_000, 2)
        assert corners.min() == 0
        assert corners.max() == side - size
    offsets = (second - first).double()
    angles = directions * math.pi / 6
    shortest, longest = 3 * size // 4, 3 * size // 4 + size // 4 - 1
    for offset, component in zip(offsets.T, (angles.sin(), angles.cos()), strict=True):
        assert (offset.abs() >= component.abs() * shortest - 0.5001).all()
        assert (offset.abs() <= component.abs() * longest + 0.5001).all()
        straight = component.abs() > 0.99
        assert (offset[straight].sign() == component[straight].sign()).all()
        assert offset[straight].abs().unique().tolist() == list(range(shortest, longest + 1))


def test_directions_are_told_apart_by_their_angles():
    first, second, directions = draw_neighbours(20_000, 256, 64, seeded())
    rows, columns = (second - first).double().T
    turned = torch.atan2(rows, columns) - directions * math.pi / 6
    wrapped = (turned + math.pi).remainder(2 * math.pi) - math.pi
    assert wrapped.abs().max() < math.radians(15)


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_a_triple_has_a_patch_that_is_near_and_one_that_is_far(size, side):
    near, jittered, far = draw_triples(20_000, side, size, seeded())
    for corners in (near, jittered, far):
        assert corners.min() >= 0
        assert corners.max() <= side - size
    jitter = jittered - near
    most = max(1, size // 16)
    assert jitter.unique().tolist() == list(range(-most, most + 1))
    assert jitter.abs().sum(dim=1).min() == 1  # never the same
    counts = torch.unique(jitter, dim=0, return_counts=True)[1]
    assert len(counts) == (2 * most + 1) ** 2 - 1
    assert counts.max() < 1.5 * counts.min()
    distance = (far - near).double().norm(dim=1)
    if side >= 4 * size:
        assert distance.min() > 1.4 * size
        assert distance.max() < 2 * size * 2**0.5
    else:
        assert distance.min() >= 0.5 * size


def test_corners_are_drawn_evenly_from_all_there_are():
    corners = draw_corners(8_000, 3, seeded())
    counts = torch.unique(corners, dim=0, return_counts=True)[1]
    assert len(counts) == 16
    assert counts.min() > 400
    offset = torch.tensor([[2, -1]]).expand(1000, 2)
    drawn = draw_corners(1000, 3, seeded(), [offset])
    assert torch.unique(drawn, dim=0).tolist() == [
        [row, column] for row in (0, 1) for column in (1, 2, 3)
    ]


def test_patches_are_cut_out_where_their_corners_are():
    images = torch.rand(3, 4, 20, 23, generator=seeded())
    owners = torch.tensor([2, 0, 2, 1])
    corners = torch.tensor([[0, 0], [13, 16], [5, 2], [9, 1]])
    found = crop(images, owners, corners, 7)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for patch, owner, (row, column) in zip(found, owners, corners.tolist(), strict=True):
        assert torch.equal(patch, images[owner, :, row : row + 7, column : column + 7])


def test_only_pairs_are_perturbed_each_patch_by_a_colour_and_noise():
    pixels = draw_images(40, side=64).float() / 255
    patches, directions = PatchSampler(seeded(), torch.device("cpu"))(pixels, 32)
    assert patches.shape == (200, 3, 32, 32)
    assert directions.shape == (40,)
    PatchSampler(drawn := seeded(), torch.device("cpu"))
    *pair, _ = draw_neighbours(40, 64, 32, drawn)
    corners = torch.cat([*pair, *draw_triples(40, 64, 32, drawn)])
    plain = crop(pixels, torch.arange(40).repeat(5), corners, 32)
    assert torch.equal(patches[80:], plain[80:])
    change = (patches - plain)[:80]
    shift = change.mean(dim=(2, 3))
    assert shift.std().item() == pytest.approx(0.02, rel=0.15)
    noise = change - shift[:, :, None, None]
    assert noise.std().item() == pytest.approx(0.02, rel=0.02)
    assert (
        abs(noise[:, :, ::2].flatten() @ noise[:, :, 1::2].flatten()) < 0.02 * noise.square().sum()
    )


@pytest.mark.parametrize(("images", "batch"), [(7, 4), (3, 4), (8, 4)])
def test_passes_follow_each_other_without_small_batches(images, batch):
    bank = Bank(torch.arange(images).reshape(-1, 1))
    found = list(repeated(bank, batch, 5, seeded()))
    assert [len(part) for part in found[:-1]] == [batch] * (len(found) - 1)
    order = torch.cat(found).flatten()
    assert torch.equal(order.bincount(), torch.full((images,), 5))
    passes = order.split(images)
    assert all(torch.equal(one.sort().values, torch.arange(images)) for one in passes)
    assert len({tuple(one.tolist()) for one in passes}) > 1


# Windows


@pytest.mark.parametrize(
    ("side", "size", "stride", "windows"),
    [(256, 64, 16, 13), (256, 32, 4, 57), (256, 16, 4, 61), (33, 8, 6, 6), (9, 9, 4, 1)],
)
def test_every_pixel_is_seen_by_windows_that_end_with_the_image(side, size, stride, windows):
    found = starts(side, size, stride)
    assert len(found) == windows
    assert (found[0], found[-1]) == (0, side - size)
    assert all(0 < after - before <= stride for before, after in zip(found, found[1:]))  # noqa: B905, RUF007


@pytest.mark.parametrize(("side", "size", "stride"), [(20, 8, 4), (17, 6, 5), (7, 7, 2)])
def test_a_pixel_has_the_mean_score_of_the_windows_that_cover_it(side, size, stride):
    begins = starts(side, size, stride)
    scores = torch.rand(2, len(begins), len(begins), generator=seeded())
    total, count = torch.zeros(2, side, side), torch.zeros(side, side)
    for i, row in enumerate(begins):
        for j, column in enumerate(begins):
            where = (..., slice(row, row + size), slice(column, column + size))
            total[where] += scores[:, i, j, None, None]
            count[where] += 1
    torch.testing.assert_close(spread(scores, spreading(side, size, stride)), total / count)


# Networks


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(3)
    return FrozenExtractor("test_resnet", (0, 1, 2), weights="random")


@pytest.fixture(scope="module")
def published():
    """A VGG16 of random weights; timm would draw 138 million, and leave all but these out."""
    with torch.device("meta"):
        net = timm.create_model("vgg16", features_only=True, out_indices=(1, 2, 4))
    net = net.to_empty(device="cpu").eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            draw_convolution(module, seeded())
    backbone = SimpleNamespace(net=net, strides=(2, 4, 16), device="cpu", backbone="vgg16")
    return PatchNetwork(backbone, (64, 32, 16), 64, torch.ones(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("size", "layer", "shape", "kernels"),
    [
        (64, "features_29", (512, 4), [(512, 256, 2), (256, 128, 2), (128, 64, 2), (64, 64, 1)]),
        (
            *(32, "features_15", (256, 8)),
            [(256, 256, 3), (256, 128, 3), (128, 128, 2), (128, 64, 2), (64, 64, 2)],
        ),
        (16, "features_8", (128, 8), [(128, 128, 3), (128, 64, 3), (64, 32, 3), (32, 64, 2)]),
    ],
)
def test_on_a_vgg16_layers_and_heads_are_the_published_ones(published, size, layer, shape, kernels):
    patches = torch.rand(2, 3, size, size, generator=seeded())
    seen = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, module in published.net.items()
    ]
    with torch.no_grad():
        found = stage_map(published.net, patches, published.stages[size])
    for hook in hooks:
        hook.remove()
    assert seen[-1] == layer
    assert found.shape == (2, shape[0], shape[1], shape[1])
    assert found.min() == 0  # after its ReLU
    layers = published.heads[str(size)].layers
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in layers] == kernels
    assert all(c.padding == (0, 0) and c.stride == (1, 1) for c in layers)
    with torch.no_grad():
        embeddings = published(patches)
        expected = found
        for i, convolution in enumerate(layers):
            expected = convolution(expected if i == 0 else F.leaky_relu(expected, 0.1))
    assert embeddings.shape == (2, 64)
    torch.testing.assert_close(embeddings, expected.flatten(1).tanh())


@pytest.mark.parametrize(
    ("size", "strides", "stride"),
    [
        (64, (2, 4, 8, 16, 32), 16),
        (32, (2, 4, 8, 16, 32), 4),
        (16, (2, 4, 8, 16, 32), 2),
        (64, (4, 8, 32), 8),  # as near as 32, and finer
        (32, (8, 16), 8),
        (16, (32, 4), 4),
        (8, (1, 2, 4), 1),
        (128, (8, 16, 32), 32),
        (16, (16, 16), 16),
    ],
)
def test_a_size_takes_the_stage_of_the_nearest_stride(size, strides, stride):
    assert strides[choose_stage(size, strides)] == stride


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("grid", [1, 2, 3, 5, 7, 8, 13])
def test_a_head_takes_any_grid(size, grid):
    head = Head(PUBLISHED[size], 5, grid, 6)
    maps = torch.rand(2, 5, grid, grid, generator=seeded())
    assert head(maps).shape == (2, 6)
    if grid > PUBLISHED[size].grid:
        small = F.adaptive_avg_pool2d(maps, PUBLISHED[size].grid)
        same = Head(PUBLISHED[size], 5, PUBLISHED[size].grid, 6)
        same.load_state_dict(head.state_dict())
        assert torch.equal(head(maps), same(small))


@pytest.mark.parametrize(
    ("name", "layers", "location", "size"),
    [
        ("test_resnet", (0, 2), "bottleneck", 32),
        ("test_efficientnet", (0, 1, 3), "bottleneck", 32),
        ("test_efficientnet", (1, 3), "expansion", 32),
        ("mobilenetv3_small_050", (0, 2), "bottleneck", 32),
        ("test_convnext", (0, 1), "bottleneck", 32),
        ("test_mambaout", (0, 1), "bottleneck", 32),  # channels last
        ("test_vit", (0, 1), "bottleneck", 32),
    ],
)
def test_a_stage_alone_is_what_the_whole_network_gives(name, layers, location, size):
    torch.manual_seed(0)
    net = load_backbone(name, "random", layers, location).net.eval()
    pixels = torch.rand(2, 3, size, size, generator=seeded())
    with torch.no_grad():
        for i, wanted in enumerate(channels_first(net, net(pixels))):
            torch.testing.assert_close(stage_map(net, pixels, i), wanted)


def test_what_scores_is_what_was_trained(backbone):
    network = PatchNetwork(backbone, (32, 16), 8, torch.full((1, 3, 1, 1), 0.5))
    with torch.no_grad():
        for weight in network.net.parameters():
            weight.mul_(1 + 0.1 * torch.rand(weight.shape, generator=seeded()))
        fast = network.for_scoring()
        assert fast.net is not network.net
        for size in (32, 16):
            patches = torch.rand(4, 3, size, size, generator=seeded())
            torch.testing.assert_close(fast(patches), network(patches), rtol=1e-4, atol=1e-5)
    assert backbone.net.state_dict().keys() == network.net.state_dict().keys()


def test_embeddings_of_windows_do_not_depend_on_what_is_embedded_at_once(backbone, monkeypatch):
    network = PatchNetwork(backbone, (16, 8), 8, torch.ones(1, 3, 1, 1))
    pixels = torch.rand(3, 3, 32, 32, generator=seeded())
    corners = {16: window_corners(32, 16, 8), 8: window_corners(32, 8, 4)}
    kept = {16: torch.arange(27), 8: torch.tensor([0, 48, 49, 50, 146])}
    whole = embed_kept(network, [pixels], corners, kept)
    monkeypatch.setattr("models.methods.mspba.windows.PASS_PIXELS", 3 * 16**2)
    parts = embed_kept(network, pixels.split(2), corners, kept)
    for size, rows in kept.items():
        torch.testing.assert_close(parts[size], whole[size])
        per_image = len(corners[size])
        for embedding, row in zip(whole[size], rows.tolist(), strict=True):
            i, j = corners[size][row % per_image].tolist()
            window = pixels[row // per_image, :, i : i + size, j : j + size]
            with torch.no_grad():
                torch.testing.assert_close(network(window[None])[0], embedding)


def test_kept_windows_are_drawn_in_order():
    assert torch.equal(draw_kept(5, None, seeded()), torch.arange(5))
    assert torch.equal(draw_kept(5, 5, seeded()), torch.arange(5))
    kept = draw_kept(50, 7, seeded())
    assert len(kept.unique()) == len(kept) == 7
    assert torch.equal(kept, kept.sort().values)


# Losses


def test_losses_are_those_computed_by_hand():
    near = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    jittered = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    far = torch.tensor([[-4.0, 3.0], [2.0, 0.0]])
    # Distances 0 and sqrt 5; cosines to the jittered 1 and 0, to the far 0 and 1.
    assert svdd_loss(near, jittered, far).item() == pytest.approx(5**0.5 / 2 + (0 - 1 + 1 - 0) / 2)
    centres = torch.tensor([[0.0, 0.0], [3.0, 2.0]])
    assert cluster_loss(near, centres).item() == pytest.approx((4 + 1) / 2)


def test_a_patch_like_its_neighbour_gives_a_finite_gradient():
    near = torch.ones(2, 3, requires_grad=True)
    svdd_loss(near, near.clone(), torch.zeros(2, 3)).backward()
    assert near.grad.isfinite().all()


def test_the_last_layer_has_unit_weights_over_the_directions():
    classifier = PositionClassifier(64, frozen=False)
    classifier.initialise(seeded())
    widths = [(layer.in_features, layer.out_features) for layer in classifier.hidden]
    assert widths == [(64, 128), (128, 256), (256, 512)]
    ones, others = torch.randn(2, 5, 64, generator=seeded()).unbind()
    with torch.no_grad():
        hidden = ones - others
        for layer in classifier.hidden:
            hidden = F.leaky_relu(layer(hidden), 0.1)
        weight = classifier.last.weight
        lengths = weight.square().sum(dim=0).sqrt()
        expected = hidden @ (weight / lengths).T + classifier.last.bias
        logits = classifier(ones, others)
        torch.testing.assert_close(logits, expected)
        classifier.last.weight.mul_(7)
        torch.testing.assert_close(classifier(ones, others), logits)


# The detector

TOY = {
    **{"patch_sizes": (16, 8), "strides": (8, 4), "embedding_dim": 16, "batch_size": 8},
    **{"epochs": 2, "samples_per_image": 1, "cluster_weight": 0.0},
}


def mspba(backbone, **options):
    return Mspba(FeatureShape((), backbone), MspbaOptions(**{**TOY, **options}))


def fitted(backbone, bank, **options):
    detector = mspba(backbone, **options)
    detector.fit(bank, generator=seeded())
    return detector


def test_maps_are_sums_of_mean_distances_of_windows(backbone):
    """Step by step, from the images on."""
    train, test = draw_images(5), draw_images(2, seed=2)
    detector = fitted(backbone, Bank(train), epochs=1)
    mean = train.double().mean(dim=0).float() / 255
    expected = torch.zeros(2, 32, 32)
    for size, stride in ((16, 8), (8, 4)):
        begins = range(0, 32 - size + 1, stride)

        def windows(image, size=size, begins=begins):
            pixels = image.float() / 255 - mean
            cut = [pixels[:, i : i + size, j : j + size] for i in begins for j in begins]
            with torch.no_grad():
                return detector.network(torch.stack(cut))

        memory = torch.cat([windows(image) for image in train])
        torch.testing.assert_close(
            detector.get_buffer(f"memory_{size}"), memory, rtol=1e-4, atol=1e-5
        )
        for total, image in zip(expected, test, strict=True):
            least = torch.cdist(windows(image), memory).amin(dim=1)
            scores, count = torch.zeros(2, 32, 32)
            for value, i, j in zip(
                least, [i for i in begins for _ in begins], list(begins) * len(begins), strict=True
            ):
                scores[i : i + size, j : j + size] += value
                count[i : i + size, j : j + size] += 1
            total += scores / count
    with torch.no_grad():
        found = detector(test)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        # All training windows are remembered, so training images are not anomalous at all.
        assert detector(train).max() < 1e-3 * found.max()


def test_pixels_are_those_of_the_backbone_where_that_is_asked_for(backbone):
    train = draw_images(4)
    detector = fitted(backbone, Bank(train), pixels="backbone", epochs=1)
    assert len(detector.mean_image) == 0
    patches = train[:, :, :16, :16]
    found = detector._pixels(patches) / detector.network.std
    torch.testing.assert_close(found, backbone.pixels(patches))
    with torch.no_grad():
        assert detector(draw_images(1, side=40)).shape == (1, 40, 40)


def test_the_terms_of_the_loss_are_weighted_and_summed(backbone):
    detector = fitted(backbone, Bank(draw_images(4)), epochs=1, svdd_weight=0.5, cluster_weight=3.0)
    plain = fitted(backbone, Bank(draw_images(4)), epochs=1, svdd_weight=1.0, cluster_weight=1.0)
    plain.load_state_dict(detector.state_dict())
    centres = {16: torch.zeros(1, 16), 8: torch.zeros(1, 16)}
    pixels = detector._pixels(draw_images(4))
    sampler = [PatchSampler(seeded(), torch.device("cpu")) for _ in range(3)]
    found = detector.losses(pixels, sampler[0], centres)
    wanted = plain.losses(pixels, sampler[1], centres)
    assert found.keys() == wanted.keys() == {"position", "svdd", "cluster"}
    for name, weight in (("position", 1), ("svdd", 0.5), ("cluster", 3)):
        assert found[name].item() == pytest.approx(weight * wanted[name].item())
    assert found["cluster"].item() > 0
    assert plain.losses(pixels, sampler[2], {}).keys() == {"position", "svdd"}


@pytest.mark.parametrize("released", [False, True])
def test_centres_draw_the_network_unless_as_released(backbone, released):
    detector = mspba(backbone, released=released, cluster_weight=1.0)
    detector._start(Bank(draw_images(4)), seeded())
    centres = {16: torch.full((2, 16), 0.5), 8: torch.full((2, 16), 0.5)}
    sampler = PatchSampler(seeded(), torch.device("cpu"))
    cluster = detector.losses(detector._pixels(draw_images(4)), sampler, centres)["cluster"]
    assert cluster.item() > 0
    assert cluster.requires_grad != released
    if not released:
        cluster.backward()
        assert detector.network.net.conv1[0].weight.grad.abs().sum() > 0
        assert all(p.grad.abs().sum() > 0 for p in detector.network.heads["8"].parameters())


@pytest.mark.parametrize("released", [False, True])
def test_the_last_layer_of_a_classifier_is_trained_unless_as_released(backbone, released):
    detector = mspba(backbone, released=released, learning_rate=1e-3)
    bank = Bank(draw_images(4))
    detector._start(bank, seeded())
    first = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.fit(bank, generator=seeded())
    moved = {
        name
        for name, value in detector.classifiers.named_parameters()
        if not torch.equal(value, first[f"classifiers.{name}"])
    }
    all_of_it = {name for name, _ in detector.classifiers.named_parameters()}
    kept = {"16.last.weight", "8.last.weight"} if released else set()
    assert moved == all_of_it - kept
    # And so are the heads and the backbone, but for the statistics of its normalisations.
    for name, value in detector.network.state_dict().items():
        is_statistic = name.rpartition(".")[2].startswith(("running", "num_batches"))
        is_reached = name.startswith(("heads", "net.conv1", "net.bn1"))
        assert torch.equal(value, first[f"network.{name}"]) == (is_statistic or not is_reached)
    assert detector.remarks == ["no patch size takes stages 1, 2 of --layers"]


def test_centres_count_from_their_epoch_and_are_found_every_few(backbone, monkeypatch):
    found = []

    def finding(*arguments):
        found.append(len(values))
        return find_centres(*arguments)

    monkeypatch.setattr("models.methods.mspba.mspba.find_centres", finding)
    options = {"cluster_start": 2, "cluster_every": 2, "clusters": 2, "cluster_patches": 9}
    detector = mspba(backbone, epochs=5, cluster_weight=1.0, **options)
    values = []

    def monitor(_, said):
        values.append(said)

    monitor.scores_steps = False
    detector.fit(Bank(draw_images(4)), generator=seeded(), monitor=monitor)
    assert found == [1, 3]
    assert ["cluster" in said for said in values] == [False, True, True, True, True]
    for said in values:
        terms = [said[name] for name in ("position", "svdd", "cluster") if name in said]
        assert said["loss"] == pytest.approx(sum(terms), rel=1e-5)


def test_centres_are_means_of_the_embeddings_nearest_to_them(backbone):
    network = PatchNetwork(backbone, (16, 8), 8, torch.ones(1, 3, 1, 1))
    pixels = torch.rand(3, 3, 32, 32, generator=seeded())
    centres = find_centres(network, pixels.split(2), 5, 2, seeded())
    assert {size: tuple(found.shape) for size, found in centres.items()} == {16: (2, 8), 8: (2, 8)}
    drawn = seeded()
    parts = {16: [], 8: []}
    for some in pixels.split(2):
        for size, found in parts.items():
            corners = draw_corners(5, 32 - size, drawn)
            rows = torch.arange(5 * len(some))
            found.append(embed_windows(network, some, corners, rows, size))
    for size, found in parts.items():
        embeddings = torch.cat(found)
        owner = torch.cdist(embeddings, centres[size]).argmin(dim=1)
        for k in owner.unique():
            torch.testing.assert_close(centres[size][k], embeddings[owner == k].mean(dim=0))


def test_fewer_windows_are_remembered_where_that_is_asked_for(backbone):
    bank = Bank(draw_images(4))
    whole = fitted(backbone, bank, epochs=1)
    some = fitted(backbone, bank, epochs=1, max_positions=40)
    assert (len(whole.memory_16), len(whole.memory_8), len(whole.remarks)) == (36, 196, 1)
    assert (len(some.memory_16), len(some.memory_8)) == (36, 40)
    _, remark = some.remarks
    assert "40 of 196 normal windows of 8 pixels" in remark


def slopes(count, seed):
    """Images (N, 3, 64, 64) whose red grows downwards and whose green to the right."""
    grown = torch.linspace(20, 230, 64)
    image = torch.stack([grown[:, None].expand(64, 64), grown.expand(64, 64), torch.zeros(64, 64)])
    noise = 5 * torch.randn(count, 3, 64, 64, generator=seeded(seed))
    return (image + noise).clamp(0, 255).byte()


def test_where_a_neighbour_lies_is_learned(backbone):
    options = {"learning_rate": 1e-3, "epochs": 8, "samples_per_image": 4, "patch_sizes": (16,)}
    bank = Bank(slopes(8, 1))
    said = told(mspba(backbone, **options, strides=(16,), pixels="backbone"), bank)
    positions = [values["position"] for values in said]
    assert positions[0] == pytest.approx(math.log(12), rel=0.3)
    assert positions[-1] < 0.7 * positions[0]


def stripes(count, seed):
    """Images (N, 3, 48, 48) of noisy stripes of 8 pixels that begin at any of these."""
    phase = torch.randint(8, (count, 1, 1, 1), generator=seeded(seed))
    wave = (2 * math.pi / 8 * (torch.arange(48.0) + phase)).sin().expand(count, 3, 48, 48)
    noise = 0.05 * torch.randn(count, 3, 48, 48, generator=seeded(seed + 1))
    return (128 + 90 * (wave + noise)).clamp(0, 255).byte()


def test_a_visible_defect_stands_out(backbone):
    options = {"learning_rate": 1e-4, "epochs": 2, "samples_per_image": 1}
    detector = fitted(backbone, Bank(stripes(32, 1)), **options)
    good, bad = stripes(8, 20), stripes(8, 30)
    bad[:, :, 16:32, 16:32] = bad[:, :, 16:32, 16:32].mT  # stripes across
    with torch.no_grad():
        normal, anomalous = detector(good), detector(bad)
    ranked = anomalous.amax(dim=(1, 2))[:, None] > normal.amax(dim=(1, 2))
    assert ranked.double().mean() > 0.95
    inside = anomalous[:, 20:28, 20:28].mean()
    outside = torch.cat([anomalous[:, :8].flatten(), anomalous[:, 40:].flatten()]).mean()
    assert inside > 3 * outside


# Refusals


def test_images_without_room_for_a_neighbour_are_refused(backbone):
    assert [least_side(size) for size in (64, 32, 16)] == [127, 63, 31]
    assert fitted(backbone, Bank(draw_images(3, side=31)), epochs=1).memory_16.shape == (27, 16)
    message = "a patch of 16 pixels and its neighbour need images of at least 31 .* these have 30"
    with pytest.raises(ModelError, match=message):
        fitted(backbone, Bank(draw_images(3, side=30)))


def test_images_of_another_size_are_refused(backbone):
    detector = fitted(backbone, Bank(draw_images(3)), epochs=1)
    with pytest.raises(ModelError, match="mean image of 32 pixels, the images have 40"):
        detector(draw_images(1, side=40))
    plain = fitted(backbone, Bank(draw_images(3)), epochs=1, pixels="backbone")
    with pytest.raises(ModelError, match="images of 15 pixels hold no patch of 16"):
        plain(draw_images(1, side=15))


def test_a_backbone_that_takes_no_patches_is_refused():
    backbone = FrozenExtractor("test_vit", (0, 1), weights="random")
    with pytest.raises(ModelError, match=r"test_vit takes no patches of 8 pixels .*patch-sizes"):
        mspba(backbone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_sizes": ()}, r"--method.patch-sizes \(\) must be different and 4 or above"),
        ({"patch_sizes": (8, 8)}, "must be different"),
        ({"patch_sizes": (8, 3)}, "4 or above"),
        ({"strides": (4,)}, r"--method.strides \(4,\) must be above 0, one for each of"),
        ({"strides": (4, 0)}, "must be above 0"),
        ({"strides": (4, 9)}, "leave pixels unseen"),
        ({"clusters": 30, "cluster_patches": 20, "cluster_weight": 1.0}, "must be at least"),
    ],
)
def test_options_that_have_no_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MspbaOptions(**{**TOY, **options})
