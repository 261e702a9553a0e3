"""What all experiments share: data, backbone, device, selection and output."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Suppress

from configs.methods import METHODS, MethodConfig, OptionalInt, key_of, require_positive
from configs.options import check_types

HOW_NOT_WHAT = frozenset({"device", "workers", "cache", "output", "run", "restart"})
"""Fields that change where and how a run happens but not what it measures."""

ADDED_LATER = frozenset({"calibration_share", "false_alarm_rate"})
"""Fields that earlier versions had not: config.json has them where they are not at their default,
so that runs of those versions continue."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One data set, one backbone, one method; every field is an option of the scripts."""

    dataset: Suppress[str]
    method_name: Suppress[str]
    data_root: Path
    """Folder of the data set (`demo` is built in it; `digits` needs none)."""
    categories: tuple[str, ...] = ()
    """Categories or normal classes to run; all by default."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; the table shows mean and standard deviation over them."""

    backbone: str
    """Any timm model, e.g. wide_resnet50_2.tv_in1k, resnet152.tv_in1k, tf_efficientnet_lite0."""
    weights: str = "auto"
    """auto, random (said in every table), or a .safetensors or .pth file."""
    layers: tuple[int, ...]
    """Stages of the backbone, as timm counts them: 0 is the stem, then 1 to 4."""
    feature_location: Literal["bottleneck", "expansion"] = "bottleneck"
    """Maps after or before the projections of an EfficientNet's blocks."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the backbone. Heads stay in fp32, and so do the backbone's convolutions over
    fewer than 16 channels. AUROC was seen to move by less than 0.1 point."""

    compile: bool = False
    """Compile the backbone (torch.compile): pays on many images; on a CPU it needs g++ or clang."""

    image_size: int
    """Pixels the images are resized to."""
    crop_size: OptionalInt
    """Centre crop in pixels; none keeps the whole image, squeezed to a square."""
    resize: Literal["opencv_square", "lanczos_shorter", "bilinear_shorter"]
    """Resize to a square by OpenCV, or the shorter side by Pillow (Lanczos, bilinear)."""

    select: Literal["last", "synthetic", "best_test"] = "last"
    """Which epoch or time counts: the last, the best on synthetic anomalies, or on the test set."""
    grid: tuple[str, ...] = ()
    """Options `--select synthetic` chooses too, e.g. prototypes=1,8,32 feature_norm=none,std."""
    monitor_test: bool = False
    """Log the test metrics of every epoch or candidate; chooses nothing."""
    online: bool = False
    """Also learn from one image at a time and write the curve over their number (closed_form)."""
    skip_unreadable: bool = False
    """Leave unreadable images out and count them in the table instead of stopping."""
    calibration_share: float = 0.0
    """Share of the normal training images kept out of the fit to set thresholds; the p-values it
    gives cost some accuracy."""
    false_alarm_rate: float = 0.05
    """With a calibration share: false alarms asked for, compared with those on test normals."""
    overlays: int = 8
    """Images per picture of highest-scoring normals and lowest-scoring anomalies; 0 for none."""

    extract_batch_size: int = 32
    """Images per forward pass of the backbone, and per scoring step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    workers: int = 2
    """Processes (with a GPU) or threads (without) that decode images ahead; 0 for none."""
    cache: Literal["auto", "device", "host", "disk", "none"] = "auto"
    """Where extracted features are kept; what is on disk ($NOCO_CACHE) later runs read again. With
    none they are not: memory holds a batch, and each epoch runs the backbone on every image."""

    output: Path = Path("results")
    """Run folders are made below it: <output>/<dataset>-<method>/<run>/."""
    run: str = ""
    """Name of the run folder; by default backbone and a digest of the configuration."""
    restart: bool = False
    """Throw away what the run folder holds instead of continuing it."""

    method: MethodConfig
    """Options of the method."""

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "extract_batch_size")
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
        if self.crop_size is not None and not 0 < self.crop_size <= self.image_size:
            raise ValueError(
                f"--crop-size {self.crop_size} must lie between 1 and --image-size "
                f"{self.image_size}, or be none"
            )
        parse_grid(self.grid, self.method)
        if self.grid and self.select != "synthetic":
            raise ValueError("--grid is what --select synthetic chooses from; add it, or leave out")
        learns_online = (
            getattr(self.method, "solver", "sgd") == "closed_form"
            and getattr(self.method, "prototypes", 0) == 1
            and getattr(self.method, "feature_norm", "none") != "std"
        )
        if self.online and not learns_online:
            raise ValueError(
                "--online needs --method.solver closed_form, --method.prototypes 1 and a "
                "--method.feature-norm other than std, which alone are sums over images"
            )
        if not 0 <= self.calibration_share < 1 or not 0 < self.false_alarm_rate < 1:
            raise ValueError(
                f"--calibration-share {self.calibration_share} must be 0 or below 1, and "
                f"--false-alarm-rate {self.false_alarm_rate} between 0 and 1"
            )
        if self.workers < 0 or self.overlays < 0:
            raise ValueError("--workers and --overlays cannot be negative")
        if Path(self.run).name != self.run:
            raise ValueError(f"--run {self.run!r} must be a plain folder name; see also --output")

    @property
    def map_size(self) -> int:
        """Side in pixels of what the backbone sees, and of the anomaly maps."""
        return self.image_size if self.crop_size is None else self.crop_size

    @property
    def run_folder(self) -> Path:
        """The run's folder; the same command always names the same one."""
        name = self.run or f"{self.backbone.replace('/', '_')}-{self.digest}"
        method = self.method_name.replace(":", "-")  # no file system forbids a hyphen
        return self.output / f"{self.dataset}-{method}" / name

    @property
    def digest(self) -> str:
        """Eight hex digits of everything that changes what is measured."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return what defines the measurement as JSON values: the content of config.json."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name in ADDED_LATER}
        fields = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in HOW_NOT_WHAT and not (name in defaults and value == defaults[name])
        }
        plain = json.loads(json.dumps(fields, default=str))
        return dict(plain)

    def candidates(self) -> list[dict[str, Any]]:
        """Return the method options of each point of the grid; one empty point without a grid."""
        return parse_grid(self.grid, self.method)

    def method_options(self) -> dict[str, Any]:
        """Return the method's options as keyword arguments of its detector."""
        return dataclasses.asdict(self.method)


