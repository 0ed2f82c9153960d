"""The command line of `devcluster`."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from . import cluster
from .daemons import clean_environment
from .errors import StartError, UserError
from .settings import MAX_NODES, Settings, parse_override
from .state import load

ROOT_VARIABLE = "HPCCKPT_DEVCLUSTER_ROOT"

_DESCRIPTION = """\
A real multi-node Slurm on this machine: try your job before you queue for a day.

  devcluster up                     start it: 4 nodes of 4 CPUs, partitions low and high
  devcluster shell                  a shell in which sbatch, srun, squeue, … talk to it
  devcluster shell -- sbatch job.sh one command in it
  devcluster status                 what runs, and what Slurm thinks of the nodes
  devcluster down                   kill its jobs and daemons, delete all its files

A job of the partition high that needs the nodes of a job of the partition low makes Slurm requeue that one.
As root, every node has its own address and host name; else all are on the loopback address, told apart by port.
"""

_EPILOG = f"""\
environment: {ROOT_VARIABLE} is the default of --root; SLURM_CONF is what `shell` sets, for use elsewhere.
exit codes: 0 done; 1 `status` and `shell`: no cluster runs there; 2 bad input or a missing program;
3 something did not start, and all that did was taken back. `shell` ends with the exit code of its command.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return int(options.run(options))
    except UserError as error:
        _say(str(error))
        return 2
    except StartError as error:
        _say(str(error))
        for line in error.tail:
            print(f"  | {line}", file=sys.stderr)
        return 3
    except OSError as error:
        _say(f"{error.filename or 'the system'}: {error.strerror}; see that you may use it and that the disk is not full")
        return 3
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def default_root(environment: dict[str, str], user_id: int) -> Path:
    """Where a cluster lives if nobody says otherwise: one place a user."""
    if chosen := environment.get(ROOT_VARIABLE):
        return Path(chosen)
    # Not XDG_RUNTIME_DIR: that is in memory, often bars programs from running, and goes when the user logs out.
    return Path("/tmp") / f"hpcckpt-devcluster-{user_id}"  # noqa: S108 - it is 0700 and checked for its owner


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="devcluster",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="up|down|status|shell")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument(
            "--root",
            type=Path,
            default=default_root(dict(os.environ), os.getuid()),
            metavar="DIR",
            help="the folder of the cluster, new or empty; two clusters need two (default: %(default)s)",
        )
        return sub

    sub = command("up", _up, "start a cluster, or start again what has died of it")
    sub.add_argument("--nodes", type=_count(MAX_NODES), default=4, metavar="N", help="number of nodes (default: 4)")
    sub.add_argument("--cpus", type=_count(1024), default=4, metavar="N", help="CPUs that each node claims to have (default: 4)")
    sub.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB, for sacct")
    sub.add_argument("--no-namespaces", action="store_true", help="all nodes on the loopback address, as for non-root")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace or add a line of slurm.conf, such as SlurmdTimeout=10; repeat it for more",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object that says what is where")

    command("down", _down, "kill the cluster's jobs and daemons, and delete all that it made")

    sub = command("status", _status, "say what runs")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("shell", _shell, "run a shell, or a command, that talks to the cluster")
    sub.add_argument("command", nargs="*", metavar="-- COMMAND", help="default: $SHELL")
    return parser


def _up(options: argparse.Namespace) -> int:
    began = time.monotonic()
    namespaces = os.getuid() == 0 and not options.no_namespaces
    settings = Settings(
        root=cluster.own_root(options.root),
        nodes=options.nodes,
        cpus=options.cpus,
        accounting=options.accounting,
        namespaces=namespaces,
        overrides=tuple(map(parse_override, options.set)),
    )
    if not (namespaces or options.no_namespaces):
        _say("not root: all nodes share the loopback address and this machine's name")
    ran_before = (before := load(settings.root)) is not None and before.running
    state = cluster.up(settings, _say)
    if options.json:
        print(json.dumps(state.to_json()))
        return 0
    nodes = state.settings.node_names
    took = "was up already" if ran_before else f"up in {time.monotonic() - began:.1f} s"
    print(f"{state.settings.name} {took}: {len(nodes)} nodes ({nodes[0]} to {nodes[-1]}) in {state.settings.root}")
    print("try it:  devcluster shell -- srun -N2 hostname")
    print(f"or use:  export SLURM_CONF={state.settings.slurm_conf}")
    return 0


def _down(options: argparse.Namespace) -> int:
    root = cluster.own_root(options.root)
    _say(f"{root}: down, nothing left" if cluster.down(root) else f"{root}: there was no cluster")
    return 0


def _status(options: argparse.Namespace) -> int:
    root = cluster.own_root(options.root)
    status = cluster.status(root)
    running = bool(status and status["running"])
    if options.json:
        print(json.dumps(status or {"root": str(root), "running": False}))
    elif status is None:
        print(f"{root}: no cluster; start one with `devcluster up`")
    elif not running:
        print(f"{root}: leftovers of a cluster that died; `devcluster up` or `down` removes them")
    else:
        for name, process in status["processes"].items():
            print(f"{name:<16}{'dead' if name in status['dead'] else 'pid ' + str(process['pid'])}")
        for node, state in status["node_states"].items():
            print(f"{node:<16}{state}")
        if status["dead"]:
            print("`devcluster up` starts again what is dead")
    return 0 if running else 1


def _shell(options: argparse.Namespace) -> int:
    root = cluster.own_root(options.root)
    state = load(root)
    if state is None or not state.running:
        _say(f"{root}: no cluster runs there; start one with `devcluster up`")
        return 1
    command = options.command or [os.environ.get("SHELL", "/bin/sh")]
    environment = clean_environment(state.settings) | {ROOT_VARIABLE: str(root)}
    if not options.command:
        _say(f"a shell on {state.settings.name}; leave it with `exit`")
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606 - what the user asked to run
    except OSError as error:
        raise UserError(f"shell: {command[0]}: {error.strerror}; is it in PATH?") from None


def _count(largest: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {largest}")
        return int(text)

    return parse


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # an exception, so that `up` rolls back


def _say(text: str) -> None:
    print(f"devcluster: {text}", file=sys.stderr)
