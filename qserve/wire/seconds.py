"""Lengths of time as users give them: finite, and short enough for every timer."""

from typing import Annotated, Any, Final

from pydantic import Field

LONGEST_S: Final = 1_000_000_000
"""No time that is given reaches 31 years: timers, and deadlines counted in milliseconds, end somewhere."""

PositiveSeconds = Annotated[float, Field(gt=0, lt=LONGEST_S, allow_inf_nan=False)]
NonNegativeSeconds = Annotated[float, Field(ge=0, lt=LONGEST_S, allow_inf_nan=False)]


def check_seconds(name: str, value: Any, least: float) -> None:
    """Refuse what is no length of time.

    Raises:
        TypeError: It is no number.
        ValueError: It is too short or too long, infinite, or no number that can be compared.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not least <= value < LONGEST_S:
        raise ValueError(f"{name} must be at least {least:g} and less than {LONGEST_S}, not {value!r}")
