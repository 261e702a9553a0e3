import pytest

from models.discovery.anomalyncd import heads
from tests.models.discovery.shapes import write_pieces


@pytest.fixture(scope="module")
def narrow_projection():
    """Nearly all of the time goes into its 5 million weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "HIDDEN", 64)
        yield


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    shapes = ("disc", "ring")
    return [(p, kind) for kind, shape in enumerate(shapes) for p in write_pieces(folder, shape, 5)]


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabelled")
    return [p for shape in ("bar", "disc", "good") for p in write_pieces(folder, shape, 3, seed=1)]
