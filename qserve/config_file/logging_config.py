"""How processes log, as Ray Serve's programs and config files say it."""

import logging
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt


class LoggingConfig(BaseModel):
    """How the processes of an instance log; in a program it has no effect, because processes are started before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoding: Literal["TEXT", "JSON"] = Field(default="TEXT", description="QSERVE_LOG_FORMAT.")
    log_level: str | NonNegativeInt = Field(default="INFO", description="QSERVE_LOG_LEVEL.")
    enable_access_log: bool = Field(default=True, description="QSERVE_ACCESS_LOG.")
    logs_dir: str | None = Field(default=None, description="Without effect: processes log to their output.")
    additional_log_standard_attrs: list[str] = Field(default=[], description="Without effect.")

    @property
    def level_name(self) -> str:
        """The level by its name."""
        return self.log_level if isinstance(self.log_level, str) else str(logging.getLevelName(self.log_level))
