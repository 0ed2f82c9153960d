"""Find, start and await the programs that make up a cluster."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import StartError, UserError
from .processes import MARK, Process, identify
from .settings import Settings

_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # daemons live there, and users' PATH often lacks them
_PACKAGES = {
    "slurm-wlm slurm-wlm-basic-plugins": ("slurmctld", "slurmd", "srun", "sinfo"),
    "munge": ("munged",),
}
_NAMESPACE_PACKAGES = {"iproute2": ("ip",), "util-linux mount": ("unshare", "nsenter", "mount")}
_ACCOUNTING_PACKAGES = {
    "slurmdbd slurm-client": ("slurmdbd", "sacctmgr"),
    "mariadb-server": ("mariadbd", "mariadb-install-db"),
}
_LEAKING = ("SLURM_", "SBATCH_", "SALLOC_")


def search_path() -> str:
    """PATH with the folders for daemons at its end."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM_FOLDERS])


def require_programs(*, namespaces: bool, accounting: bool, path: str | None = None) -> None:
    """Name every missing program and what to install, all at once."""
    packages = _PACKAGES | (_NAMESPACE_PACKAGES if namespaces else {}) | (_ACCOUNTING_PACKAGES if accounting else {})
    path = search_path() if path is None else path
    missing = {
        package: names
        for package, programs in packages.items()
        if (names := [name for name in programs if not shutil.which(name, path=path)])
    }
    if missing:
        programs = ", ".join(name for names in missing.values() for name in names)
        raise UserError(f"not found in {path}: {programs}; install with `apt-get install {' '.join(missing)}`")


def clean_environment(settings: Settings) -> dict[str, str]:
    """The caller's environment, pointing to this cluster and without what another Slurm left in it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_LEAKING)}
    return kept | {"SLURM_CONF": str(settings.slurm_conf)}


def ask(settings: Settings, *command: str, timeout: float = 10) -> subprocess.CompletedProcess[str]:
    """Run a client command to its end; one without an answer in time counts as failed."""
    environment = clean_environment(settings) | {"PATH": search_path()}
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:g} s")


def slurm_version() -> tuple[int, int]:
    """Year and month of the installed Slurm."""
    output = subprocess.run(
        ["slurmctld", "-V"], env=os.environ | {"PATH": search_path()}, capture_output=True, text=True, check=False
    ).stdout
    try:
        year, month = output.split()[-1].split(".")[:2]
        return int(year), int(month)
    except (IndexError, ValueError):
        raise UserError(f"`slurmctld -V` answered {output!r}, which names no version; is it Slurm's?") from None


class Daemon:
    """One program that `up` started, for as long as `up` runs."""

    def __init__(self, settings: Settings, name: str, command: Sequence[str]) -> None:
        """Start `command`, with its output in the log of that name."""
        self.name = name
        self.log = settings.log(name)
        environment = clean_environment(settings) | {
            "PATH": search_path(),
            MARK: str(settings.root),
            # The only way to tell the MariaDB client inside slurmdbd where the socket is.
            "MYSQL_UNIX_PORT": str(settings.database_socket),
        }
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                env=environment,
                cwd=settings.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C meant for `up` or for a user's shell is not for the cluster
            )
        self.process: Process = identify(self._popen.pid)

    def poll(self) -> int | None:
        """Return its exit status, or None while it runs."""
        return self._popen.poll()

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float) -> None:
        """Wait for `condition`; give up when time is up or the program has ended."""
        deadline = time.monotonic() + timeout
        while not condition():
            if (status := self.poll()) is not None:
                raise StartError(f"{self.name} ended (exit status {status}) before {what}", self.log)
            if time.monotonic() > deadline:
                raise StartError(f"{self.name}: {what} took longer than {timeout:g} s", self.log)
            time.sleep(0.05)


def answers(address: tuple[str, int] | Path) -> bool:
    """True if something accepts connections there."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        return client.connect_ex(str(address) if isinstance(address, Path) else address) == 0


def is_free(port: int) -> bool:
    """True if one may listen on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@contextmanager
def claim(name: str) -> Iterator[bool]:
    """Hold a name that only one process of this machine can have; False if another holds it.

    An abstract socket leaves no file behind and goes away with its holder, however that ends.
    """
    with socket.socket(socket.AF_UNIX) as holder:
        try:
            holder.bind(f"\0hpcckpt-devcluster-{name}")
        except OSError:
            yield False
        else:
            yield True
