"""Which processes are a cluster's own, read from /proc, and how to end them.

A process id alone says little: the kernel hands ids out again. So a process is remembered with its start time and the
boot it started in, and the processes of jobs, which nobody wrote down, are known by what they carry.
"""

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import StartError
from .settings import Settings

MARK = "HPCCKPT_DEVCLUSTER_MARK"  # set in the environment of every daemon; its value is the root
_CLIENTS = {"srun", "salloc", "sbatch", "sattach"}  # they would wait for a cluster that is no more


@dataclass(frozen=True)
class Process:
    """One process, told apart from a later one that got the same id."""

    pid: int
    start: int

    @property
    def alive(self) -> bool:
        """True while it runs; a zombie does not."""
        stat = read_stat(self.pid)
        return stat is not None and stat.start == self.start and not stat.dead


@dataclass(frozen=True)
class Stat:
    """What is of use in /proc/PID/stat."""

    name: str
    dead: bool
    parent: int
    start: int


def parse_stat(text: str) -> Stat:
    """Read one line of /proc/PID/stat, in which the name may hold blanks and parentheses."""
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()
    return Stat(name=name, dead=fields[0] in "ZX", parent=int(fields[1]), start=int(fields[19]))


def read_stat(pid: int) -> Stat | None:
    """The state of a process, or None if there is none."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text(errors="replace"))
    except (OSError, ValueError):
        return None


def identify(pid: int) -> Process:
    """A process that was just started, to be remembered."""
    stat = read_stat(pid)
    return Process(pid, stat.start if stat else -1)


def boot_id() -> str:
    """The kernel's name for this boot: start times count from it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def is_marked(environment: Iterable[str], name: str, settings: Settings) -> bool:
    """True if a process with this environment and name is a daemon, a job or a waiting client of the cluster."""
    variables = dict(entry.partition("=")[::2] for entry in environment)
    if variables.get(MARK) == str(settings.root):
        return True
    if variables.get("SLURM_CONF") != str(settings.slurm_conf):
        return False
    # A shell of `devcluster shell` has SLURM_CONF, too, but is no job: it stays.
    return "SLURM_JOB_ID" in variables or name in _CLIENTS


def has_mounted(mountinfo: str, hosts: Path) -> bool:
    """True if /etc/hosts is our `hosts` there: every process inside a node, whatever else it did to hide."""
    for line in mountinfo.splitlines():
        fields = line.split()
        # The path counts from the root of its own file system, and the file may be deleted: the name tells enough.
        if fields[4] == "/etc/hosts" and fields[3].removesuffix("//deleted").endswith(f"/{hosts.name}"):
            return True
    return False


def with_descendants(pids: set[int], parents: dict[int, int]) -> set[int]:
    """`pids` and all children of children; `parents` maps a process to its parent."""
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def find(settings: Settings, recorded: Iterable[Process] = ()) -> set[Process]:
    """All live processes of a cluster: those written down, those with its marks and all their descendants."""
    stats = {int(entry): stat for entry in os.listdir("/proc") if entry.isdigit() and (stat := read_stat(int(entry))) and not stat.dead}
    ours = {process.pid for process in recorded if process.alive}
    ours |= {pid for pid, stat in stats.items() if _carries_marks(pid, stat.name, settings)}
    ours = with_descendants(ours, {pid: stat.parent for pid, stat in stats.items()})
    return {Process(pid, stats[pid].start) for pid in ours & stats.keys()}


def is_inside(found: Iterable[Process]) -> bool:
    """True if the caller is one of these processes, as `down` typed within a job is."""
    return os.getpid() in {process.pid for process in found}


def end(settings: Settings, recorded: Iterable[Process] = (), timeout: float = 20) -> None:
    """Kill all processes of a cluster at once, and return when none is left."""
    recorded = list(recorded)
    deadline = time.monotonic() + timeout
    while left := find(settings, recorded):
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in left)
            raise StartError(f"these processes of {settings.root} do not die: {pids}; look at them with `ps -l -p`")
        for process in left:
            _kill(process)
        time.sleep(0.05)


def _kill(process: Process) -> None:
    if process.alive:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _carries_marks(pid: int, name: str, settings: Settings) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
        if is_marked(environment, name, settings):
            return True
        if os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
            return False
        return has_mounted(Path(f"/proc/{pid}/mountinfo").read_text(errors="replace"), settings.hosts)
    except OSError:  # gone meanwhile, or another user's
        return False
