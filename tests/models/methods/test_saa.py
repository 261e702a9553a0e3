"""SAA's rules, saliency and map with pretended networks; then with tiny ones of transformers."""

import csv
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import predict
import train_mvtec
from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape, KnowsCategory
from models.errors import ModelError
from models.method import find_method
from models.methods.saa import saa
from models.methods.saa.networks import Networks, Proposals, load_networks
from models.methods.saa.regions import BoxRules, best, corners, phrase, region_map, rescored
from models.methods.saa.saa import Saa, SaaOptions
from models.methods.saa.saliency import (
    cell_features,
    resized_to_cells,
    unlike_other_objects,
    unlike_the_image,
)
from tests.datasets.trees import draw_mvtec_category
from tests.models.banks import Bank, draw_images, seeded
from tests.scripts.runs import measured, refusal
from utils.runs.run import Run

SIDE = 8
DIGEST = "0123456789abcdef" * 2
WHOLE = (0.5, 0.5, 1.0, 1.0)
LEFT = (0.25, 0.5, 0.5, 1.0)
TOP = (0.5, 0.25, 1.0, 0.5)
CORNER = (0.125, 0.125, 0.25, 0.25)


class PretendedGrounder:
    """Knows what is to be seen for each prompt: boxes, each with its score of each token."""

    def __init__(self, seen):
        self.seen, self.asked = seen, []

    def check(self, prompt):
        if len(prompt) > 50:
            raise ModelError("too long")

    def propose(self, image, prompt):
        assert (image.ndim, image.dtype) == (3, torch.uint8)
        self.asked.append(prompt)
        pieces = ["[CLS]", *prompt.split(), ".", "[SEP]"]
        boxes, scores = [], []
        for box, fits in self.seen.get(prompt, {}).items():
            boxes.append(box)
            scores.append([fits.get(piece, 0.0) for piece in pieces])
        return Proposals(
            torch.tensor(boxes).reshape(-1, 4),
            torch.tensor(scores).reshape(-1, len(pieces)),
            tuple(pieces),
        )


class PretendedSegmenter:
    """Its masks are the boxes."""

    def __init__(self):
        self.images = 0

    def embed(self, image):
        self.images += 1
        return image

    def masks(self, embedding, boxes, side):  # noqa: ARG002  the contract has it
        left, top, right, bottom = (corners(boxes) * side).T[:, :, None, None]
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        return (x >= left) & (x < right) & (y >= top) & (y < bottom)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return FrozenExtractor("test_resnet", (1, 2, 3), weights="random", patch_size=1)


@pytest.fixture
def make(backbone, monkeypatch):
    """Makes a detector of pretended networks, fitted unless there is a category missing."""

    def made(seen, *, digest=DIGEST, category="metal nut", **options):
        networks = Networks(PretendedGrounder(seen), PretendedSegmenter(), digest)
        monkeypatch.setattr(saa, "load_networks", lambda *_: networks)
        detector = Saa(FeatureShape((), backbone), SaaOptions(**options))
        detector.category = category
        detector.fit(Bank(draw_images(2)), generator=seeded())
        return detector, networks

    return made


# Rules on boxes


def proposals(*boxes):
    """Boxes, each with its scores of the tokens of "metal nut crack"."""
    pieces = ("[CLS]", "metal", "nut", "crack", "##ed", ".", "[SEP]")
    return Proposals(
        torch.tensor([box for box, _ in boxes]),
        torch.tensor([[0.0, *scores, 0.0, 0.0] for _, scores in boxes]),
        pieces,
    )


