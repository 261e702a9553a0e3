"""Types and checks of options that tyro does not bring."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro


def _none_or_int(values: list[str]) -> int | None:
    return None if values[0].lower() == "none" else int(values[0])


def _none_or_float(values: list[str]) -> float | None:
    return None if values[0].lower() == "none" else float(values[0])


OptionalInt = Annotated[
    int | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|none",
        instance_from_str=_none_or_int,
        is_instance=lambda value: value is None or isinstance(value, int),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    ),
]
"""An integer, or `none` on the command line."""

OptionalFloat = Annotated[
    float | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|none",
        instance_from_str=_none_or_float,
        is_instance=lambda value: value is None or isinstance(value, (int, float)),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    ),
]
"""A number, or `none` on the command line."""


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
