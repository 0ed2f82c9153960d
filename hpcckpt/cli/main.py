"""`hpcckpt COMMAND …`."""

import argparse
import sys
from collections.abc import Callable, Sequence

from hpcckpt import submit
from hpcckpt.cli import ckpt, status

# name -> (what --help says, main function)
_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "submit": ("start a run, on Slurm or on this machine", submit.main),
    "status": ("say how runs are doing", status.main),
    "ckpt": ("export the weights of a checkpoint", ckpt.main),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see docs/reference/commands.md)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in _COMMANDS:
        return _COMMANDS[arguments[0]][1](arguments[1:])
    listed = "\n".join(f"  {name:8} {text}" for name, (text, _) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hpcckpt",
        description="PyTorch training on Slurm that survives time limits, preemption and kills.",
        epilog=f"commands:\n{listed}\n\n`hpcckpt COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(_COMMANDS))
    parser.parse_args(arguments)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
