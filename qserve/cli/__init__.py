"""The `qserve` command."""

import signal


def main() -> None:
    """Run the command. Ctrl-C ends it quietly even while it is imported."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qserve.cli import command_line  # noqa: PLC0415 what comes in this moment is what this is about

    signal.signal(signal.SIGINT, before)
    command_line.main()
