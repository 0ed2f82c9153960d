"""Names, ports, addresses and the text of the configuration files."""

from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise
from pathlib import Path

import pytest
from devclusterlib.errors import UserError
from devclusterlib.settings import (
    MAX_NODES,
    SLOTS,
    Settings,
    check_root,
    parse_override,
    slot_candidates,
    tag_of,
)

ROOT = Path("/tmp/one")


def parsed(text: str) -> dict[str, list[str]]:
    """Read KEY=VALUE lines back; a key may come more than once."""
    result: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        result.setdefault(key, []).append(value)
    return result


def named(lines: list[str]) -> dict[str, dict[str, str]]:
    """Read the lines of NodeName or PartitionName back: name, then KEY=VALUE words."""
    return {line.split()[0]: dict(word.split("=", 1) for word in line.split()[1:]) for line in lines}


def test_every_key_comes_once_but_nodes_and_partitions() -> None:
    conf = parsed(Settings(ROOT, nodes=3, accounting=True).slurm_conf_text())
    assert {key for key, values in conf.items() if len(values) > 1} == {"NodeName", "PartitionName"}


def test_nodes_with_namespaces_have_names_and_addresses_of_their_own() -> None:
    settings = Settings(ROOT, nodes=3, cpus=6, memory_mb=777, slot=5)
    nodes = named(parsed(settings.slurm_conf_text())["NodeName"])
    assert list(nodes) == ["n1", "n2", "n3"]
    assert [node["NodeHostname"] for node in nodes.values()] == ["n1", "n2", "n3"]
    assert [node["NodeAddr"] for node in nodes.values()] == ["198.18.5.11", "198.18.5.12", "198.18.5.13"]
    assert {node["CPUs"] for node in nodes.values()} == {node["CoresPerSocket"] for node in nodes.values()} == {"6"}
    assert {node["RealMemory"] for node in nodes.values()} == {"777"}


def test_nodes_without_namespaces_differ_by_port_only() -> None:
    settings = Settings(ROOT, nodes=3, namespaces=False, host="box")
    conf = parsed(settings.slurm_conf_text())
    nodes = named(conf["NodeName"])
    assert {node["NodeAddr"] for node in nodes.values()} == {"127.0.0.1"}
    assert {node["NodeHostname"] for node in nodes.values()} == {"localhost"}
    assert len({node["Port"] for node in nodes.values()} | set(conf["SlurmctldPort"])) == 4
    assert conf["SlurmctldHost"] == ["box(127.0.0.1)"]


def test_slurmctld_is_bound_to_the_bridge_only_where_its_name_leads_there() -> None:
    bridged, loopback = Settings(ROOT, host="box"), Settings(ROOT, host="box", namespaces=False)
    assert parsed(bridged.slurm_conf_text())["CommunicationParameters"] == ["NoCtldInAddrAny"]
    assert parsed(bridged.slurm_conf_text())["SlurmctldHost"] == [f"controller({bridged.controller_address})"]
    assert "CommunicationParameters" not in parsed(loopback.slurm_conf_text())


def test_low_is_the_default_and_is_requeued_for_high() -> None:
    conf = parsed(Settings(ROOT).slurm_conf_text())
    low, high = named(conf["PartitionName"]).values()
    assert (low["Default"], low["PreemptMode"], low["GraceTime"]) == ("YES", "REQUEUE", "20")
    assert high["PreemptMode"] == "OFF"
    assert int(low["PriorityTier"]) < int(high["PriorityTier"])
    assert (conf["PreemptType"], conf["PreemptMode"]) == (["preempt/partition_prio"], ["REQUEUE"])


