"""How processes log, as Ray Serve's programs and config files say it."""

import logging
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, field_validator

from qserve.settings import LevelName


class LoggingConfig(BaseModel):
    """How the processes of an instance log; in a program it has no effect, because processes are started before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoding: Literal["TEXT", "JSON"] = Field(default="TEXT", description="QSERVE_LOG_FORMAT.")
    log_level: str | NonNegativeInt = Field(default="INFO", description="QSERVE_LOG_LEVEL.")
    enable_access_log: bool = Field(default=True, description="QSERVE_ACCESS_LOG.")
    logs_dir: str | None = Field(default=None, description="Without effect: processes log to their output.")
    additional_log_standard_attrs: list[str] = Field(default=[], description="Without effect.")

    @field_validator("log_level")
    @classmethod
    def _check_level(cls, level: str | int) -> str | int:
        names = {number: name for name, number in logging.getLevelNamesMapping().items() if name in get_args(LevelName)}
        if level not in names and str(level).upper() not in names.values():
            raise ValueError(f"{level!r} is no level: write one of {', '.join(names.values())}.")
        return level

    @property
    def level_name(self) -> str:
        """The level by its name."""
        return self.log_level if isinstance(self.log_level, str) else str(logging.getLevelName(self.log_level))
