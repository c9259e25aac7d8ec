"""A connection for tests of what goes over one, without a server."""

from qserve.broker.connection import Connection


class OpenConnection(Connection):
    """To nobody, which is said to be open."""

    @property
    def is_open(self) -> bool:
        return True