def parse_grid(grid: Sequence[str], method: MethodConfig) -> list[dict[str, Any]]:
    """Return every combination of `name=value,value` items as method options.

    Raises:
        ValueError: an item is malformed, or the method has no such option or value.
    """
    axes: dict[str, list[Any]] = {}
    for item in grid:
        name, equals, values = item.partition("=")
        name = name.replace("-", "_")
        if not equals or not hasattr(method, name):
            raise ValueError(
                f"--grid {item!r} must be OPTION=VALUE,VALUE with an option of --method"
            )
        kind = type(getattr(method, name))
        if kind not in {int, float, str}:
            raise ValueError(f"--grid {item!r}: only numbers and words can be searched")
        try:
            searched = [kind(value) for value in values.split(",")]
        except ValueError as error:
            raise ValueError(f"--grid {item!r}: {error}") from error
        hint = get_type_hints(type(method))[name]
        words = get_args(hint) if get_origin(hint) is Literal else searched
        if unknown := [value for value in searched if value not in words]:
            raise ValueError(f"--grid {item!r}: {unknown[0]} is none of {', '.join(words)}")
        if len(set(searched)) < len(searched) or name in axes:
            raise ValueError(f"--grid {item!r}: an option or value stands twice")
        axes[name] = searched
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    for point in points:
        dataclasses.replace(method, **point)  # checks the values
    return points


def from_json(kind: type[Experiment], values: dict[str, Any]) -> Experiment:
    """Rebuild an experiment from config.json.

    Raises:
        ValueError: a field is unknown or missing, or a value is not allowed.
    """
    if not isinstance(values, dict):
        raise ValueError("not a configuration: no JSON object")
    if foreign := sorted(HOW_NOT_WHAT & set(values)):
        # A run folder may come from anyone: it must not choose where this machine writes.
        raise ValueError(f"not a configuration as runs write it: it sets {', '.join(foreign)}")
    values = dict(values)
    try:
        method_type = type(METHODS[key_of(values["method_name"])])
        options: Any = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["method"].items()
        }
        values["method"] = method_type(**options)
        values["data_root"] = Path(values["data_root"])
        for name in ("categories", "seeds", "layers", "grid"):
            values[name] = tuple(values[name])
        experiment = kind(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a configuration of this version: {error}") from error
    check_types(experiment.method)
    check_types(experiment)
    return experiment


def with_options(method: MethodConfig, options: dict[str, Any]) -> MethodConfig:
    """Return a method with some of its options, JSON values, changed.

    Raises:
        ValueError: an option is unknown, or a value is not allowed.
    """
    changes: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        changed = dataclasses.replace(method, **changes)
    except TypeError as error:
        raise ValueError(f"not options of this method: {error}") from error
    check_types(changed)
    return changed
