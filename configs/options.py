"""Types and checks of options that tyro does not bring."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
