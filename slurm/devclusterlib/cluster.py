"""Bring a cluster up, take it down, say how it is."""

import os
import pwd
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import daemons, network, processes
from .daemons import Daemon, answers, ask, claim
from .errors import StartError, UserError
from .settings import Settings, check_root, slot_candidates, tag_of
from .state import FILE, State, load

Say = Callable[[str], None]

_START_LIMIT = 30.0  # seconds that one program may take; each needs one or two


def up(settings: Settings, say: Say) -> State:
    """Start the cluster that `settings` describe, or what is dead of the one that runs there already."""
    daemons.require_programs(namespaces=settings.namespaces, accounting=settings.accounting)
    with ExitStack() as held:
        held.enter_context(_alone(settings.root))
        state = load(settings.root)
        if state and state.running:
            asked = ("nodes", "cpus", "accounting", "namespaces", "overrides")
            if other := [name for name in asked if getattr(settings, name) != getattr(state.settings, name)]:
                say(f"runs already with other {', '.join(other)}, which stay; to change them, `devcluster down` first")
            _repair(state, say)
            return state
        _make_root(settings.root)
        _clean(State(settings) if state is None else state)
        state = State(_choose(_of_this_machine(settings), held))
        try:
            _make_root(settings.root)
            state.save()
            _write_files(state.settings)
            _launch(state, say)
        except BaseException:
            say("rolling back")
            _clean(state)
            raise
        state.ready = True
        state.save()
        return state


def down(root: Path) -> bool:
    """Kill, remove and delete all that belongs to the cluster at `root`; False if there was nothing."""
    with _alone(root):
        state = load(root) or State(Settings(root))
        if root.exists() and not (root / FILE).exists() and any(root.iterdir()):
            raise UserError(f"--root {root}: not a folder of devcluster (it has no {FILE}); nothing was deleted")
        return _clean(state)


def status(root: Path) -> dict[str, Any] | None:
    """What `up --json` printed, and how it is now; None if there is no cluster."""
    state = load(root)
    if state is None:
        return None
    return state.to_json() | {
        "running": state.running,
        "dead": state.dead,
        "node_states": node_states(state.settings) if state.running else {},
    }


def node_states(settings: Settings) -> dict[str, str]:
    """What slurmctld thinks of each node, in sinfo's words; empty if it does not answer."""
    lines = ask(settings, "sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines()
    return dict(line.split() for line in lines)


def own_root(root: Path) -> Path:
    """Return `root` in full, once it is sure that what may be there is the user's own."""
    root = check_root(root)
    try:
        owner = root.stat().st_uid
    except FileNotFoundError:
        return root
    except OSError as error:
        raise UserError(f"--root {root}: {error.strerror}; choose another folder") from None
    if not root.is_dir():
        raise UserError(f"--root {root}: not a folder; choose a folder that is new or empty")
    if owner != os.getuid():
        # What is written there names files to delete and processes to kill.
        raise UserError(f"--root {root}: belongs to user id {owner}, not to you; choose another, or be that user")
    return root


def local_user() -> str:
    """The name of the user, whom all daemons run as."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise UserError(f"user id {os.getuid()} has no name in /etc/passwd; Slurm needs one") from None


def _of_this_machine(settings: Settings) -> Settings:
    """`settings` with the facts about the machine and its Slurm filled in."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return replace(
        settings,
        user=local_user(),
        host=socket.gethostname().split(".")[0],
        memory_mb=pages // 2**20,
        slurm_version=daemons.slurm_version(),
    )


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    with claim(tag_of(root)) as ours:
        if not ours:
            raise StartError(f"another `devcluster up` or `down` is at work on {root}; wait until it has finished")
        yield


def _make_root(root: Path) -> None:
    """Make the folder, for nobody else to look into, or check that the one that is there may be used."""
    if not root.parent.is_dir():
        raise UserError(f"--root {root}: the folder {root.parent} does not exist; make it first")
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        foreign = not (root / FILE).exists() and any(root.iterdir())
    except OSError as error:
        raise UserError(f"--root {root}: {error.strerror}; choose another folder") from None
    if foreign:
        raise UserError(f"--root {root}: holds other files; choose a folder that is new or empty")
    root.chmod(0o700)


