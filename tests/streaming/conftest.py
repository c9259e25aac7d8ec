"""Fixtures of the tests of streams, WebSockets and cancellation: those of the behaviours, against a real instance."""

import cloudpickle

from tests.behaviours import tools
from tests.behaviours.conftest import gate, http, notes
from tests.streaming import processes

cloudpickle.register_pickle_by_value(tools)
cloudpickle.register_pickle_by_value(processes)

__all__ = ["gate", "http", "notes"]
