"""A process with one replica, as in a worker's pool: `python -m tests.support.replica_host DEPLOYMENT [standby]`.

Reports go to stdout; SIGTERM drains, SIGUSR2 lets it serve.
"""

import logging
import os
import signal
import sys

from qserve.settings import Settings
from qserve_workers.replica.birth import Birth
from qserve_workers.replica.replica_process import ReplicaProcess


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    standby = "standby" in sys.argv
    birth = Birth(deployment=sys.argv[1], worker="w", node="n", standby=standby, failures=0, reports_fd=1)
    process = ReplicaProcess(birth, Settings())
    # Read from a pipe, as the pool's children do: a handler runs when the main thread next runs Python code, and a
    # signal that another thread takes does not wake it from a lock.
    signals, writer = os.pipe()
    os.set_blocking(writer, False)
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, lambda _signal, _frame: None)
    signal.set_wakeup_fd(writer)
    process.start()
    while os.read(signals, 1)[0] != signal.SIGTERM:
        process.serve()
    process.drain()
    process.wait_drained(None)
    os._exit(0)


if __name__ == "__main__":
    main()