def test_a_box_is_kept_by_its_best_token_its_area_and_what_it_is_taken_for():
    found = proposals(
        (CORNER, (0.0, 0.0, 0.5, 0.4)),
        (CORNER, (0.1, 0.1, 0.1, 0.1)),  # not above the threshold
        (LEFT, (0.0, 0.0, 0.9, 0.0)),  # not below the area
        ((0.5, 0.5, 0.0, 0.3), (0.0, 0.0, 0.9, 0.0)),  # no area
        (CORNER, (0.2, 0.3, 0.9, 0.0)),  # "metal nut crack"
        (CORNER, (0.0, 0.3, 0.8, 0.0)),  # "nut crack"
        (CORNER, (0.2, 0.1, 0.7, 0.0)),  # "metal crack"
    )
    boxes, scores = BoxRules(0.1, 0.1, 0.5, "metal nut").kept(found)
    assert boxes.tolist() == [list(CORNER)] * 3
    assert scores.tolist() == pytest.approx([0.5, 0.8, 0.7])
    assert len(BoxRules(0.1, 0.1, math.inf).kept(found)[0]) == 5
    # Words that fit less than the second threshold are not what the box is taken for.
    assert len(BoxRules(0.1, 0.25, 0.5, "metal nut").kept(found)[0]) == 4
    none = Proposals(torch.zeros(0, 4), torch.zeros(0, 7), found.pieces)
    assert [len(part) for part in BoxRules(0.1, 0.1, 0.5, "nut").kept(none)] == [0, 0]


def test_a_phrase_joins_pieces_of_words_and_leaves_the_first_token_out():
    pieces = ("[CLS]", "a", "crack", "##ed", "nut")
    assert phrase(pieces, (True, False, True, True, True)) == "cracked nut"
    assert phrase(pieces, (False, True, False, False, True)) == "a nut"
    assert phrase(pieces, (False,) * 5) == ""


# Scores of regions, and the map


def test_a_region_counts_more_the_more_salient_it_is_inside():
    saliency = torch.arange(4.0).reshape(2, 2) / 10
    masks = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [0, 0]], [[0, 0], [0, 0]]]).bool()
    found = rescored(torch.tensor([0.2, 0.5, 0.7]), masks, saliency, 3.0)
    wanted = [0.2 * math.exp(3 * 0.15), 0.5 * math.exp(0.3), 0.7]  # an empty one stays
    assert found.tolist() == pytest.approx(wanted)


def test_the_best_regions_are_kept_of_equals_the_earlier():
    scores = torch.tensor([0.2, 0.5, 0.9, 0.5])
    masks = torch.arange(4).reshape(4, 1, 1)
    kept, which = best(scores, masks, 2)
    assert kept.tolist() == pytest.approx([0.9, 0.5])
    assert which.flatten().tolist() == [2, 1]
    assert torch.equal(best(scores, masks, None)[1], masks)
    assert len(best(scores, masks, 9)[0]) == 4


def test_a_pixel_under_n_masks_has_their_scores_over_n_and_one():
    masks = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [1, 0]]]).bool()
    found = region_map(torch.tensor([0.6, 0.3]), masks)
    torch.testing.assert_close(found, torch.tensor([[0.9 / 3, 0.6 / 2], [0.3 / 2, 0.0]]))


SEEN = {
    "metal nut": {LEFT: {"nut": 0.8}, WHOLE: {"metal": 0.9}, CORNER: {"nut": 0.05}},
    "defect on metal nut": {
        CORNER: {"defect": 0.6, "metal": 0.3},
        TOP: {"defect": 0.4},
        (0.9, 0.9, 0.1, 0.1): {"defect": 0.2, "metal": 0.5, "nut": 0.5},
    },
    "flaw on metal nut": {CORNER: {"flaw": 0.2}},
    "scratch": {LEFT: {"scratch": 0.9}},
    "anomaly": {WHOLE: {"anomaly": 0.3}, CORNER: {"anomaly": 0.5}},
}


def test_the_map_of_known_boxes(make):
    """The object is the left half, of whose area at most 0.9 may be a defect: the corner is."""
    detector, networks = make(SEEN, saliency_weight=0.0)
    maps = detector(draw_images(2, side=SIDE))
    wanted = torch.zeros(SIDE, SIDE)
    wanted[:2, :2] = (0.6 + 0.2) / 3
    torch.testing.assert_close(maps, wanted.expand(2, SIDE, SIDE))
    general = [f"{word} on metal nut" for word in ("defect", "damage", "flaw")]
    assert networks.grounder.asked == ["metal nut", *general] * 2
    assert networks.segmenter.images == 2


