"""A process with one replica, as a worker's pool would run it: `python -m tests.replica_host DEPLOYMENT [standby]`.

Reports go to stdout; SIGTERM drains, SIGUSR2 lets it serve.
"""

import logging
import os
import signal
import sys
import threading

from qserve.settings import Settings
from qserve_workers.replica import Birth, ReplicaProcess


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    standby = "standby" in sys.argv
    birth = Birth(deployment=sys.argv[1], worker="w", node="n", standby=standby, failures=0, reports_fd=1)
    process = ReplicaProcess(birth, Settings())
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: leaving.set())
    signal.signal(signal.SIGUSR2, lambda _signal, _frame: process.serve())
    process.start()
    leaving.wait()
    process.drain()
    process.wait_drained(None)
    os._exit(0)


if __name__ == "__main__":
    main()
