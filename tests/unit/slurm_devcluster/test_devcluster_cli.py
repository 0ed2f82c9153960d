"""What a user sees who makes a mistake, and the parts of starting programs that need no Slurm."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from devclusterlib import cli, cluster
from devclusterlib.daemons import Daemon, answers, claim, clean_environment, is_free, require_programs
from devclusterlib.errors import StartError, UserError
from devclusterlib.network import routed
from devclusterlib.settings import Settings
from devclusterlib.state import FILE


@pytest.fixture
def root() -> Iterator[Path]:
    """A short path: pytest's own may be too long for sockets."""
    folder = Path(f"/tmp/devcluster-test-{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _keep_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def complaint(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run a command that fails, and return its one line."""
    assert cli.main(list(arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("devcluster: ")
    return captured.err


@pytest.mark.parametrize("command", ["up", "down", "status", "shell"])
def test_a_root_that_is_too_long_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, 2, command, "--root", "/tmp/" + "x" * 100)
    assert "at most" in line


def start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Need no program, and make sure that a check that fails to refuse does not bring a cluster up."""

    def launch(*_: object) -> None:
        raise AssertionError("would have started a cluster")

    monkeypatch.setattr("devclusterlib.daemons.require_programs", lambda **_: None)
    monkeypatch.setattr("devclusterlib.daemons.slurm_version", lambda: (22, 5))
    monkeypatch.setattr("devclusterlib.cluster._launch", launch)


@pytest.mark.parametrize("command", ["up", "down"])
def test_a_folder_with_other_files_is_not_touched(
    command: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_nothing(monkeypatch)
    (root / "thesis.tex").write_text("precious")
    line = complaint(capsys, 2, command, "--root", str(root), *(["--no-namespaces"] if command == "up" else []))
    assert str(root) in line
    assert (root / "thesis.tex").read_text() == "precious"


def test_a_root_that_is_a_file_or_lies_nowhere_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_nothing(monkeypatch)
    (root / "file").touch()
    assert "Not a directory" in complaint(capsys, 2, "down", "--root", str(root / "file" / "x"))
    assert "not a folder" in complaint(capsys, 2, "status", "--root", str(root / "file"))
    assert "does not exist" in complaint(capsys, 2, "up", "--no-namespaces", "--root", str(root / "no" / "where"))


def test_another_users_root_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: root.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to user id"):
        cluster.own_root(root)


def test_without_a_cluster_there_is_nothing_to_show_or_enter_or_end(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no cluster runs there" in complaint(capsys, 1, "shell", "--root", str(root), "--", "true")
    assert "there was no cluster" in complaint(capsys, 0, "down", "--root", str(root))
    assert cli.main(["status", "--root", str(root)]) == 1
    assert "no cluster" in capsys.readouterr().out


def test_down_deletes_leftovers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leftovers = root / "c"
    leftovers.mkdir()
    (leftovers / FILE).write_text("half a fi")
    assert "leftovers" in (cli.main(["status", "--root", str(leftovers)]), capsys.readouterr().out)[1]
    assert "nothing left" in complaint(capsys, 0, "down", "--root", str(leftovers))
    assert not leftovers.exists()


@pytest.mark.parametrize("arguments", [["--nodes", "0"], ["--nodes", "65"], ["--cpus", "-1"], ["--nodes", "two"], ["x"]])
def test_numbers_out_of_range_are_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["up", *arguments])
    assert "Traceback" not in capsys.readouterr().err


def test_missing_programs_are_all_named_with_what_to_install(tmp_path: Path) -> None:
    for name in ("slurmctld", "slurmd", "srun", "sinfo", "scontrol", "ip", "nsenter", "mount"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(UserError) as caught:
        require_programs(namespaces=True, accounting=True, path=str(tmp_path))
    missing, advice = str(caught.value).split("; install with ")
    assert missing.split(": ")[-1] == "munged, unshare, slurmdbd, sacctmgr, mariadbd, mariadb-install-db"
    assert advice == "`apt-get install munge util-linux mount slurmdbd slurm-client mariadb-server`"
    (tmp_path / "munged").symlink_to(tmp_path / "slurmd")
    require_programs(namespaces=False, accounting=False, path=str(tmp_path))


def test_the_default_root_is_the_users_choice_or_one_a_user() -> None:
    assert cli.default_root({}, 7) == Path("/tmp/hpcckpt-devcluster-7")
    assert cli.default_root({"HPCCKPT_DEVCLUSTER_ROOT": "/data/c"}, 7) == Path("/data/c")


def test_variables_of_another_slurm_do_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CPU_BIND", "SLURM_CONF", "SBATCH_PARTITION", "SALLOC_ACCOUNT"):
        monkeypatch.setenv(name, "leaked")
    monkeypatch.setenv("KEPT", "yes")
    environment = clean_environment(Settings(Path("/tmp/one")))
    assert "leaked" not in environment.values()
    assert environment["SLURM_CONF"] == "/tmp/one/etc/slurm.conf"
    assert environment["KEPT"] == "yes"


def test_a_name_is_claimed_by_one_at_a_time() -> None:
    name = f"test-{os.getpid()}"
    with claim(name) as first, claim(name) as second, claim(f"{name}-other") as other:
        assert (first, second, other) == (True, False, True)
    with claim(name) as again:
        assert again


def test_a_port_in_use_is_not_free() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not is_free(port)
        assert answers(("127.0.0.1", port))
    assert is_free(port)
    assert not answers(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("command", "said"),
    [(["sh", "-c", "echo no such key; exit 7"], "exit status 7"), (["sleep", "60"], "longer than 0.2 s")],
)
def test_a_daemon_that_does_not_come_up_is_reported_with_its_log(tmp_path: Path, command: list[str], said: str) -> None:
    (tmp_path / "log").mkdir()
    daemon = Daemon(Settings(tmp_path), "slurmd-n1", command)
    try:
        with pytest.raises(StartError, match=said) as caught:
            daemon.wait_until(lambda: False, "it answered", 0.2 if "sleep" in command else 30)
        assert caught.value.tail == ([] if "sleep" in command else ["no such key"])
    finally:
        while daemon.poll() is None:
            os.kill(daemon.process.pid, signal.SIGKILL)
            time.sleep(0.01)


def test_routes_are_read_without_the_default_one() -> None:
    routes: list[dict[str, object]] = [
        {"dst": "default", "gateway": "10.0.0.1"},
        {"dst": "0.0.0.0/0"},
        {"dst": "198.18.3.0/24", "dev": "br0"},
        {"type": "local", "dst": "127.0.0.1"},
        {"dst": "10.1.2.3/8"},
    ]
    assert routed(routes) == [IPv4Network("198.18.3.0/24"), IPv4Network("127.0.0.1/32"), IPv4Network("10.0.0.0/8")]
