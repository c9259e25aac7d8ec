"""Fixtures of the tests of durable calls: those of the API's behaviours, against a real instance."""

import cloudpickle

from tests.behaviours import tools
from tests.behaviours.conftest import gate, http, make_gate, notes

cloudpickle.register_pickle_by_value(tools)

__all__ = ["gate", "http", "make_gate", "notes"]
