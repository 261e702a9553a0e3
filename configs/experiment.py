"""What all experiments share: data, backbone, device, selection and output."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)  # fmt: skip

from tyro.conf import Suppress

from configs.options import (
    Beside,
    Between0And1,
    BitDepth,
    DataOptions,
    Fraction,
    How,
    MethodOptions,
    NotNegativeInt,
    OptionalInt,
    OptionalNotNegative,
    Part,
    PositiveInt,
    Role,
    Since,
    check_bounds,
    check_types,
    fields_marked,
    marks_of,
)
from configs.tiles import Tiling, resized_for

Kind = TypeVar("Kind", bound="Experiment")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One data set, one backbone, one method; every field is an option of the scripts."""

    task: ClassVar[str]
    """Kind of task, as presets name it."""

    dataset: Suppress[str]
    method_name: Suppress[str]
    data_root: Path
    """Folder of the data set (`demo` is built in it; `digits` needs none)."""
    categories: Part[tuple[str, ...]] = ()
    """Categories or normal classes to run; all by default."""
    seeds: Part[tuple[int, ...]] = (0,)
    """Seeds; the table shows mean and standard deviation over them."""

    backbone: str
    """Any timm model, e.g. wide_resnet50_2.tv_in1k, resnet152.tv_in1k, tf_efficientnet_lite0."""
    weights: str = "auto"
    """auto, random (said in every table), or a .safetensors or .pth file, or a folder of shards."""
    layers: tuple[int, ...]
    """Stages of the backbone, as timm counts them: 0 is the stem, then 1 to 4."""
    feature_location: Literal["bottleneck", "expansion"] = "bottleneck"
    """Maps after or before the projections of an EfficientNet's blocks."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Of the backbone: tf32 is fp32 with products of 10 bits on a GPU; bf16 and fp16 are autocast
    but for convolutions over fewer than 16 channels (AUROC moved by less than 0.1 point).
    Heads stay in fp32."""

    deterministic: Annotated[Beside[bool], Since.LATER] = False
    """Use only operations that give the same bits each time on a GPU, as on a CPU; slower there."""
    compile: Beside[bool] = False
    """Compile the backbone, and networks that train on images (torch.compile): pays on many images;
    on a CPU it needs g++ or clang."""

    image_size: PositiveInt
    """Pixels the images are resized to."""
    crop_size: OptionalInt
    """Centre crop in pixels; none keeps the whole image, squeezed to a square."""
    resize: Literal["opencv_square", "lanczos_shorter", "bilinear_shorter", "bilinear_padded"]
    """Resize to a square by OpenCV, or the shorter side by Pillow (Lanczos, bilinear); or the
    longer side, with the image mirrored into the margins: a fit sees what the image shows, and
    neither maps nor their scores and metrics count there (image scores of a method's own do)."""

    bit_depth: Annotated[BitDepth, Since.LATER] = 16
    """Bits of 16-bit files that are used (of a 12-bit camera: 12); the highest 8 of them count."""
    max_pixels: Annotated[PositiveInt, Since.LATER] = 178_956_970
    """Larger images are refused: a damaged header may claim terabytes."""

    select: Literal["last", "synthetic", "best_test"] = "last"
    """Which epoch or time counts: the last, the best on synthetic anomalies, or on the test set."""
    grid: tuple[str, ...] = ()
    """Options `--select synthetic` chooses too, e.g. ridge=0.1,1 feature_norm=none,std."""
    monitor_test: Beside[bool] = False
    """Log the test metrics of every epoch or candidate; chooses nothing."""
    online: Beside[bool] = False
    """Also learn from one image at a time and write the curve over their number (noco_cf)."""
    skip_unreadable: Beside[bool] = False
    """Leave unreadable images out and count them in the table instead of stopping."""
    calibration_share: Annotated[Fraction, Since.LATER] = 0.0
    """Share of the normal training images kept out of the fit to set thresholds; the p-values it
    gives cost some accuracy."""
    false_alarm_rate: Annotated[Beside[Between0And1], Since.LATER] = 0.05
    """With a calibration share: false alarms asked for, compared with those on test normals."""
    overlays: Beside[NotNegativeInt] = 8
    """Images per picture of highest-scoring normals and lowest-scoring anomalies; 0 for none."""

    extract_batch_size: Beside[PositiveInt] = 32
    """Images per forward pass of the backbone, and per scoring step."""
    device: How[str] = "auto"
    """auto ($NOCO_DEVICE, else a GPU where there is one), cpu, cuda, cuda:1."""
    workers: How[NotNegativeInt] = 2
    """Processes (with a GPU) or threads (without) that decode images ahead; 0 for none."""
    cache: How[Literal["auto", "device", "host", "disk", "none"]] = "auto"
    """Where extracted features are kept; what is on disk ($NOCO_CACHE) later runs read again. With
    none they are not: memory holds a batch, and each epoch runs the backbone on every image."""

    checkpoint_minutes: How[OptionalNotNegative] = 10.0
    """A fit that takes longer keeps where it is this often, at the end of an epoch, and goes on
    from there after a kill; 0 for each epoch, none for never."""

    output: How[Path] = Path("results")
    """Run folders are made below it: <output>/<dataset>-<method>/<run>/."""
    run: How[str] = ""
    """Name of the run folder; by default backbone and a digest of the configuration."""
    restart: How[bool] = False
    """Throw away what the run folder holds instead of continuing it."""

    data: Annotated[DataOptions, Since.LATER] = field(default_factory=DataOptions)
    """Options of the data set."""
    method: MethodOptions
    """Options of the method."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.seeds:
            raise ValueError("--seeds needs at least one seed")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"--seeds {self.seeds} must be different and not negative")
        if max(self.seeds) >= 2**32:
            raise ValueError(f"--seeds {self.seeds} must be below 2^32, numpy's limit")
        if len(set(self.categories)) != len(self.categories):
            raise ValueError("--categories names one twice")
        if not self.layers:
            raise ValueError("--layers needs at least one stage")
        if self.crop_size is not None and self.crop_size > self.image_size:
            raise ValueError(
                f"--crop-size {self.crop_size} must lie between 1 and --image-size "
                f"{self.image_size}, or be none"
            )
        if self.crop_size is not None and self.resize == "bilinear_padded":
            raise ValueError("--resize bilinear_padded keeps images whole: add --crop-size none")
        parse_grid(self.grid, self.method)
        if self.grid and self.select != "synthetic":
            raise ValueError("--grid is what --select synthetic chooses from; add it, or leave out")
        if self.online and not self.method.learns_online:
            raise ValueError(
                f"--online: {self.method_name} with these options does not learn from one image at "
                "a time; noco_cf and noco_exact do, with a --method.feature-norm that is not std"
            )
        if Path(self.run).name != self.run or self.run == "..":
            raise ValueError(f"--run {self.run!r} must be a plain folder name; see also --output")

    @property
    def tiling(self) -> Tiling | None:
        """Windows that images are cut into, each seen as an image; None where they stay whole."""
        return None

    @property
    def cut_size(self) -> int:
        """Side in pixels of what resize and crop leave of an image, by the options."""
        return self.image_size if self.crop_size is None else self.crop_size

    @property
    def input_size(self) -> int:
        """Side in pixels of what the backbone sees: of an image, or of a window of it."""
        return self.cut_size if self.tiling is None else self.tiling.tile_size

    @property
    def resized(self) -> tuple[int, int | None]:
        """Sides in pixels that images are resized and then cropped to, all windows together."""
        return resized_for(self.tiling, self.image_size, self.crop_size)

    @property
    def map_size(self) -> int | None:
        """Side in pixels of the anomaly maps; None where nothing is localised."""
        raise NotImplementedError

    @property
    def is_joint(self) -> bool:
        """Whether one head is fitted on all categories; else each has its own."""
        return False

    @property
    def title(self) -> str:
        """What a table is about."""
        return f"{self.method_name} on {self.dataset}, {self.backbone}"

    @property
    def run_folder(self) -> Path:
        """The run's folder; the same command always names the same one."""
        backbone = re.sub(r"[^\w.-]", "_", self.backbone)  # hf-hub:timm/resnet18
        name = self.run or f"{backbone}-{self.digest}"
        method = self.method_name.replace(":", "-")  # no file system forbids a hyphen
        return self.output / f"{self.dataset}-{method}" / name

    @property
    def digest(self) -> str:
        """Eight hex digits of everything that changes what is measured."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return what defines the measurement as JSON values: the content of config.json."""
        kind = type(self)
        left_out = set(fields_marked(kind, Role.HOW))
        for name in fields_marked(kind, Since.LATER):
            value = getattr(self, name)
            if value == (
                type(value)() if name == "data" else kind.__dataclass_fields__[name].default
            ):
                left_out.add(name)
        fields = {n: v for n, v in dataclasses.asdict(self).items() if n not in left_out}
        return dict(json.loads(json.dumps(fields, default=str)))

    @classmethod
    def from_json(
        cls: type[Kind],
        values: dict[str, Any],
        *,
        data: type[DataOptions],
        method: type[MethodOptions],
    ) -> Kind:
        """Rebuild an experiment from config.json.

        Args:
            values: its content.
            data: the options of its data set.
            method: the options of its method.

        Raises:
            ValueError: a value is not allowed.
            TypeError: a field is unknown or missing.
        """
        if foreign := sorted(fields_marked(cls, Role.HOW) & set(values)):
            # A run folder may come from anyone: it must not choose where this machine writes.
            raise ValueError(f"not a configuration as runs write it: it sets {', '.join(foreign)}")
        fields: dict[str, Any] = _as_tuples(values)
        fields["data_root"] = Path(values["data_root"])
        fields["data"] = data(**_as_tuples(values.get("data", {})))
        fields["method"] = method(**_as_tuples(values["method"]))
        experiment = cls(**fields)
        check_types(experiment.data)
        check_types(experiment.method)
        check_types(experiment)
        return experiment

    def candidates(self) -> list[dict[str, Any]]:
        """Return the method options of each point of the grid; one empty point without a grid."""
        return parse_grid(self.grid, self.method)


