"""What a cluster looks like: names, ports, addresses and the text of its configuration files. No side effects."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from .errors import UserError

MAX_NODES = 64
PARTITIONS = ("low", "high")

# A slot is a block of ports together with a subnet, so one number keeps two clusters apart. The ports lie below the
# kernel's ephemeral range (32768 up); 198.18.0.0/15 is set aside for test benches, so nothing real is behind it.
SLOTS = 150
_FIRST_PORT = 20_000
_PORTS_PER_SLOT = 80
_TEST_BENCHES = IPv4Network("198.18.0.0/15")

# The longest Unix socket below the root is slurmstepd's: spool/n64/n64_<job>.<step>.<het component>.
_SOCKET_LIMIT = 107
_LONGEST_SOCKET = "/spool/n64/n64_67108863.4294967294.4294967294"
_ROOT_LIMIT = _SOCKET_LIMIT - len(_LONGEST_SOCKET)

_REPEATING_KEYS = {"nodename", "partitionname"}


def check_root(root: Path) -> Path:
    """Return `root` as an absolute path that Slurm's configuration files can hold, or say why it cannot be used."""
    root = root.expanduser().resolve()
    if not re.fullmatch(r"[A-Za-z0-9/._+@-]+", str(root)):
        raise UserError(f"--root {root}: Slurm cannot use this path; use only letters, digits and / . _ + @ -")
    if len(str(root)) > _ROOT_LIMIT:
        raise UserError(
            f"--root {root}: {len(str(root))} characters, too long for the Unix sockets below it; use a path of at most {_ROOT_LIMIT}"
        )
    return root


def tag_of(root: Path) -> str:
    """Eight characters that stand for `root` in the names of interfaces, which may have 15 in all."""
    return hashlib.sha256(str(root).encode()).hexdigest()[:8]


def slot_candidates(root: Path) -> list[int]:
    """All slots, in the order in which the cluster at `root` tries them."""
    first = int(tag_of(root), 16) % SLOTS
    return [(first + step) % SLOTS for step in range(SLOTS)]


