"""Who does something to an instance from a shell, as the audit names them."""

import getpass
import socket

from qserve.broker.history.audit import note_deed
from qserve.broker.instance.state import State


def write_down(state: State, action: str, about: str, outcome: str = "done") -> None:
    """Write into the audit what the user of this machine has done; raises as `note_deed` does."""
    note_deed(state.redis, state.keys, user_of_this_machine(), action, about, outcome)


def user_of_this_machine() -> str:
    """The user who runs this process, with the machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for its user
        user = "somebody"
    return f"{user}@{socket.gethostname()}"
