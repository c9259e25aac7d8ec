"""Numbers of seconds as users give them, such that clocks, timers and Redis can count them."""

from typing import Annotated, Final

from pydantic import Field

MOST_S: Final = 1e9
"""About 31 years; infinity would overflow where it is counted in milliseconds."""

PositiveSeconds = Annotated[float, Field(gt=0, le=MOST_S)]
Seconds = Annotated[float, Field(ge=0, le=MOST_S)]