def test_how_large_a_defect_may_be_and_how_many_make_the_map(make):
    images = draw_images(1, side=SIDE)
    wide = make(SEEN, saliency_weight=0.0, area_ratio=1.1)[0](images)[0]
    assert wide[0, 0] == pytest.approx((0.6 + 0.4 + 0.2) / 4)
    assert wide[0, 7] == pytest.approx(0.4 / 2)
    few = make(SEEN, saliency_weight=0.0, area_ratio=1.1, regions=2)[0](images)[0]
    assert few[0, 0] == pytest.approx((0.6 + 0.4) / 3)
    # Without an object, a defect may be anything but the image.
    unseen = SEEN | {"metal nut": {}}
    found = make(unseen, saliency_weight=0.0, prompts=("scratch",))[0](images)[0]
    assert found[7, 0] == pytest.approx(0.9 / 2)
    nothing, networks = make({})
    assert not nothing(images).any()
    assert networks.segmenter.images == 0


def test_masks_that_come_in_parts_make_the_same_map(make, monkeypatch):
    images = draw_images(1, side=SIDE)
    options = {"area_ratio": 1.1, "regions": 2, "saliency_size": 64}
    wanted = make(SEEN, **options)[0](images)
    monkeypatch.setattr(saa, "AT_ONCE", 1)
    assert torch.equal(make(SEEN, **options)[0](images), wanted)


def test_plain_saa_asks_for_anything_and_takes_every_box(make):
    detector, networks = make(SEEN, rules="saa", prompts=("scratch",))
    found = detector(draw_images(1, side=SIDE))[0]
    assert networks.grounder.asked == ["anomaly", "scratch"]
    assert found[0, 0] == pytest.approx((0.3 + 0.5 + 0.9) / 4)
    assert found[7, 0] == pytest.approx((0.3 + 0.9) / 3)
    assert found[7, 7] == pytest.approx(0.3 / 2)


# Saliency


def unit_features(channels, height, width):
    return F.normalize(torch.rand(channels, height, width, generator=seeded()), dim=0)


