import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cv2
import PIL
import pytest
import torch

from configs.cache import cache_folder
from datasets.reading import fingerprints
from datasets.reading.loading import BatchLoader, ImageDataset
from datasets.reading.transforms import PairTransform
from models.backbone import extractor as backbones
from models.backbone.extractor import FrozenExtractor
from tests.datasets.trees import draw_mvtec_category
from tests.utils.features.test_bank import Loader, Scaled, numbered
from utils.errors import UsageError
from utils.features import bank as feature_bank
from utils.features import store as feature_store
from utils.features.bank import FeatureBank
from utils.features.store import FeatureStore, default_folder, key_of

ROOT = Path(feature_store.__file__).parents[2]


def extract(folder, *, count=10, store="disk", loader=None, extractor=None, **options):
    extractor = extractor or Scaled()
    loader = loader or Loader(numbered(count))
    bank = FeatureBank.extract(extractor, loader, store=store, folder=folder, **options)
    return bank, extractor.num_seen


def contents(bank):
    return torch.cat(list(bank.batches(3)))


def test_features_on_disk_are_those_in_memory(tmp_path):
    in_memory, _ = extract(None, store="host")
    written, seen = extract(tmp_path)
    assert seen == 10
    again, seen = extract(tmp_path)
    assert seen == 0, "the backbone ran again"
    assert written.extract_seconds > again.pass_seconds == written.pass_seconds > 0
    for bank in (written, again):
        assert torch.equal(contents(bank), contents(in_memory))
        assert (bank.indices, bank.channels) == (in_memory.indices, in_memory.channels)
        assert bank.nbytes == in_memory.nbytes
        rows = torch.tensor([7, 2, 2])
        assert torch.equal(contents(bank.subset(rows)), contents(in_memory.subset(rows)))
    assert torch.equal(
        contents(FeatureBank.join(again, in_memory)), contents(FeatureBank.join(*2 * [in_memory]))
    )
    (entry,) = FeatureStore(tmp_path).entries()
    sizes = [path.stat().st_size for path in sorted(entry.folder.glob("*.bin"))]
    assert sizes == [960, 240, 10 * 32 * 32]
    assert sorted(path.name for path in tmp_path.iterdir()) == [entry.folder.name]