def _clean(state: State) -> bool:
    """Remove every trace of a cluster, whatever state it is in; False if there was none."""
    settings = state.settings
    living = processes.find(settings, state.processes.values())
    if processes.is_inside(living):
        raise UserError(f"this is a job of the cluster at {settings.root}, and would end itself; do it outside of jobs")
    processes.end(settings, state.processes.values())
    found = network.remove(settings) or bool(living)
    if (settings.root / FILE).exists():
        shutil.rmtree(settings.root)
        found = True
    return found


def _choose(settings: Settings, held: ExitStack) -> Settings:
    """The first slot whose ports and network are free; it stays claimed until `up` has ended."""
    for slot in slot_candidates(settings.root):
        candidate = replace(settings, slot=slot)
        if (
            held.enter_context(claim(f"slot-{slot}"))
            and all(map(daemons.is_free, candidate.ports))
            and (not settings.namespaces or network.is_free(candidate.subnet))
        ):
            return candidate
    raise StartError("all ports from 20000 to 32000 are taken; take another cluster down first")


def _write_files(settings: Settings) -> None:
    for folder in settings.folders:
        folder.mkdir(exist_ok=True)
    settings.slurm_conf.write_text(settings.slurm_conf_text())
    (settings.slurm_conf.parent / "cgroup.conf").write_text(settings.cgroup_conf_text())
    settings.hosts.write_text(settings.hosts_text(Path("/etc/hosts").read_text(errors="replace")))
    if settings.accounting:
        _write_secret(settings.slurmdbd_conf, settings.slurmdbd_conf_text().encode())
    _write_secret(_munge_key(settings), secrets.token_bytes(1024))


