"""User code with things that belong to the thread on which they were made."""

import sqlite3
import threading

ON_ITS_THREAD = threading.local()
ON_ITS_THREAD.set_by = ["the module"]
MODULES = sqlite3.connect(":memory:")


class ThreadBound:
    """A class whose constructor and `def` methods use what its module has made."""

    def __init__(self) -> None:
        self.own = sqlite3.connect(":memory:")
        ON_ITS_THREAD.set_by.append("the constructor")

    def set_by(self) -> list[str]:
        return list(ON_ITS_THREAD.set_by)

    def query(self) -> list[int]:
        return [each.execute("select 1").fetchone()[0] for each in (MODULES, self.own)]

    async def query_on_the_loop(self) -> None:
        self.own.execute("select 1")
