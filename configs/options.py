"""Types and checks of options that tyro does not bring."""

import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro


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


OptionalInt = Annotated[int | None, _or_none(int, "INT|none")]
"""An integer, or `none` on the command line."""

OptionalFloat = Annotated[float | None, _or_none(float, "FLOAT|none")]
"""A number, or `none` on the command line."""

OptionalPath = Annotated[str | None, _or_none(str, "FILE|none")]
"""A file's name, or `none` on the command line."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What every method can do to features before its head sees them."""

    feature_norm: Literal["none", "l2", "l2_per_layer", "std"] = "none"
    """Unit length (of all or of each stage's channels), or channels over their deviation."""


def require_positive(config: Any, *names: str) -> None:
    """Check fields of a dataclass; None passes.

    Raises:
        ValueError: one is not above zero; the message names the option.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:  # so that nan is refused too
            raise ValueError(f"{name.replace('_', '-')} is {value}; it must be above 0")


def check_types(config: Any) -> None:
    """Check that the fields of a dataclass hold what their types say; a file gave the values.

    Raises:
        ValueError: one does not; the message names the field.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_a(value, hint):
            raise ValueError(f"{name} is {value!r}, which it cannot be")


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