def _write_secret(path: Path, content: bytes) -> None:
    """Munge and slurmdbd refuse files that others may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _munge_key(settings: Settings) -> Path:
    return settings.root / "etc" / "munge.key"


# The programs, by name, in the order in which they are started --------------------------------------------------------


def _names(settings: Settings) -> list[str]:
    accounting = ["mariadbd", "slurmdbd"] if settings.accounting else []
    holders = [f"holder-{node}" for node in settings.node_names] if settings.namespaces else []
    return ["munged", *accounting, "slurmctld", *holders, *(f"slurmd-{node}" for node in settings.node_names)]


def _command(state: State, name: str) -> list[str]:
    settings = state.settings
    root, conf = settings.root, str(settings.slurm_conf)
    program, _, node = name.partition("-")
    match program:
        case "munged":
            files = {"key-file": _munge_key(settings), "socket": settings.munge_socket}
            files |= {"pid-file": root / "run/munged.pid", "log-file": root / "log/munged.log"}
            files |= {"seed-file": root / "run/munge.seed"}
            # --force: the folders above the root (/tmp) are open to more people than munged likes.
            return ["munged", "--foreground", "--force", *(f"--{key}={path}" for key, path in files.items())]
        case "mariadbd":
            socket_option = f"--socket={settings.database_socket}"
            pid_option = f"--pid-file={root}/run/mariadbd.pid"
            return ["mariadbd", *_database_options(settings), "--skip-networking", socket_option, pid_option]
        case "slurmdbd":
            return ["slurmdbd", "-D"]
        case "slurmctld":
            command = ["slurmctld", "-D", "-f", conf]
            return network.as_host(settings, settings.controller, command) if settings.namespaces else command
        case "holder":
            return network.hold_node(settings, node)
        case "slurmd":
            command = ["slurmd", "-D", "-f", conf, "-N", node]
            holder = state.processes.get(f"holder-{node}")
            return network.in_node(holder.pid, command) if holder else command
    raise AssertionError(name)


def _database_options(settings: Settings) -> list[str]:
    # The files are as small as they get: they live for hours.
    return ["--no-defaults", f"--datadir={settings.root}/db", f"--user={settings.user}", "--innodb-log-file-size=4M"]


def _launch(state: State, say: Say) -> None:
    if state.settings.namespaces:
        network.create_bridge(state.settings)
    started = [_start(state, name, say) for name in _names(state.settings)]
    _await_nodes(state.settings, started)
    _try_out(state.settings, started[-1])
    _await_nodes(state.settings, started)


def _repair(state: State, say: Say) -> None:
    """Start again what has died of a running cluster, in the namespaces that are still there."""
    dead = state.dead
    if gone := [name.removeprefix("holder-") for name in dead if name.startswith("holder-")]:
        raise StartError(f"{state.settings.root}: lost the network of {', '.join(gone)}; run `devcluster down` first")
    started = [_start(state, name, say) for name in _names(state.settings) if name in dead]
    _await_nodes(state.settings, started)


def _start(state: State, name: str, say: Say) -> Daemon:
    """Start one program, and wait until the next one may rely on it."""
    settings = state.settings
    if name == "mariadbd" and not (settings.root / "db").exists():
        _install_database(settings, say)
    say(f"starting {name}")
    daemon = Daemon(settings, name, _command(state, name))
    state.processes[name] = daemon.process
    state.save()
    program, _, node = name.partition("-")
    match program:
        case "munged":
            daemon.wait_until(lambda: answers(settings.munge_socket), "its socket answered", _START_LIMIT)
        case "mariadbd":
            daemon.wait_until(lambda: answers(settings.database_socket), "its socket answered", _START_LIMIT)
        case "slurmdbd":
            port = ("127.0.0.1", settings.database_port)
            daemon.wait_until(lambda: answers(port), "its port answered", _START_LIMIT)
            _register(settings, daemon)
        case "slurmctld":
            ping = ("scontrol", "ping")
            daemon.wait_until(lambda: "UP" in ask(settings, *ping).stdout, "it answered `scontrol ping`", _START_LIMIT)
        case "holder":
            pid = daemon.process.pid
            daemon.wait_until(lambda: network.is_held(pid), "its namespaces were made", _START_LIMIT)
            network.connect_node(settings, node, pid)
    return daemon


def _install_database(settings: Settings, say: Say) -> None:
    say("making the accounting database")
    # `root` of the database needs no password: its socket lies in a folder that only the user may enter.
    options = [*_database_options(settings), "--auth-root-authentication-method=normal", "--skip-test-db"]
    log = settings.log("mariadb-install-db")
    result = ask(settings, "mariadb-install-db", *options, timeout=120)
    log.write_text(result.stdout + result.stderr)
    if result.returncode:
        raise StartError(f"mariadb-install-db ended with exit status {result.returncode}", log)


def _register(settings: Settings, daemon: Daemon) -> None:
    """Make the cluster known to slurmdbd: slurmctld wants to be known when it starts."""
    known = ask(settings, "sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=cluster").stdout
    if settings.name in known.split():
        return
    result = ask(settings, "sacctmgr", "--immediate", "add", "cluster", settings.name, timeout=_START_LIMIT)
    if result.returncode:
        raise StartError(f"sacctmgr could not add the cluster: {' '.join(result.stderr.split())}", daemon.log)


def _await_nodes(settings: Settings, started: list[Daemon]) -> None:
    """Wait until every slurmd among `started` has a node that Slurm can use, or uses already."""
    for daemon in started:
        program, _, node = daemon.name.partition("-")
        if program == "slurmd":
            daemon.wait_until(partial(_is_usable, settings, node), "Slurm could use its node", _START_LIMIT)


def _is_usable(settings: Settings, node: str) -> bool:
    return node_states(settings).get(node) in {"idle", "mixed", "allocated"}


def _try_out(settings: Settings, last: Daemon) -> None:
    """Run one task on every node: only that shows that the nodes also reach each other and the user's srun."""
    command = ("srun", f"--nodes={settings.nodes}", "--job-name=devcluster-check", "--time=1", "hostname")
    result = ask(settings, *command, timeout=_START_LIMIT)
    if result.returncode or len(result.stdout.split()) != settings.nodes:
        said = " ".join(result.stderr.split()) or f"printed {result.stdout!r}"
        raise StartError(f"`{' '.join(command)}` failed: {said}", last.log)
