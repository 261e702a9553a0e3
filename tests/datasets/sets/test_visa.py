import pytest

from datasets.reading.masks import read_masks
from datasets.reading.transforms import PairTransform
from datasets.samples import DataError, Sample
from datasets.sets.visa import DATA_SET, VisaOptions, read_category
from datasets.tasks.structured import list_categories, task_of
from tests.datasets.trees import draw_mvtec_category, draw_visa_category, write_visa_csv

AUTO = VisaOptions()


def names(samples):
    return [sample.path.name for sample in samples]


@pytest.fixture
def visa(tmp_path):
    draw_visa_category(tmp_path, "candle", num_normal=6)
    draw_visa_category(tmp_path, "pcb1", num_normal=5, seed=1)
    return tmp_path


@pytest.mark.parametrize("split", ["auto", "csv"])
def test_visa_official_split(visa, split):
    write_visa_csv(visa, ["candle", "pcb1"])
    category = read_category(visa, "candle", VisaOptions(split=split))
    data = visa / "candle/Data"
    assert category.name == "candle"
    assert category.has_masks
    assert names(category.train) == ["0002.JPG", "0003.JPG", "0004.JPG", "0005.JPG"]
    assert {sample.label for sample in category.train} == {0}
    assert category.test == (
        Sample(data / "Images/Normal/0000.JPG", label=0),
        Sample(data / "Images/Normal/0001.JPG", label=0),
        *(
            Sample(
                data / f"Images/Anomaly/{index:03d}.JPG",
                label=1,
                defect="anomaly",
                mask_path=data / f"Masks/Anomaly/{index:03d}.png",
            )
            for index in range(2)
        ),
    )
    # VisA's masks hold small numbers, not 255.
    task, transform = task_of(category), PairTransform(32, None, "lanczos_shorter")
    masks = read_masks(task.test.paths, task.masks, transform)
    assert masks[2:].any((1, 2)).all()
    assert list_categories(DATA_SET, visa, ["pcb1", "candle"]) == ("pcb1", "candle")


@pytest.mark.parametrize("split", ["auto", "last100"])
def test_visa_last_100(tmp_path, split):
    draw_visa_category(tmp_path, "candle", num_normal=104, size=(16, 12))
    if split == "last100":
        write_visa_csv(tmp_path, ["candle"])
    category = read_category(tmp_path, "candle", VisaOptions(split=split))
    assert names(category.train) == [f"{index:04d}.JPG" for index in range(4)]
    assert names(category.test[:100]) == [f"{index:04d}.JPG" for index in range(4, 104)]
    assert [sample.label for sample in category.test] == [0] * 100 + [1] * 2
    assert category.test[-1].mask_path == tmp_path / "candle/Data/Masks/Anomaly/001.png"
    assert category.has_masks


def test_visa_without_masks(tmp_path):
    draw_visa_category(tmp_path, "candle", num_normal=101, size=(16, 12), masks=False)
    assert not read_category(tmp_path, "candle", AUTO).has_masks


def test_visa_errors(visa):
    with pytest.raises(DataError, match=r"official split .*1cls\.csv is missing.*last100"):
        read_category(visa, "candle", VisaOptions(split="csv"))
    with pytest.raises(DataError, match="'candle' has 6 normal images: the split last100"):
        read_category(visa, "candle", VisaOptions(split="last100"))
    draw_mvtec_category(visa, "fryum")
    with pytest.raises(DataError, match=r"'fryum' has no images in .*read as `folder`"):
        read_category(visa, "fryum", AUTO)


def test_visa_csv_errors(visa):
    path = write_visa_csv(visa, ["candle"])
    text = path.read_text()
    with pytest.raises(DataError, match="no rows for the category 'pcb1'"):
        read_category(visa, "pcb1", AUTO)
    path.write_text(text.replace("object,split", "object,part"))
    with pytest.raises(DataError, match=r"1cls\.csv lacks the column split"):
        read_category(visa, "candle", AUTO)
    path.write_text(text.replace("train,normal", "val,normal"))
    with pytest.raises(DataError, match="into the split 'val'"):
        read_category(visa, "candle", AUTO)
    path.write_text(text.replace("test,anomaly", "train,anomaly"))
    with pytest.raises(DataError, match=r"trains on the anomalous image .*Anomaly/000\.JPG"):
        read_category(visa, "candle", AUTO)
    path.write_text(text.replace("train,normal", "test,normal"))
    with pytest.raises(DataError, match="'candle' of VisA has no training images"):
        read_category(visa, "candle", AUTO)
    path.write_text(text)
    (visa / "candle/Data/Masks/Anomaly/001.png").unlink()
    with pytest.raises(DataError, match=r"Anomaly/001\.JPG has no mask: .*Masks/Anomaly/001\.png"):
        read_category(visa, "candle", AUTO)
    (visa / "candle/Data/Images/Normal/0003.JPG").unlink()
    with pytest.raises(DataError, match=r"names an image that is missing: .*Normal/0003\.JPG"):
        read_category(visa, "candle", AUTO)