def parse_override(text: str) -> tuple[str, str]:
    """Split `KEY=VALUE` of `--set`."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z]+", key) or not value.strip() or not value.isprintable():
        raise UserError(f"--set {text!r}: not KEY=VALUE; write a line of slurm.conf, such as SlurmdTimeout=10")
    return key, value.strip()


@dataclass(frozen=True)
class Settings:
    """One cluster: what the user asked for and the few facts about the machine that its files depend on."""

    root: Path
    nodes: int = 4
    cpus: int = 4
    accounting: bool = False
    namespaces: bool = True
    overrides: tuple[tuple[str, str], ...] = ()
    slot: int = 0
    user: str = "root"
    host: str = "localhost"
    memory_mb: int = 1024
    slurm_version: tuple[int, int] = (22, 5)

    # names -----------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The cluster's name, which is also that of its bridge and the stem of its other interfaces."""
        return f"hc{tag_of(self.root)}"

    @property
    def node_names(self) -> list[str]:
        """The names n1, n2, n3 and so on."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def interface(self, node: str) -> str:
        """The machine's end of the cable to `node`: setting it down cuts the node off."""
        return f"{self.name}-{node.removeprefix('n')}"

    @property
    def controller(self) -> str:
        """The host name of slurmctld, which has one of its own wherever nodes do."""
        return "controller" if self.namespaces else self.host

    # ports and addresses ---------------------------------------------------------------------------------------------

    @property
    def controller_port(self) -> int:
        """Where slurmctld listens."""
        return _FIRST_PORT + self.slot * _PORTS_PER_SLOT

    @property
    def database_port(self) -> int:
        """Where slurmdbd listens."""
        return self.controller_port + 1

    def node_port(self, node: str) -> int:
        """Where the slurmd of `node` listens; they differ even between namespaces, which does no harm."""
        return self.controller_port + 1 + int(node.removeprefix("n"))

    @property
    def ports(self) -> list[int]:
        """All ports that have to be free."""
        return [self.controller_port, self.database_port, *map(self.node_port, self.node_names)]

    @property
    def subnet(self) -> IPv4Network:
        """The nodes' network."""
        return IPv4Network((_TEST_BENCHES.network_address + self.slot * 256, 24))

    @property
    def controller_address(self) -> IPv4Address:
        """Where nodes reach slurmctld: the bridge's address, or the loopback."""
        return self.subnet[1] if self.namespaces else IPv4Address("127.0.0.1")

    def node_address(self, node: str) -> IPv4Address:
        """The address of `node`."""
        return self.subnet[10 + int(node.removeprefix("n"))] if self.namespaces else IPv4Address("127.0.0.1")

    # files -----------------------------------------------------------------------------------------------------------

    @property
    def folders(self) -> list[Path]:
        """All folders below the root."""
        spools = [self.root / "spool" / node for node in self.node_names]
        return [*(self.root / name for name in ("etc", "run", "log", "state", "spool")), *spools]

    @property
    def slurm_conf(self) -> Path:
        """What SLURM_CONF points to."""
        return self.root / "etc" / "slurm.conf"

    @property
    def slurmdbd_conf(self) -> Path:
        """The configuration of slurmdbd."""
        return self.root / "etc" / "slurmdbd.conf"

    @property
    def hosts(self) -> Path:
        """The nodes' /etc/hosts; its name holds the tag, so a process that has it mounted is known to be ours."""
        return self.root / "etc" / f"hosts-{tag_of(self.root)}"

    @property
    def munge_socket(self) -> Path:
        """Munge's socket."""
        return self.root / "run" / "munge.sock"

    @property
    def database_socket(self) -> Path:
        """MariaDB's socket; the database has no port."""
        return self.root / "run" / "db.sock"

    def log(self, process: str) -> Path:
        """What `process` wrote on its standard output and error."""
        return self.root / "log" / f"{process}.out"

    # texts -----------------------------------------------------------------------------------------------------------

    def slurm_conf_text(self) -> str:
        """slurm.conf, with the user's `--set` lines in place."""
        return _as_text(_override(self._slurm_conf_lines(), self.overrides))

    def _slurm_conf_lines(self) -> list[tuple[str, str]]:
        root = self.root
        lines = [
            ("ClusterName", self.name),
            ("SlurmctldHost", f"{self.controller}({self.controller_address})"),
            ("SlurmctldPort", str(self.controller_port)),
            ("SlurmUser", self.user),
            ("SlurmdUser", self.user),
            ("AuthType", "auth/munge"),
            # A requeued job starts again cred_expire + 1 s later at the earliest: 121 s by default.
            ("AuthInfo", f"socket={self.munge_socket},cred_expire=5"),
            ("StateSaveLocation", f"{root}/state"),
            ("SlurmdSpoolDir", f"{root}/spool/%n"),
            ("SlurmctldPidFile", f"{root}/run/slurmctld.pid"),
            ("SlurmdPidFile", f"{root}/run/%n.pid"),
            ("SlurmctldLogFile", f"{root}/log/slurmctld.log"),
            ("SlurmdLogFile", f"{root}/log/%n.log"),
            ("MailProg", "/bin/true"),
            ("ProctrackType", "proctrack/linuxproc"),
            ("TaskPlugin", "task/none"),
            ("SwitchType", "switch/none"),
            ("MpiDefault", "none"),
            ("JobAcctGatherType", "jobacct_gather/linux"),
            ("SelectType", "select/cons_tres"),
            ("SelectTypeParameters", "CR_Core"),
            ("SlurmdParameters", "config_overrides"),  # a node may claim more CPUs than the machine has
            ("ReturnToService", "2"),
            ("SchedulerType", "sched/backfill"),
            ("SchedulerParameters", "batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2"),
            ("KillWait", "10"),
            ("OverTimeLimit", "0"),
            ("MinJobAge", "300"),
            ("SlurmdTimeout", "300"),
            ("JobRequeue", "1"),
            ("PreemptType", "preempt/partition_prio"),
            ("PreemptMode", "REQUEUE"),
        ]
        if self.namespaces:
            # Not to be reached from outside. It listens where its host name leads, which on a loopback is anywhere.
            lines.append(("CommunicationParameters", "NoCtldInAddrAny"))
        if self.slurm_version < (23, 2):
            lines.append(("SlurmctldParameters", "preempt_send_user_signal"))
        else:
            lines.append(("PreemptParameters", "send_user_signal"))
        if self.accounting:
            lines += [
                ("AccountingStorageType", "accounting_storage/slurmdbd"),
                ("AccountingStorageHost", "localhost"),
                ("AccountingStoragePort", str(self.database_port)),
                ("AccountingStoragePass", str(self.munge_socket)),  # or slurmctld asks the system's munge
            ]
        shape = f"CPUs={self.cpus} Sockets=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory={self.memory_mb}"
        for node in self.node_names:
            host = node if self.namespaces else "localhost"
            where = f"NodeHostname={host} NodeAddr={self.node_address(node)} Port={self.node_port(node)}"
            lines.append(("NodeName", f"{node} {where} {shape} State=UNKNOWN"))
        low, high = PARTITIONS
        common = "Nodes=ALL MaxTime=UNLIMITED State=UP"
        lines += [
            ("PartitionName", f"{low} {common} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20"),
            ("PartitionName", f"{high} {common} PriorityTier=10 PreemptMode=OFF"),
        ]
        return lines

    def cgroup_conf_text(self) -> str:
        """cgroup.conf: keep off the machine's cgroups, which need rights and a systemd that may not be there."""
        # Before 23.02 there was no "disabled"; v1 named outright does nothing until some plugin asks it to.
        plugin = "disabled" if self.slurm_version >= (23, 2) else "cgroup/v1"
        return f"CgroupPlugin={plugin}\n"

    def slurmdbd_conf_text(self) -> str:
        """slurmdbd.conf."""
        return _as_text(
            [
                ("DbdHost", "localhost"),
                ("DbdPort", str(self.database_port)),
                ("SlurmUser", self.user),
                ("AuthType", "auth/munge"),
                ("AuthInfo", f"socket={self.munge_socket}"),
                ("LogFile", f"{self.root}/log/slurmdbd.log"),
                ("PidFile", f"{self.root}/run/slurmdbd.pid"),
                ("StorageType", "accounting_storage/mysql"),
                ("StorageHost", "localhost"),
                ("StorageUser", "root"),
                ("StorageLoc", "slurm_acct_db"),
            ]
        )

    def hosts_text(self, machine_hosts: str) -> str:
        """The nodes' /etc/hosts: the machine's own, and the names of the cluster."""
        # The machine's own name often stands for 127.0.0.1, which inside a node would be the node itself.
        ours = {name: self.node_address(name) for name in self.node_names}
        ours[self.controller] = self.controller_address
        if self.host != "localhost":
            ours.setdefault(self.host, self.controller_address)
        lines = [f"{address} {name}" for name, address in ours.items()]
        for line in machine_hosts.splitlines():
            address, *names = line.partition("#")[0].split() or [""]
            kept = [name for name in names if name.partition(".")[0] not in ours]
            if kept:
                lines.append(" ".join([address, *kept]))
        return "\n".join(lines) + "\n"


def _override(lines: list[tuple[str, str]], overrides: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Replace the line that an override names, or add it; nodes and partitions are told apart by their name, too."""
    table = {_identity(key, value): (key, value) for key, value in lines}
    table.update({_identity(key, value): (key, value) for key, value in overrides})
    return list(table.values())


def _identity(key: str, value: str) -> tuple[str, str]:
    key = key.lower()
    return key, value.split(maxsplit=1)[0] if key in _REPEATING_KEYS else ""


def _as_text(lines: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{key}={value}\n" for key, value in lines)
