import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from models.backbone.extractor import FrozenExtractor
from models.backbone.weights import canonical_name
from models.detector import FeatureShape
from models.errors import ModelError
from models.methods.fine_tuned.fine_tuning import trained_parameters
from models.methods.fine_tuned.fisher import _draw_gradient, label_free_fisher, read_fisher
from models.methods.fine_tuned.panda import Panda, PandaOptions, compactness_loss
from models.methods.fine_tuned.panda_ewc import PandaEwc, PandaEwcOptions, elastic_penalty
from tests.models.banks import Bank, draw_images, monitoring, seeded, told

SMALL = "test_resnet"


def extractor(backbone=SMALL, layers=(4,), weights="random", **options):
    torch.manual_seed(0)
    return FrozenExtractor(backbone, layers, weights=str(weights), pool="mean", **options)


@pytest.fixture(scope="module")
def backbone():
    return extractor()


def bank_of_images(count=10, **options):
    return Bank(draw_images(count, **options))


def panda(backbone, **options):
    return Panda(FeatureShape((), backbone), PandaOptions(**options))


def panda_ewc(backbone, **options):
    return PandaEwc(FeatureShape((), backbone), PandaEwcOptions(**options))


def fitted(backbone, bank, seed=0, *, made=panda, **options):
    detector = made(backbone, **{"epochs": 2, "batch_size": 4, **options})
    detector.fit(bank, generator=seeded(seed))
    return detector


def save_tensors(tensors, path):
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def distance_from_start(detector):
    start = detector.backbone.net.state_dict()
    pairs = [(p, start[name]) for name, p in detector.net.named_parameters()]
    return torch.stack([(p - q).square().sum() for p, q in pairs]).sum().sqrt()


def stages_of(names):
    return {name.split(".")[0] for name in names}


# Which parameters train


@pytest.mark.parametrize(
    ("name", "layers", "trained"),
    [
        ("test_resnet", (4,), {"layer3", "layer4"}),
        ("test_resnet", (2, 3), {"layer2", "layer3"}),
        ("test_convnext", (3,), {"stages_2", "stages_3"}),
        ("test_resnet", (1,), {"conv1", "bn1", "layer1"}),
    ],
)
def test_last_two_stages_train(name, layers, trained):
    net = extractor(name, layers)
    names = trained_parameters(net, 2)
    every = [n for n, _ in net.net.named_parameters()]
    assert stages_of(names) == trained
    assert names == [n for n in every if n.split(".")[0] in trained]  # whole stages


@pytest.mark.parametrize(
    ("layers", "trained"), [((4,), ["3", "4", "5", "6"]), ((1, 2, 3), ["2", "3", "4"])]
)
def test_efficientnet_stages_end_where_timm_taps_them(layers, trained):
    net = extractor("tf_efficientnet_lite0", layers)
    names = trained_parameters(net, 2)
    every = [n for n, _ in net.net.named_parameters()]
    assert names == [n for n in every if n.startswith(tuple(f"blocks.{i}." for i in trained))]


def test_vision_transformers_stages_are_their_blocks():
    net = extractor("test_vit", (5,))
    names = trained_parameters(net, 2)
    assert {n.split(".")[2] for n in names} == {"4", "5"}
    assert all(n.startswith("model.blocks.") for n in names)


def test_any_number_of_stages_can_train(backbone):
    every = [n for n, _ in backbone.net.named_parameters()]
    assert stages_of(trained_parameters(backbone, 1)) == {"layer4"}
    assert trained_parameters(backbone, 5) == every
    assert trained_parameters(backbone, 99) == every


def test_expansion_features_are_refused():
    net = extractor("tf_efficientnet_lite0", (2, 3), feature_location="expansion")
    with pytest.raises(ModelError, match="leave out --feature-location expansion"):
        panda(net)


