import importlib
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

import models.methods

PACKAGE = "models.methods"


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory):
    """A whole random model of test_resnet, as if it were trained."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    model = timm.create_model("test_resnet", pretrained=False, num_classes=5)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def write_methods(tmp_path, monkeypatch):
    """Writes files of methods, by name, that are there as long as the test; returns their folder.

    A name may have folders: `folder__name`.
    """
    known = set(sys.modules)
    monkeypatch.setattr(models.methods, "__path__", [*models.methods.__path__, str(tmp_path)])

    def write(**sources):
        for name, source in sources.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(source, encoding="utf-8")
        importlib.invalidate_caches()
        return tmp_path

    yield write
    for name in [n for n in sys.modules if n.startswith(f"{PACKAGE}.") and n not in known]:
        module = sys.modules.pop(name)
        if str(tmp_path) in str(module.__spec__.origin or module.__path__):
            vars(models.methods).pop(name.removeprefix(f"{PACKAGE}.").partition(".")[0], None)
        else:
            sys.modules[name] = module  # one of ours, that the test was the first to load
