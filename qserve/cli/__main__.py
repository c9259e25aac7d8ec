"""`python -m qserve.cli`, where the script is not on PATH."""

from qserve.cli import main

main()