def test_reading_changes_nothing_on_disk(tmp_path):
    bank, _ = extract(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    bank.stages[0].zero_()
    del bank
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_anything_the_features_depend_on_makes_another_entry(tmp_path):
    extract(tmp_path)
    other = Loader(numbered(10))
    other.name = "others"
    assert extract(tmp_path, loader=other)[1] == 10
    assert extract(tmp_path, extractor=Scaled(2.0))[1] == 10
    assert extract(tmp_path, dtype=torch.float32)[1] == 10
    assert len(FeatureStore(tmp_path).entries()) == 4
    assert extract(tmp_path)[1] == 0


def stored_keys(folder):
    return {entry.folder.name for entry in FeatureStore(folder).entries()}


def extract_files(images, folder):
    """Store the features that a backbone has of the images in a folder."""
    dataset = ImageDataset(sorted(images.iterdir()), PairTransform(32, None, "opencv_square"))
    loader = BatchLoader(dataset, batch_size=4, workers=0, skip_unreadable=False)
    extractor = FrozenExtractor("tf_efficientnet_lite0", (1,))
    FeatureBank.extract(extractor, loader, store="disk", folder=folder)


@pytest.fixture
def images(tmp_path_factory):
    return draw_mvtec_category(tmp_path_factory.mktemp("data"), "nuts") / "train/good"


def test_another_version_of_what_makes_features_makes_another_entry(tmp_path, images, monkeypatch):
    extract_files(images, tmp_path)
    first = stored_keys(tmp_path)
    versions = [(cv2, "__version__"), (PIL, "__version__"), (feature_store, "FORMAT")]
    for module, name in [*versions, (fingerprints, "VERSION"), (backbones, "VERSION")]:
        before = stored_keys(tmp_path)
        monkeypatch.setattr(module, name, "0.0")
        extract_files(images, tmp_path)
        assert len(stored_keys(tmp_path) - before) == 1, name
        monkeypatch.undo()
    every = stored_keys(tmp_path)
    extract_files(images, tmp_path)
    assert first < every == stored_keys(tmp_path)


def test_the_text_of_the_sources_has_no_say(tmp_path, tmp_path_factory, images):
    extract_files(images, tmp_path)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for package in ("configs", "datasets", "models", "utils", "tests"):
        shutil.copytree(ROOT / package, elsewhere / package)
    for path in elsewhere.rglob("*.py"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n# More text, and not one pixel changed.\n")
    script = (
        "import sys, pathlib, datasets; from tests.utils.features.test_store import extract_files; "
        "extract_files(*map(pathlib.Path, sys.argv[1:])); print(datasets.__file__)"
    )
    command = [sys.executable, "-c", script, str(images), str(tmp_path)]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(elsewhere / "datasets/__init__.py")
    assert len(stored_keys(tmp_path)) == 1


def test_unreadable_images_are_remembered(tmp_path):
    for _ in range(2):
        bank, _ = extract(tmp_path, loader=Loader(numbered(10), missing=(0, 7)))
        assert bank.indices == [1, 2, 3, 4, 5, 6, 8, 9]
        assert bank.skipped == ["image 0 is unreadable", "image 7 is unreadable"]
        assert len(bank) == len(contents(bank)) == 8


def test_an_interrupted_extraction_leaves_nothing(tmp_path):
    class Breaking(Loader):
        def __iter__(self):
            yield from list(super().__iter__())[:2]
            raise KeyboardInterrupt

    for error, broken in (
        (KeyboardInterrupt, {"loader": Breaking(numbered(10))}),
        (FloatingPointError, {"extractor": Scaled(1e6)}),
        (UsageError, {"loader": Loader(numbered(2), missing=(0, 1))}),
    ):
        with pytest.raises(error):
            extract(tmp_path, **broken)
        assert list(tmp_path.iterdir()) == []


PROGRAM = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests.utils.features.test_bank import Loader, Scaled, numbered
    from utils.features.bank import FeatureBank

    class Slow(Loader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                print("batch", flush=True)
                time.sleep({pause})

    extractor = Scaled()
    bank = FeatureBank.extract(extractor, Slow(numbered(40)), store="disk", folder=Path({folder!r}))
    print("sum", float(sum(features.sum() for features in bank.batches(7))))
"""


def start(folder, pause):
    program = textwrap.dedent(PROGRAM.format(root=str(ROOT), folder=str(folder), pause=pause))
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_killed_extraction_leaves_no_entry_and_its_leftovers_go(tmp_path):
    process = start(tmp_path, pause=60)
    assert process.stdout.readline() == "batch\n"
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith("partial-")
    assert FeatureStore(tmp_path).entries() == []
    extract(tmp_path)  # while another process writes
    assert partial.is_dir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert partial.is_dir()
    extract(tmp_path, extractor=Scaled(3.0))
    assert not partial.exists()
    assert len(FeatureStore(tmp_path).entries()) == 2


def test_processes_that_write_the_same_entry_agree(tmp_path):
    processes = [start(tmp_path, pause=0.02) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0].splitlines()[-1] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(printed) == 1
    assert next(iter(printed)).startswith("sum")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_leftover_of_another_machine_goes_after_a_week(tmp_path):
    old, new = (tmp_path / f"partial-elsewhere-{name}-x" for name in ("1", "2"))
    mine = tmp_path / f"partial-{socket.gethostname()}-{os.getpid()}-x"
    for folder in (old, new, mine):
        folder.mkdir()
    week_ago = time.time() - 8 * 24 * 3600
    os.utime(old, (week_ago, week_ago))
    FeatureStore(tmp_path).delete_leftovers()
    assert not old.exists()
    assert new.exists()
    assert mine.exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "json", "fields", "elsewhere"])
def test_a_damaged_entry_is_named_with_the_way_out(tmp_path, damage):
    extract(tmp_path)
    (entry,) = FeatureStore(tmp_path).entries()
    stage, description = entry.folder / "stage1.bin", entry.folder / "entry.json"
    if damage == "cut":
        os.truncate(stage, 100)
    elif damage == "missing":
        stage.unlink()
    else:
        text = description.read_text()
        elsewhere = text.replace("stage0.bin", "../secret")
        assert elsewhere != text
        description.write_text({"json": "{", "fields": "{}", "elsewhere": elsewhere}[damage])
    way_out = f"is damaged; delete it with .*--clear {entry.folder.name}"
    with pytest.raises(UsageError, match=way_out):
        extract(tmp_path)
    FeatureStore(tmp_path).clear([entry.folder.name])
    assert extract(tmp_path)[1] == 10


def test_a_full_disk_is_said_before_and_during(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UsageError, match=r"the features need 0\.0 GB and 0\.0 GB are free; free"):
        extract(tmp_path)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store.EntryWriter, "append", full)
    with pytest.raises(UsageError, match=r"cannot store features \(No space left on device\)"):
        extract(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file/below: cannot store features"):
        extract(tmp_path / "file/below")


def test_auto_takes_memory_while_there_is_room_and_what_is_on_disk_first(tmp_path, monkeypatch):
    bank, _ = extract(tmp_path, store="auto")
    assert not tmp_path.exists() or not list(tmp_path.iterdir())
    share = bank.nbytes / feature_bank.psutil.virtual_memory().available
    monkeypatch.setattr(feature_bank, "HOST_SHARE", share / 2)
    _, seen = extract(tmp_path, store="auto")
    assert seen == 10
    assert len(FeatureStore(tmp_path).entries()) == 1
    monkeypatch.undo()
    assert extract(tmp_path, store="auto")[1] == 0
    assert extract(tmp_path, store="host")[1] == 10


def test_list_and_clear(tmp_path, capsys):
    assert feature_bank.main(["--list", "--folder", str(tmp_path / "none")]) is None
    assert "0 entries, 0.0 MB" in capsys.readouterr().out
    extract(tmp_path, description="brick: train")
    extract(tmp_path, count=3, extractor=Scaled(2.0), description="brick: test")
    feature_bank.main(["--list", "--folder", str(tmp_path)])
    out = capsys.readouterr().out
    assert "brick: train" in out
    assert "10 images" in out
    assert "2 entries" in out
    first, other = (entry.folder.name for entry in FeatureStore(tmp_path).entries())
    feature_bank.main(["--clear", first, "--folder", str(tmp_path)])
    assert stored_keys(tmp_path) == {other}
    with pytest.raises(SystemExit) as exit_:
        feature_bank.main(["--clear", "nothing", "--folder", str(tmp_path)])
    assert exit_.value.code == 2
    assert "has no entry nothing" in capsys.readouterr().err
    feature_bank.main(["--clear", "--folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_key_depends_on_content_not_on_order():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})


def test_features_lie_in_the_cache_folder(monkeypatch):
    assert default_folder() == cache_folder() / "features"
    monkeypatch.delenv("NOCO_CACHE")
    assert default_folder() == cache_folder() / "features"
