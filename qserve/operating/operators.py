"""Who does something to an instance, as the audit names them."""

import getpass
import socket


def user_of_this_machine() -> str:
    """The user who runs this process, with the machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for its user
        user = "somebody"
    return f"{user}@{socket.gethostname()}"