def test_unlike_the_image_is_the_mean_over_the_least_similar_cells(monkeypatch):
    monkeypatch.setattr("models.methods.saa.saliency.LEAST_SIMILAR", 5)
    monkeypatch.setattr("models.methods.saa.saliency.ROWS", 4)
    features = unit_features(3, 3, 4)
    found = unlike_the_image(features)
    assert found.shape == (3, 4)
    cells = [features[:, y, x] for y in range(3) for x in range(4)]
    for place, cell in enumerate(cells):
        unlike = sorted((0.5 * (1 - float(cell @ other)) for other in cells), reverse=True)
        assert float(found[place // 4, place % 4]) == pytest.approx(sum(unlike[:5]) / 5, abs=1e-6)
    monkeypatch.setattr("models.methods.saa.saliency.LEAST_SIMILAR", 400)
    assert float(unlike_the_image(features)[0, 0]) < float(found[0, 0])


def test_unlike_other_objects_is_the_distance_to_their_most_similar_cell(monkeypatch):
    monkeypatch.setattr("models.methods.saa.saliency.ROWS", 2)
    features = unit_features(3, 4, 4)
    objects = torch.rand(3, 4, 4, generator=seeded(1)) > 0.5  # they overlap
    found = unlike_other_objects(features, objects)
    for y in range(4):
        for x in range(4):
            wanted = 0.0
            for own in range(3):
                others = [
                    features[:, v, u]
                    for other in range(3)
                    for v in range(4)
                    for u in range(4)
                    if other != own and objects[other, v, u] and not objects[own, v, u]
                ]
                if objects[own, y, x] and others:
                    similar = max(float(features[:, y, x] @ other) for other in others)
                    wanted = max(wanted, 0.5 * (1 - similar))
            assert float(found[y, x]) == pytest.approx(wanted, abs=1e-6)


def test_without_another_object_nothing_is_salient():
    features = unit_features(3, 4, 4)
    assert not unlike_other_objects(features, torch.ones(1, 4, 4, dtype=torch.bool)).any()
    assert not unlike_other_objects(features, torch.zeros(0, 4, 4, dtype=torch.bool)).any()


def test_features_have_unit_length_on_the_finest_grid(backbone):
    features = cell_features(backbone, draw_images(1, side=40)[0], 64)
    _, height, width = features.shape
    assert (height, width) == (64 // backbone.strides[0],) * 2
    torch.testing.assert_close(features.norm(dim=0), torch.ones(height, width))


def test_masks_on_cells_are_those_of_a_pixel():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4, 4:] = True
    wanted = torch.tensor([[[0, 1], [0, 0]]]).bool()
    assert torch.equal(resized_to_cells(mask, (2, 2)), wanted)


def half_noise(side=64):
    """Images that are flat but for noise in the upper left quarter."""
    images = torch.full((1, 3, side, side), 120, dtype=torch.uint8)
    noise = torch.randint(0, 255, (3, side // 4, side // 4), generator=seeded())
    images[0, :, : side // 4, : side // 4] = noise.byte()
    return images


def test_a_region_that_is_unlike_the_image_scores_higher(make):
    """Two boxes of one score: one on the noise, one on what the rest of the image looks like."""
    flat = (0.75, 0.75, 0.25, 0.25)
    seen = {"defect on metal nut": {CORNER: {"defect": 0.5}, flat: {"defect": 0.5}}}
    found = make(seen, saliency_size=64)[0](half_noise())[0]
    assert found[2, 2] > found[48, 48] > 0.25
    equal = make(seen, saliency_weight=0.0)[0](half_noise())[0]
    assert equal[2, 2] == equal[48, 48] == 0.25


def test_of_several_objects_the_one_unlike_the_others_is_salient(make):
    three = [(0.125, 0.125, 0.25, 0.25), (0.75, 0.125, 0.25, 0.25), (0.75, 0.75, 0.25, 0.25)]
    seen = {
        "metal nut": {box: {"nut": 0.9} for box in [*three, WHOLE]},  # the last is too large
        "defect on metal nut": {
            (x, y, 0.2, 0.2): {"defect": 0.5} for x, y, *_ in three
        },
    }  # fmt: skip
    found = make(seen, num_objects=3, saliency_size=64)[0](half_noise())[0]
    noisy, *flat = (float(found[int(y * 64), int(x * 64)]) for x, y, *_ in three)
    assert noisy > 1.01 * max(flat)
    assert min(flat) >= 0.25


# The head


def test_the_head_is_a_name_and_a_digest(make):
    detector, _ = make(SEEN)
    assert isinstance(detector, KnowsCategory)
    assert detector.num_trainable == 0
    state = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    assert bytes(state["name"].tolist()).decode() == "metal nut"
    assert sum(tensor.numel() for tensor in state.values()) == 9 + 16
    images = draw_images(1, side=SIDE)
    wanted = detector(images)
    other, networks = make(SEEN, category="cable")
    other.load_state_dict(state)
    assert torch.equal(other(images), wanted)
    assert networks.grounder.asked[0] == "metal nut"


def test_a_head_of_other_networks_is_refused(make):
    state = make(SEEN)[0].state_dict()
    other = make(SEEN, digest=DIGEST[::-1], grounding_dino="a", sam="b")[0]
    with pytest.raises(ModelError, match=r"^a and b have other weights than those"):
        other.load_state_dict(state)


def test_a_head_that_was_not_fitted_says_so(backbone, make):
    make(SEEN)
    with pytest.raises(ModelError, match="neither fitted nor loaded"):
        Saa(FeatureShape((), backbone), SaaOptions())(draw_images(1, side=SIDE))


ZERO_SHOT = "saa is zero-shot: no training image is used, only words and trained networks."


def test_what_images_show_is_the_category_or_what_the_user_says(make):
    detector, _ = make(SEEN, category="Metal  nut")
    assert (detector._object_name, detector.remarks) == ("metal nut", [ZERO_SHOT])
    detector, _ = make(SEEN, object_name="Steel nut")
    assert (detector._object_name, detector.remarks) == ("steel nut", [ZERO_SHOT])
    detector, _ = make(SEEN, category=None)
    assert detector._object_name == "object"
    assert "--method.object-name NAME gives it" in detector.remarks[1]
    detector, _ = make(SEEN, prompts=("scratch",))
    assert "'scratch' too" in detector.remarks[1]
    assert make(SEEN, category=None, rules="saa")[0].remarks == [ZERO_SHOT]


def test_a_monitor_sees_one_step_and_prompts_are_checked(make):
    detector, _ = make(SEEN)
    seen = []
    detector.fit(Bank(draw_images(2)), generator=seeded(), monitor=lambda *step: seen.append(step))
    assert seen == [(1, {})]
    with pytest.raises(ModelError, match="too long"):
        make(SEEN, prompts=("crack " * 20,))


def test_it_cannot_be_exported(make):
    with pytest.raises(ModelError, match="saa cannot be exported"):
        make(SEEN)[0].exported()


def test_options_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match=r"--method\.prompts has one without a word"):
        SaaOptions(prompts=("crack", " ."))
    with pytest.raises(ValueError, match=r"--method\.grounding-size 64 must be above 64"):
        SaaOptions(grounding_size=64)


def test_a_backbone_that_takes_no_images_of_the_size_for_saliency_is_refused(make):
    def require_size(size):
        raise ModelError(f"takes none of {size}")

    make(SEEN)
    shape = FeatureShape((), SimpleNamespace(require_size=require_size))
    with pytest.raises(
        ModelError, match="backbone images of 1024 pixels: takes none of"
    ) as refused:
        Saa(shape, SaaOptions(num_objects=2))
    assert "saliency_size" in refused.value.change
    Saa(shape, SaaOptions(rules="saa"))


# What is missing


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    draw_mvtec_category(root, "metal_nut", num_train=2, num_defective=1)
    return root


@pytest.fixture
def refused(images, tmp_path, capsys, monkeypatch):
    """Runs the training script, of which nothing but the options may be looked at."""

    def run(*options):
        def forbidden(*_):
            raise AssertionError("an image is read")

        monkeypatch.setattr("datasets.reading.loading.read_image", forbidden)
        output = tmp_path / "runs"
        words = ["folder", "saa", "--data-root", images, "--output", output]
        words += ["--backbone", "tf_efficientnet_lite0", *options]
        said = refusal(capsys, train_mvtec.main, *words)
        assert not output.exists()
        return said

    return run


def test_without_the_package_the_way_to_it_is_said(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "models.methods.saa.pretrained", raising=False)
    said = refused()
    assert "saa needs the package transformers" in said
    assert "pip install -r requirements-saa.txt" in said
    assert "IDEA-Research/grounding-dino-tiny" in said


# With the package


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny networks of random weights, in folders as the hub has them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    words = ["defect", "damage", "flaw", "on", "metal", "nut", "object", "crack", "##ed"]
    vocabulary = [f"[unused{i}]" for i in range(1030)]
    vocabulary[1 : 1 + len(words)] = words
    vocabulary[100:104] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary[0], vocabulary[1012], vocabulary[1029] = "[PAD]", ".", "?"
    dino = transformers.GroundingDinoForObjectDetection(
        transformers.GroundingDinoConfig(
            backbone_config=transformers.SwinConfig(
                image_size=64,
                embed_dim=8,
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 2, 2],
                window_size=2,
                out_features=["stage2", "stage3", "stage4"],
            ),
            text_config=transformers.BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
            ),
            **{"d_model": 32, "num_queries": 12, "max_text_len": 24},
            **{"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
            **{"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16},
        )
    )
    dino.save_pretrained(root / "dino")
    (root / "dino/vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    shape = {"hidden_size": 16, "image_size": 64, "patch_size": 8}
    sam = transformers.SamModel(
        transformers.SamConfig(
            vision_config=transformers.SamVisionConfig(
                **shape,
                **{"output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
                **{"window_size": 4, "global_attn_indexes": [1], "mlp_dim": 16},
                num_pos_feats=8,
            ),
            prompt_encoder_config=transformers.SamPromptEncoderConfig(
                **shape, mask_input_channels=4
            ),
            mask_decoder_config=transformers.SamMaskDecoderConfig(
                **{"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2},
                iou_head_hidden_dim=16,
            ),
        )
    )
    sam.save_pretrained(root / "sam")
    return SimpleNamespace(dino=root / "dino", sam=root / "sam")


@pytest.fixture
def copies(folders, tmp_path):
    """Copies of both folders, to be spoilt, and what makes a detector of them say why."""
    shutil.copytree(folders.dino, tmp_path / "dino")
    shutil.copytree(folders.sam, tmp_path / "sam")

    def said():
        with pytest.raises(ModelError) as refused:
            load_networks(str(tmp_path / "dino"), str(tmp_path / "sam"), 96)
        assert "facebook/sam-vit-huge" in str(refused.value)
        return str(refused.value)

    return SimpleNamespace(dino=tmp_path / "dino", sam=tmp_path / "sam", said=said)


def test_both_folders_must_be_given(folders, refused):
    assert "saa needs --method.grounding-dino and --method.sam: " in refused()
    assert "saa needs --method.sam: " in refused("--method.grounding-dino", folders.dino)
    said = refused("--method.grounding-dino", folders.dino, "--method.sam", folders.sam / "not")
    assert f"there is no folder {folders.sam / 'not'}" in said


def test_exchanged_folders_are_noticed(folders):
    with pytest.raises(ModelError, match=r"has no tokenizer: neither tokenizer\.json nor "):
        load_networks(str(folders.sam), str(folders.dino), 96)
    with pytest.raises(ModelError, match="kind 'grounding-dino', not 'sam'"):
        load_networks(str(folders.dino), str(folders.dino), 96)


def test_a_file_that_is_missing_or_another_is_named(copies):
    weights = copies.sam / "model.safetensors"
    whole = load_file(weights)
    weights.unlink()
    assert f"weights folder {copies.sam} has no .safetensors file" in copies.said()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert f"weights file {weights} is a Git LFS pointer" in copies.said()
    (copies.sam / "pytorch_model.bin").write_bytes(b"never read")
    weights.write_bytes(b"\x80 no tensors")
    assert f"weights file {weights} cannot be read" in copies.said()
    save_file({n: t for n, t in whole.items() if "iou_token" not in n}, weights)
    assert "its weights lack 1 tensors of the network, mask_decoder.iou_token" in copies.said()
    name = "mask_decoder.iou_token.weight"
    save_file(whole | {name: whole[name].repeat(1, 2)}, weights)
    assert f"{copies.sam} cannot be read" in copies.said()
    (copies.sam / "config.json").write_text("[]")
    assert "config.json is no configuration of a network" in copies.said()
    (copies.sam / "config.json").unlink()
    assert f"{copies.sam} has no config.json" in copies.said()


def test_a_tokenizer_must_be_the_networks(copies):
    vocabulary = copies.dino / "vocab.txt"
    words = vocabulary.read_text().replace("[CLS]\n", "[unused]\n[CLS]\n")
    vocabulary.write_text(words)
    assert "its tokenizer is not that of BERT, uncased" in copies.said()
    vocabulary.unlink()
    assert "has no tokenizer: neither tokenizer.json nor vocab.txt" in copies.said()


def test_nothing_but_tensors_is_read_and_nothing_is_asked_of_the_hub(copies, monkeypatch):
    """Code beside the weights, and a configuration that names it, are left alone."""
    config = json.loads((copies.dino / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "planted.Planted", "AutoConfig": "planted.Planted"}
    (copies.dino / "config.json").write_text(json.dumps(config))
    (copies.dino / "planted.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network is asked"))
    before = torch.get_rng_state()
    networks = load_networks(str(copies.dino), str(copies.sam), 96)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(networks.digest) == 32


def test_what_is_read_is_kept_until_a_file_changes(copies):
    given = (str(copies.dino), str(copies.sam), 96)
    first = load_networks(*given)
    assert load_networks(*given).segmenter._network is first.segmenter._network
    tensors = load_file(copies.sam / "model.safetensors")
    name = "mask_decoder.iou_token.weight"
    save_file(tensors | {name: tensors[name] + 1}, copies.sam / "model.safetensors")
    other = load_networks(*given)
    assert other.digest != first.digest
    assert len(set(other.digest) | set("0123456789abcdef")) == 16


def test_the_networks_of_the_package_are_asked_rightly(folders):
    networks = load_networks(str(folders.dino), str(folders.sam), 96)
    image = draw_images(1, side=48)[0]
    with torch.no_grad():
        found = networks.grounder.propose(image, " Defect on CRACKED nut ")
        embedding = networks.segmenter.embed(image)
        masks = networks.segmenter.masks(embedding, found.boxes.repeat(3, 1), 48)
    pieces = ("[CLS]", "defect", "on", "crack", "##ed", "nut", ".", "[SEP]")
    assert found.pieces == pieces
    assert (found.boxes.shape, found.token_scores.shape) == ((12, 4), (12, len(pieces)))
    assert 0 <= found.token_scores.min() < found.token_scores.max() <= 1
    assert (masks.shape, masks.dtype) == ((36, 48, 48), torch.bool)
    assert torch.equal(masks[:12], masks[24:])
    with pytest.raises(ModelError, match=r"up to 24 tokens, and the prompt .* has 33") as long:
        networks.grounder.check("crack " * 30)
    assert "prompts" in long.value.change


@pytest.mark.parametrize("rules", ["saa_plus", "saa"])
def test_two_images_are_scored_by_the_networks_of_the_package(folders, backbone, rules):
    options = SaaOptions(
        **{"grounding_dino": str(folders.dino), "sam": str(folders.sam), "rules": rules},
        **{"grounding_size": 96, "saliency_size": 64, "area_ratio": 9.0},
    )
    detector = find_method("saa").detector_class()(FeatureShape((), backbone), options)
    detector.category = "cable"  # is not in the vocabulary: no box is taken for it
    images = draw_images(2, side=48)
    detector.fit(Bank(images), generator=seeded())
    maps, scores = detector.score_stages([images])
    assert scores is None
    assert (maps.shape, maps.dtype) == ((2, 48, 48), torch.float32)
    assert maps.isfinite().all()
    assert maps.amax(dim=(1, 2)).min() > 0
    torch.testing.assert_close(detector(images[1:]), maps[1:])
    assert {name for name, _ in detector.named_parameters()} == set()


def test_a_run_is_predicted_with_from_its_folder(folders, images, tmp_path):
    given = ("--method.grounding-dino", str(folders.dino), "--method.sam", str(folders.sam))
    small = ("--image-size", "48", "--method.grounding-size", "96", "--method.saliency-size", "64")
    words = ["folder", "saa", "--data-root", str(images), "--output", str(tmp_path / "runs")]
    words += ["--backbone", "tf_efficientnet_lite0", "--workers", "0", "--overlays", "0"]
    folder = train_mvtec.main([*words, *given, *small])
    (row,) = measured(folder)
    assert 0 <= row["image_auroc"] <= 1
    assert row["trainable"] == 0
    assert row["head_bytes"] < 1000
    assert ZERO_SHOT in (folder / "table.md").read_text(encoding="utf-8")
    recorded = Run.read(folder).load_scores("metal_nut", 0)
    out = tmp_path / "scored"
    test = str(images / "metal_nut/test")
    predict.main([str(folder), test, "--out", str(out), "--maps", "none", "--workers", "0"])
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        found = {line["path"]: float(line["score"]) for line in csv.DictReader(file)}
    wanted = dict(zip(recorded["path"].tolist(), recorded["score"].tolist(), strict=True))
    assert found.keys() == wanted.keys()
    for path, score in found.items():
        assert score == pytest.approx(wanted[path], rel=1e-4)
