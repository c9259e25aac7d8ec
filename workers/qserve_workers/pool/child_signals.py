"""The signals by which a worker tells its replicas what to do.

But for SIGTERM, which everybody knows, they are ones that user code and its libraries do not take for themselves:
SIGUSR1 and SIGUSR2 belong to `faulthandler.register`, profilers and debuggers.
"""

import signal
from typing import Final

LEAVE: Final[int] = signal.SIGTERM
RELEASE: Final[int] = signal.SIGRTMIN + 7
SERVE: Final[int] = signal.SIGRTMIN + 8
ALL: Final = frozenset({LEAVE, RELEASE, SERVE})
