"""One bridge, and for every node a cable to it, an address, a host name and an /etc/hosts of its own."""

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network
from pathlib import Path

from .daemons import search_path
from .errors import StartError
from .settings import Settings

_AS_HOST = 'mount --bind "$1" /etc/hosts && echo "$2" >/proc/sys/kernel/hostname && shift 2 && exec "$@"'


def hold_node(settings: Settings, node: str) -> list[str]:
    """The command that makes the namespaces of `node` and stays in them: a node outlives its slurmd."""
    # Not `ip netns`: it leaves a mount behind, and its `exec` hides the machine's /sys from slurmd.
    return ["unshare", "--net", *as_host(settings, node, ["sleep", "infinity"])]


def in_node(holder: int, command: Sequence[str]) -> list[str]:
    """`command`, to run inside the node that the process `holder` holds."""
    return ["nsenter", f"--target={holder}", "--mount", "--uts", "--net", *command]


def as_host(settings: Settings, name: str, command: Sequence[str]) -> list[str]:
    """`command`, to run with the host name `name` and with the cluster's names in its /etc/hosts."""
    return ["unshare", "--mount", "--uts", "sh", "-c", _AS_HOST, "sh", str(settings.hosts), name, *command]


def is_held(holder: int) -> bool:
    """True when the process `holder` has made its namespaces."""
    # exec is its last step, and `sleep` is what it turns into.
    try:
        return Path(f"/proc/{holder}/comm").read_text().strip() == "sleep"
    except OSError:
        return False


def create_bridge(settings: Settings) -> None:
    """Make the bridge, with the machine's own address on it."""
    prefix = settings.subnet.prefixlen
    _ip(
        f"link add {settings.name} type bridge",
        f"address add {settings.controller_address}/{prefix} dev {settings.name}",
        f"link set {settings.name} up",
    )


def connect_node(settings: Settings, node: str, holder: int) -> None:
    """Lay a cable from the bridge into the node that the process `holder` holds."""
    cable = settings.interface(node)
    _ip(
        f"link add {cable} type veth peer name eth0 netns {holder}",
        f"link set {cable} master {settings.name} up",
    )
    _ip(
        f"address add {settings.node_address(node)}/{settings.subnet.prefixlen} dev eth0",
        "link set lo up",
        "link set eth0 up",
        inside=["nsenter", f"--target={holder}", "--net"],
    )


def remove(settings: Settings) -> bool:
    """Remove every interface with the cluster's name, those of a cluster that died as well; False if there was none."""
    names = [name for name in os.listdir("/sys/class/net") if name.split("-")[0] == settings.name]
    for name in names:
        # A cable goes by itself some time after its namespace: it may be gone already.
        subprocess.run(["ip", "link", "delete", name], env=_environment(), capture_output=True, check=False)
    return bool(names)


def is_free(subnet: IPv4Network) -> bool:
    """True if no address and no route (but the default one) of this machine is in `subnet`."""
    command = ["ip", "-json", "-4", "route", "show", "table", "all"]
    result = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        raise StartError(f"`{' '.join(command)}` failed: {' '.join(result.stderr.split())}")
    return not any(subnet.overlaps(taken) for taken in routed(json.loads(result.stdout or "[]")))


def routed(routes: Iterable[dict[str, object]]) -> list[IPv4Network]:
    """The networks in what `ip -json route` answered, without the default route."""
    targets = (str(route.get("dst", "default")) for route in routes)
    return [IPv4Network(target, strict=False) for target in targets if target[0].isdigit() and target != "0.0.0.0/0"]


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": search_path()}


def _ip(*commands: str, inside: Sequence[str] = ()) -> None:
    """Run commands of `ip`, all in one process."""
    result = subprocess.run(
        [*inside, "ip", "-batch", "-"],
        input="\n".join(commands) + "\n",
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise StartError(
            f"ip: {' '.join(result.stderr.split())} (while at: {'; '.join(commands)}); "
            "if this machine does not allow namespaces, use --no-namespaces"
        )