@pytest.mark.parametrize(
    ("version", "key", "other"),
    [
        ((22, 5), "SlurmctldParameters=preempt_send_user_signal", "PreemptParameters"),
        ((23, 2), "PreemptParameters=send_user_signal", "SlurmctldParameters"),
        ((25, 11), "PreemptParameters=send_user_signal", "SlurmctldParameters"),
    ],
)
def test_the_user_signal_at_preemption_is_spelt_for_the_version(version: tuple[int, int], key: str, other: str) -> None:
    text = Settings(ROOT, slurm_version=version).slurm_conf_text()
    assert key in text.splitlines()
    assert f"{other}=" not in text


def test_cgroups_are_kept_off_in_the_words_of_the_version() -> None:
    assert Settings(ROOT, slurm_version=(22, 5)).cgroup_conf_text() == "CgroupPlugin=cgroup/v1\n"
    assert Settings(ROOT, slurm_version=(23, 2)).cgroup_conf_text() == "CgroupPlugin=disabled\n"


def test_munge_is_the_clusters_own_and_credentials_expire_soon() -> None:
    settings = Settings(ROOT, accounting=True)
    assert f"AuthInfo=socket={ROOT}/run/munge.sock,cred_expire=5" in settings.slurm_conf_text().splitlines()
    assert parsed(settings.slurmdbd_conf_text())["AuthInfo"] == [f"socket={ROOT}/run/munge.sock"]


def test_accounting_is_configured_only_where_asked_for() -> None:
    with_it = parsed(Settings(ROOT, accounting=True).slurm_conf_text())
    dbd = parsed(Settings(ROOT, accounting=True).slurmdbd_conf_text())
    assert with_it["AccountingStoragePort"] == dbd["DbdPort"]
    assert with_it["AccountingStoragePass"] == [f"{ROOT}/run/munge.sock"]
    assert "Accounting" not in Settings(ROOT).slurm_conf_text()


def test_all_files_lie_under_the_root() -> None:
    settings = Settings(ROOT, accounting=True)
    text = settings.slurm_conf_text() + settings.slurmdbd_conf_text()
    paths = [word for word in text.replace("=", " ").replace(",", " ").split() if word.startswith("/")]
    assert paths
    assert {path for path in paths if not path.startswith(f"{ROOT}/")} == {"/bin/true"}
    assert all(folder.is_relative_to(ROOT) for folder in settings.folders)


def test_an_override_replaces_a_line_or_adds_one() -> None:
    overrides = (("killwait", "3"), ("FirstJobId", "100"))
    lines = Settings(ROOT, overrides=overrides).slurm_conf_text().splitlines()
    assert [line for line in lines if line.lower().startswith("killwait=")] == ["killwait=3"]
    assert "FirstJobId=100" in lines


def test_an_override_of_one_partition_leaves_the_other_alone() -> None:
    overrides = (("PartitionName", "low Nodes=n1"), ("PartitionName", "extra Nodes=n2"))
    partitions = named(parsed(Settings(ROOT, overrides=overrides).slurm_conf_text())["PartitionName"])
    assert list(partitions) == ["low", "high", "extra"]
    assert partitions["low"] == {"Nodes": "n1"}
    assert partitions["high"]["PriorityTier"] == "10"


@pytest.mark.parametrize("text", ["SlurmdTimeout", "=3", "Key=", "Key= ", "Two Words=3", "Key=a\nOther=b", "Key=a\tb"])
def test_a_malformed_override_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not KEY=VALUE"):
        parse_override(text)


def test_an_override_may_hold_further_equals_signs() -> None:
    assert parse_override("PartitionName=low Nodes=n1") == ("PartitionName", "low Nodes=n1")


def test_slots_share_neither_ports_nor_networks() -> None:
    all_slots = [Settings(ROOT, nodes=MAX_NODES, slot=slot) for slot in range(SLOTS)]
    ports = [port for settings in all_slots for port in settings.ports]
    assert len(set(ports)) == len(ports) == SLOTS * (MAX_NODES + 2)
    assert min(ports) > 1024
    assert max(ports) < 32768  # where the kernel's own choice of ports begins
    assert not any(one.subnet.overlaps(other.subnet) for one, other in pairwise(all_slots))
    assert all(settings.subnet.subnet_of(IPv4Network("198.18.0.0/15")) for settings in all_slots)