def test_number_of_trainable_parameters_is_the_papers():
    """55.6 million in Table II of the NoCo paper."""
    net = extractor("resnet152")
    names = set(trained_parameters(net, 2))
    count = sum(p.numel() for n, p in net.net.named_parameters() if n in names)
    assert round(count / 1e6, 1) == 55.6


def test_fit_moves_what_trains_and_nothing_else(backbone):
    detector = fitted(backbone, bank_of_images())
    trained = set(trained_parameters(backbone, 2))
    after = detector.net.state_dict()
    for name, tensor in backbone.net.state_dict().items():
        # Statistics of batch normalisation are among those that stay.
        assert torch.equal(tensor, after[name]) == (name not in trained), name
    assert all(p.requires_grad == (n in trained) for n, p in detector.net.named_parameters())
    assert set(detector.state_dict()) == {f"net.{name}" for name in after} | {"embeddings"}


def test_batch_statistics_are_never_used(backbone):
    detector = panda(backbone).train()
    assert not any(module.training for module in detector.modules())


# Loss


def test_compactness_on_hand_worked_numbers():
    embeddings = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    center = torch.tensor([1.0, 1.0])
    # Squared distances 0 + 1 and 4 + 1, over two entries, over two images.
    assert compactness_loss(embeddings, center) == pytest.approx((1 / 2 + 5 / 2) / 2)


def test_elastic_penalty_on_hand_worked_numbers():
    parameters = {"a": torch.nn.Parameter(torch.tensor([1.0, 2.0])), "b": torch.ones(1, 1)}
    start = {"a": torch.tensor([0.0, 4.0]), "b": torch.zeros(1, 1)}
    fisher = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([[7.0]])}
    penalty = elastic_penalty(parameters, start, fisher)
    assert penalty.item() == pytest.approx((3 * 1 + 0.5 * 4 + 7 * 1) / 2)


def test_first_loss_is_the_spread_of_the_pretrained_features(backbone):
    bank = bank_of_images()
    (values,) = told(panda(backbone, epochs=1, batch_size=len(bank)), bank)
    features = backbone(bank.features)[:, :, 0, 0]  # (N, D)
    expected = (features - features.mean(dim=0)).square().mean()
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_gradients_are_clipped_together(backbone):
    bank = bank_of_images()
    options = {"epochs": 1, "batch_size": len(bank), "momentum": 0.0, "weight_decay": 0.0}
    clipped = fitted(backbone, bank, learning_rate=10.0, clip_norm=1e-4, **options)
    assert distance_from_start(clipped).item() == pytest.approx(10.0 * 1e-4, rel=1e-2)
    free = fitted(backbone, bank, learning_rate=10.0, clip_norm=None, **options)
    assert distance_from_start(free) > 2 * distance_from_start(clipped)


def test_training_makes_normal_images_compact(backbone):
    detector = panda(backbone, epochs=15, batch_size=5, learning_rate=1.0)
    values = told(detector, bank_of_images())
    assert values[-1]["loss"] < 0.9 * values[0]["loss"]


# EWC


def fisher_file(backbone, path, value):
    names = trained_parameters(backbone, 2)
    parameters = dict(backbone.net.named_parameters())
    save_tensors({n: torch.full_like(parameters[n], value) for n in names}, path)
    return path


def test_ewc_pulls_towards_the_start(backbone, tmp_path):
    bank = bank_of_images()
    path = fisher_file(backbone, tmp_path / "fisher.safetensors", 1.0)
    options = {"epochs": 10, "learning_rate": 0.1, "clip_norm": None}
    free = fitted(backbone, bank, **options)
    options |= {"made": panda_ewc, "fisher_file": str(path)}
    pulled = [fitted(backbone, bank, ewc_weight=weight, **options) for weight in (0.1, 1.0)]
    distances = [distance_from_start(d).item() for d in (free, *pulled)]
    assert distances[1] < 0.9 * distances[0]
    assert distances[2] < 0.9 * distances[1]
    # Without weight nothing changes.
    none = fitted(backbone, bank, ewc_weight=0.0, **options)
    assert torch.equal(none(bank.features), free(bank.features))
    assert none.remarks == []


