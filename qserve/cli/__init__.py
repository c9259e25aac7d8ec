"""The `qserve` command."""

import signal
import sys


def main() -> None:
    """Run the command. Ctrl-C ends it quietly even while it is imported."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from qserve.cli import command_line  # noqa: PLC0415 what comes in this moment is what this is about

        signal.signal(signal.SIGINT, before)
        command_line.main()
    except (ImportError, AttributeError) as exc:
        from qserve.cli.project.hidden_modules import what_hides  # noqa: PLC0415 only now is it wanted

        if (text := what_hides(exc)) is None:
            raise
        sys.exit(f"Error: {text}")
