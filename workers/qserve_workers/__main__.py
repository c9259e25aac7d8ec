"""`python -m qserve_workers ...` is `celery -A qserve_workers ...`, for where no `celery` is on the PATH."""

import sys

from celery.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["-A", "qserve_workers"]
    sys.exit(main())