def test_fisher_matches_its_definition_on_a_linear_classifier():
    """Sum over y of p(y) (dlog p(y) / dW)^2, by enumeration; many draws come near it."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), linear)
    pixels = torch.randn(1, 1, 2, 2)
    probabilities = classifier(pixels).softmax(dim=1)[0].detach()
    exact = torch.zeros(3, 4)
    for label in range(3):
        gradient = (F.one_hot(torch.tensor(label), 3) - probabilities)[:, None] * pixels.flatten()
        exact += probabilities[label] * gradient**2
    generator, drawn = seeded(), []
    for _ in range(3000):
        (gradient,) = _draw_gradient(classifier, [linear.weight], pixels, generator)
        drawn.append(gradient**2)
    torch.testing.assert_close(torch.stack(drawn).mean(dim=0), exact, rtol=0.1, atol=1e-3)


def test_fisher_of_a_network_matches_a_slow_loop(classifier_file):
    net = extractor(weights=classifier_file)
    bank = bank_of_images(6)
    parameters = {n: p for n, p in panda(net).net.named_parameters() if p.requires_grad}
    fisher = label_free_fisher(net, parameters, bank, num_images=4, generator=seeded(3))

    model = timm.create_model(SMALL, pretrained=False, num_classes=5).eval()
    model.load_state_dict(load_file(classifier_file))
    named = dict(model.named_parameters())
    assert set(fisher) == {n for n in named if n.startswith(("layer3", "layer4"))}
    expected = {name: torch.zeros_like(named[name]) for name in fisher}
    generator = seeded(3)
    for row in torch.randperm(6, generator=generator)[:4]:
        logits = model(net.pixels(bank.features[row][None]))
        label = torch.multinomial(logits.detach().double().softmax(1), 1, generator=generator)
        model.zero_grad()
        F.cross_entropy(logits, label[:, 0]).backward()
        for name in expected:
            expected[name] += named[name].grad ** 2 / 4
    torch.testing.assert_close(fisher, expected, rtol=1e-3, atol=1e-7)
    assert max(f.max() for f in fisher.values()) > 0


def test_ewc_without_a_file_says_where_its_fisher_comes_from(classifier_file):
    net = extractor(weights=classifier_file)
    detector = fitted(net, bank_of_images(), made=panda_ewc, epochs=1, fisher_images=3)
    assert "from 3 normal training images" in detector.remarks[0]


def test_the_packaged_weights_bring_their_classifier():
    net = extractor("tf_efficientnet_lite0", weights="auto")
    bank = bank_of_images(2)
    parameters = {n: p for n, p in panda(net).net.named_parameters() if p.requires_grad}
    fisher = label_free_fisher(net, parameters, bank, num_images=2, generator=seeded())
    assert {canonical_name(n) for n in parameters} == {canonical_name(n) for n in fisher}
    assert all(f.isfinite().all() and f.max() > 0 for f in fisher.values())


def test_ewc_needs_a_classifier(backbone, classifier_file, tmp_path):
    with pytest.raises(ModelError, match="are random: no classifier") as caught:
        fitted(backbone, bank_of_images(), made=panda_ewc)
    assert caught.value.change == {"fisher_file": "name one in"}
    headless = tmp_path / "headless.safetensors"
    save_file({n: t for n, t in load_file(classifier_file).items() if "fc" not in n}, headless)
    with pytest.raises(
        ModelError, match=r"headless.safetensors holds no classifier of test_resnet"
    ) as caught:
        fitted(extractor(weights=headless), bank_of_images(), made=panda_ewc)
    assert caught.value.change == {"fisher_file": "name one in"}


def test_bad_fisher_files_are_named(backbone, tmp_path):
    parameters = {n: p for n, p in panda(backbone).net.named_parameters() if p.requires_grad}
    name = next(iter(parameters))
    good = {n: torch.ones_like(p) for n, p in parameters.items()}

    def read(changes, *, dropped=()):
        path = tmp_path / "fisher.safetensors"
        save_tensors({n: t for n, t in (good | changes).items() if n not in dropped}, path)
        return read_fisher(path, parameters)

    assert set(read({"fc.weight": torch.ones(3)})) == set(parameters)  # extra names do no harm
    with pytest.raises(ModelError, match=f"holds nothing for {name}"):
        read({}, dropped=[name])
    with pytest.raises(ModelError, match=r"has shape \(2,\)"):
        read({name: torch.ones(2)})
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ModelError, match="negative or non-finite"):
            read({name: torch.full_like(parameters[name], bad)})
    nowhere = {"made": panda_ewc, "fisher_file": str(tmp_path / "nowhere.pth")}
    with pytest.raises(ModelError, match=r"Fisher diagonal: .*nowhere\.pth does not exist"):
        fitted(backbone, bank_of_images(), **nowhere)


# Scores


def test_score_is_the_sum_of_squared_distances_to_the_nearest(backbone):
    bank, tests = bank_of_images(), draw_images(70, seed=5)
    detector = fitted(backbone, bank, num_neighbors=2)
    with torch.inference_mode():
        train = torch.cat(
            [f.mean(dim=(2, 3)) for f in detector.net(backbone.pixels(bank.features))]
        )
        test = detector.embed(backbone.pixels(tests))
        maps = detector(tests)
    distances, _ = NearestNeighbors(n_neighbors=2).fit(train).kneighbors(test)
    assert maps.shape == (70, 1, 1)
    expected = torch.from_numpy((distances**2).sum(axis=1)).float()
    torch.testing.assert_close(maps[:, 0, 0], expected, rtol=1e-3, atol=1e-6)


def test_stages_are_concatenated():
    net = extractor(layers=(2, 4))
    detector = fitted(net, bank_of_images(), epochs=1)
    assert detector.embeddings.shape == (10, 48 + 96)
    embeddings = panda(net).embed(net.pixels(draw_images(3)))
    torch.testing.assert_close(embeddings, net(draw_images(3))[:, :, 0, 0])


@pytest.mark.parametrize(("scores_steps", "passes"), [(True, [1, 2, 3]), (False, [0, 0, 1])])
def test_images_are_embedded_after_an_epoch_only_where_it_is_scored(
    backbone, monkeypatch, scores_steps, passes
):
    detector = panda(backbone, epochs=3, batch_size=4)
    embed_bank, calls, seen = detector.embed_bank, [], []
    monkeypatch.setattr(detector, "embed_bank", lambda bank: calls.append(bank) or embed_bank(bank))
    monitor = monitoring(lambda *_: seen.append(len(calls) - 1), scores_steps=scores_steps)
    detector.fit(bank_of_images(), generator=seeded(), monitor=monitor)
    assert seen == passes  # beside the one before training, for the center


def test_visible_anomalies_are_found(backbone):
    bank = bank_of_images(20, low=0, high=160)
    normal = draw_images(15, low=0, high=160, seed=2)
    anomalous = draw_images(15, low=96, high=256, seed=3)
    detector = fitted(backbone, bank, epochs=5)
    scores = detector(torch.cat([normal, anomalous]))[:, 0, 0]
    assert roc_auc_score([0] * 15 + [1] * 15, scores.detach()) > 0.9


def test_errors_name_the_cause(backbone):
    message = "2 nearest images exceed the 1 training images"
    with pytest.raises(ModelError, match=message) as caught:
        fitted(backbone, bank_of_images(1))
    assert caught.value.change == {"num_neighbors": "lower"}
    with pytest.raises(ModelError, match="fit or load first"):
        panda(backbone)(draw_images(1))