def parse_grid(grid: Sequence[str], method: MethodOptions) -> list[dict[str, Any]]:
    """Return every combination of `name=value,value` items as method options.

    Raises:
        ValueError: an item is malformed, or the method has no such option or value.
    """
    axes: dict[str, list[Any]] = {}
    hints = get_type_hints(type(method))
    for item in grid:
        name, equals, values = item.partition("=")
        name = name.replace("-", "_")
        is_hidden = name in hints and Suppress in marks_of(type(method), name)
        if not equals or name not in hints or is_hidden:
            raise ValueError(
                f"--grid {item!r} must be OPTION=VALUE,VALUE with an option of --method"
            )
        try:
            read = _reader(hints[name])
            searched = [read(value) for value in values.split(",")]
        except ValueError as error:
            raise ValueError(f"--grid {item!r}: {error}") from error
        if len(set(searched)) < len(searched) or name in axes:
            raise ValueError(f"--grid {item!r}: an option or value stands twice")
        axes[name] = searched
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    for point in points:
        dataclasses.replace(method, **point)  # checks the values
    return points


def _reader(hint: Any) -> Callable[[str], Any]:
    """Return what reads a value of a type from a word.

    Raises:
        ValueError: the type is neither a number nor a word; so does what it returns.
    """
    kinds = get_args(hint)
    if get_origin(hint) is Literal:

        def one_of(word: str) -> str:
            if word not in kinds:
                raise ValueError(f"{word} is none of {', '.join(kinds)}")
            return word

        return one_of
    if type(None) in kinds:
        (inner,) = [_reader(kind) for kind in kinds if kind is not type(None)]
        return lambda word: None if word.lower() == "none" else inner(word)
    if hint not in (int, float, str):
        raise ValueError("only numbers and words can be searched")
    return hint


def _as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Return JSON values as dataclasses take them: lists become tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
