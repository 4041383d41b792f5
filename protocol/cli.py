"""What the three commands share: errors as one line, exit codes."""

from __future__ import annotations

import os
import sys
from typing import Any

from protocol.errors import TunefleetError

EXIT_MISTAKE = 1
EXIT_INTERRUPTED = 130


def run_command(app: Any) -> None:
    """Run a typer app; what went wrong ends in one clear line on stderr and exit code 1."""
    try:
        app()
    except TunefleetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, say) has gone: nothing to report, and nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_MISTAKE)