def test_addresses_of_one_cluster_differ_and_lie_in_its_network() -> None:
    settings = Settings(ROOT, nodes=MAX_NODES, slot=SLOTS - 1)
    addresses = {settings.controller_address, *map(settings.node_address, settings.node_names)}
    assert len(addresses) == MAX_NODES + 1
    assert addresses <= set(settings.subnet.hosts())


def test_each_root_tries_all_slots_and_begins_elsewhere() -> None:
    firsts = {slot_candidates(Path(f"/tmp/root{number}"))[0] for number in range(50)}
    assert sorted(slot_candidates(ROOT)) == list(range(SLOTS))
    assert slot_candidates(ROOT) == slot_candidates(ROOT)
    assert len(firsts) > 25


def test_interface_names_fit_and_differ_between_roots() -> None:
    one, other = Settings(ROOT, nodes=MAX_NODES), Settings(Path("/tmp/other"), nodes=MAX_NODES)
    names = [settings.interface(node) for settings in (one, other) for node in settings.node_names]
    names += [one.name, other.name]
    assert len(set(names)) == 2 * MAX_NODES + 2
    assert max(map(len, names)) <= 15


def test_the_longest_root_leaves_room_for_the_longest_socket() -> None:
    longest = next(Path("/" + "r" * length) for length in range(107, 0, -1) if not refused(Path("/" + "r" * length)))
    socket = f"{longest}/spool/n64/n64_67108863.4294967294.4294967294"
    assert len(socket) == 107  # 108 with its final zero, as the kernel has it
    assert refused(Path(f"{longest}r"))


def refused(root: Path) -> bool:
    """True if `check_root` does not take `root`."""
    try:
        check_root(root)
    except UserError:
        return True
    return False


@pytest.mark.parametrize("root", ["/tmp/a b", "/tmp/a#b", "/tmp/%n", "/tmp/a,b", "/tmp/a=b", "/tmp/a(b)"])
def test_a_root_that_slurm_would_misread_is_refused(root: str) -> None:
    with pytest.raises(UserError, match="cannot use this path"):
        check_root(Path(root))


def test_two_spellings_of_a_root_are_the_same_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "c")
    roots = [Path("c"), Path("./d/../c"), tmp_path / "c", Path("link")]
    assert len({tag_of(root.resolve()) for root in roots}) == 1
    if not refused(tmp_path / "c"):
        assert {check_root(root) for root in roots} == {tmp_path / "c"}


def hosts(settings: Settings, machine: str) -> dict[str, str]:
    """What each name resolves to: the first line that has it wins."""
    table: dict[str, str] = {}
    for line in settings.hosts_text(machine).splitlines():
        address, *names = line.split()
        for name in names:
            table.setdefault(name, address)
    return table


def test_the_nodes_hosts_file_names_the_cluster_and_keeps_the_rest() -> None:
    settings = Settings(ROOT, nodes=2, host="box", slot=7)
    machine = "127.0.0.1 localhost # here\n127.0.1.1 box.example.org box\n\n# 10.9.9.9 old\n10.0.0.5 store\n"
    assert hosts(settings, machine) == {
        "n1": "198.18.7.11",
        "n2": "198.18.7.12",
        "controller": "198.18.7.1",
        "box": "198.18.7.1",
        "localhost": "127.0.0.1",
        "store": "10.0.0.5",
    }


@pytest.mark.parametrize("host", ["localhost", "n1"])
def test_an_odd_host_name_displaces_no_other(host: str) -> None:
    settings = Settings(ROOT, nodes=1, host=host)
    table = hosts(settings, "127.0.0.1 localhost n1\n::1 localhost\n")
    assert table["localhost"] == "127.0.0.1"
    assert IPv4Address(table["n1"]) == settings.node_address("n1")
