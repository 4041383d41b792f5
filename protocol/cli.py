"""What the three commands share: errors as one line, signals, exit codes."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

from protocol.errors import TunefleetError
from protocol.lifeline import end_with_parent

EXIT_MISTAKE = 1
EXIT_TOO_LARGE = 3
"""What was asked is right, but this device has not the memory for it (2 is wrong usage)."""
EXIT_SIGNAL = 128
"""Added to a signal's number: 130 after Ctrl-C, 143 after SIGTERM, as shells have it."""


class Interrupted(BaseException):
    """Ask the main thread to end, from a signal; no `except Exception` on its way holds it up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_command(app: Any) -> None:
    """Run a typer app; what went wrong ends in one clear line on stderr and exit code 1,
    or the error's own.

    SIGINT and SIGTERM end it in one line too, where a command does not catch them itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    end_with_parent()
    try:
        app()
    except TunefleetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as interrupted:
        print(f"ended by {signal.Signals(interrupted.number).name}", file=sys.stderr)
        sys.exit(EXIT_SIGNAL + interrupted.number)
    except BrokenPipeError:
        # The reader (head, say) has gone: nothing to report, and nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_MISTAKE)


def _interrupt(number: int, _: object) -> NoReturn:
    raise Interrupted(number)
