"""What an option is: its type, the values it may have, when it counts, and what it changes."""

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

T = TypeVar("T")
Hidden = tyro.conf.Suppress[str]
"""A text that is not an option of the command line."""


@dataclass(frozen=True)
class Bound:
    """Values that a number may have; None, where an option takes it, always may.

    Attributes:
        words: the values in words, as they follow "must be".
        holds: tells whether a finite value is one of them.
    """

    words: str
    holds: Callable[[float], bool]


@dataclass(frozen=True)
class OnlyWith:
    """Marks an option that does nothing unless another one has some value.

    Attributes:
        option: the other one.
        words: its values in words, as they follow "unless --method.OPTION is".
        holds: tells whether a value is one of them.
    """

    option: str
    words: str
    holds: Callable[[Any], bool]


class Role(Enum):
    """What an option of an experiment changes beside the numbers; most have no role."""

    HOW = "how and where a run happens: no part of config.json"
    PART = "which lines of a table are computed: runs that differ in it make one table"
    BESIDE = "what is done beside: no number of the table changes by more than rounding"


class Since(Enum):
    """When an option came; one without a mark was always there."""

    LATER = "config.json has it only where it is not at its default, so that older runs continue"


class Names(Enum):
    """What a text of an option names, where a fit reads it."""

    IMAGES = "a folder: a fit is made of all images below it"


How = Annotated[T, Role.HOW]
Part = Annotated[T, Role.PART]
Beside = Annotated[T, Role.BESIDE]

_POSITIVE = Bound("above 0", lambda value: value > 0)
_SHARE = Bound("above 0 and at most 1", lambda value: 0 < value <= 1)

Positive = Annotated[float, _POSITIVE]
PositiveInt = Annotated[int, _POSITIVE]
NotNegative = Annotated[float, Bound("0 or above", lambda value: value >= 0)]
NotNegativeInt = Annotated[int, Bound("0 or above", lambda value: value >= 0)]
Share = Annotated[float, _SHARE]
"""A part of something, the whole allowed."""
Fraction = Annotated[float, Bound("at least 0 and below 1", lambda value: 0 <= value < 1)]
"""A part of something, nothing allowed."""
Between0And1 = Annotated[float, Bound("between 0 and 1", lambda value: 0 < value < 1)]
BitDepth = Annotated[int, Bound("9 to 16", lambda value: 9 <= value <= 16)]
Odd = Annotated[int, Bound("odd and above 0", lambda value: value > 0 and value % 2 == 1)]


def _or_none(
    kind: type[int] | type[float] | type[str], metavar: str
) -> "tyro.constructors.PrimitiveConstructorSpec[Any]":
    """Describe an option that takes a number or the word none."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: None if words[0].lower() == "none" else kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, (int, kind)),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


# Each is written `none` on the command line where it is None.
OptionalInt = Annotated[int | None, _or_none(int, "INT|none"), _POSITIVE]
OptionalFloat = Annotated[float | None, _or_none(float, "FLOAT|none"), _POSITIVE]
OptionalNotNegative = Annotated[
    float | None,
    _or_none(float, "FLOAT|none"),
    Bound("0 or above", lambda value: value is None or value >= 0),
]
OptionalFraction = Annotated[
    float | None, _or_none(float, "FLOAT|none"), Bound("in 0 to 1", lambda value: 0 <= value <= 1)
]
OptionalPath = Annotated[str | None, _or_none(str, "FILE|none")]
OptionalImages = Annotated[str | None, _or_none(str, "FOLDER|none"), Names.IMAGES]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Options of a method, `--method.NAME` each, with its paper's values as defaults."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="method.")

    @property
    def learns_online(self) -> bool:
        """Whether a detector with these options can learn from one image at a time."""
        return False


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(MethodOptions):
    """What every method on features can do to them before its head sees them."""

    feature_norm: Literal["none", "l2", "l2_per_layer", "std"] = "none"
    """Unit length (of all or of each stage's channels), or channels over their deviation."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of one data set, `--data.NAME` each; most data sets have none."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="data.")


def marks_of(kind: type, name: str) -> tuple[Any, ...]:
    """Return what a field's `Annotated` holds beside its type."""
    hint = _hints_of(kind)[name]
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


@functools.cache
def _hints_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def fields_marked(kind: type, mark: Enum) -> frozenset[str]:
    """Return the names of a dataclass's fields that carry a mark."""
    return frozenset(one.name for one in fields(kind) if mark in marks_of(kind, one.name))


def option_name(name: str, prefix: str = "") -> str:
    """Return a field's option as it is typed: `--method.learning-rate`."""
    return f"--{prefix}{name.replace('_', '-')}"


def check_bounds(config: Any, *, prefix: str = "") -> None:
    """Check the fields of a dataclass that a `Bound` marks.

    Raises:
        ValueError: one is beyond it, or not finite; the message names the option.
    """
    for name in (entry.name for entry in fields(config)):
        value = getattr(config, name)
        for mark in marks_of(type(config), name):
            if not isinstance(mark, Bound) or value is None:
                continue
            is_number = isinstance(value, int | float)
            if not (is_number and math.isfinite(value) and mark.holds(value)):
                raise ValueError(f"{option_name(name, prefix)} {value} must be {mark.words}")


def check_types(config: Any) -> None:
    """Check that the fields of a dataclass hold what their types say; a file gave the values.

    Raises:
        ValueError: one does not; the message names the field.
    """
    hints = get_type_hints(type(config))
    for entry in fields(config):
        value = getattr(config, entry.name)
        if not _is_a(value, hints[entry.name]):
            raise ValueError(f"{entry.name} is {value!r}, which it cannot be")


def _is_a(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, one) for one in inner)
    if origin is Annotated:
        return _is_a(value, inner[0])
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:  # only tuples of one type and any length are used
        return isinstance(value, tuple) and all(_is_a(entry, inner[0]) for entry in value)
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, hint)
