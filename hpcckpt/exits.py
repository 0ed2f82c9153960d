"""From an error to one line on stderr and an exit code (see docs/reference/commands.md)."""

import sys
from collections.abc import Callable

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SLURM_REFUSED = 3
EXIT_INTERRUPTED = 130


def exit_code(command: Callable[[], int], what: str, again: str) -> int:
    """Return the exit code of `command`; a user's mistake becomes one line on stderr, never a traceback.

    Args:
        command: does the work; returns an exit code of its own.
        what: what is being done, for an error of the file system that names no file.
        again: what to do once it is mended: "submit again".
    """
    # Behind the parser: --help needs none of it.
    from hpcckpt.errors import HpcckptError, SchedulerError

    try:
        return command()
    except HpcckptError as error:
        print(f"hpcckpt: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_SLURM_REFUSED if isinstance(error, SchedulerError) else EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("hpcckpt: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        print(f"hpcckpt: {what}: there is not enough memory; take a machine or an allocation with more, then {again}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        # A full disk, a name that is too long: nothing that a traceback explains better.
        print(f"hpcckpt: {error.filename or what}: {error.strerror or error}; mend that, then {again}", file=sys.stderr)
        return EXIT_BAD_INPUT
