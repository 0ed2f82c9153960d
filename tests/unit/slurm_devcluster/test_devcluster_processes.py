"""Which processes belong to a cluster, and that nothing else is ended."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from devclusterlib.processes import (
    MARK,
    Process,
    end,
    find,
    has_mounted,
    identify,
    is_inside,
    is_marked,
    parse_stat,
    with_descendants,
)
from devclusterlib.settings import Settings

SETTINGS = Settings(Path("/tmp/one"))
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program that is gone after the test; with `greeting`, once it has said something."""
    started: list[subprocess.Popen[str]] = []

    def run(*command: str, env: dict[str, str] | None = None, greeting: bool = False) -> "subprocess.Popen[str]":
        process = subprocess.Popen(command, env=os.environ | (env or {}), stdout=subprocess.PIPE, text=True)
        started.append(process)
        if greeting:
            assert process.stdout
            process.stdout.readline()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_stat_is_read_even_if_the_name_is_hostile() -> None:
    text = "42 (a) R 7 (b) S 17 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1000 2"
    stat = parse_stat(text)
    assert (stat.name, stat.dead, stat.parent, stat.start) == ("a) R 7 (b", False, 17, 987654)
    assert parse_stat(text.replace(") S 17", ") Z 17")).dead


def test_this_process_is_alive_but_not_if_it_started_at_another_time() -> None:
    process = identify(os.getpid())
    assert process.alive
    assert not Process(process.pid, process.start + 1).alive


def test_a_zombie_is_not_alive(start: Start) -> None:
    child = start("sleep", "60")
    process = identify(child.pid)
    assert process.alive
    child.kill()
    deadline = time.monotonic() + 10
    while process.alive:  # nobody has waited for it yet: it stays a zombie
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.wait()
    assert not process.alive


@pytest.mark.parametrize(
    ("environment", "name", "ours"),
    [
        ([f"{MARK}=/tmp/one"], "slurmd", True),
        ([f"{MARK}=/tmp/one2"], "slurmd", False),
        (["SLURM_CONF=/tmp/one/etc/slurm.conf", "SLURM_JOB_ID=3"], "python", True),
        (["SLURM_CONF=/tmp/two/etc/slurm.conf", "SLURM_JOB_ID=3"], "python", False),
        (["SLURM_CONF=/tmp/one/etc/slurm.conf"], "bash", False),
        (["SLURM_CONF=/tmp/one/etc/slurm.conf"], "srun", True),
        (["SLURM_JOB_ID=3"], "python", False),
        ([], "srun", False),
        ([""], "kthreadd", False),
    ],
)
def test_marks_tell_daemons_and_jobs_from_the_users_shell(environment: list[str], name: str, *, ours: bool) -> None:
    assert is_marked(environment, name, SETTINGS) is ours


def mountinfo(source: str, target: str) -> str:
    """Two lines as the kernel writes them."""
    return f"22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n99 22 254:0 {source} {target} rw,relatime - ext4 /dev/vda rw\n"


def test_a_node_is_known_by_its_hosts_file() -> None:
    ours = str(SETTINGS.hosts)
    assert has_mounted(mountinfo(ours, "/etc/hosts"), SETTINGS.hosts)
    assert has_mounted(mountinfo(f"{ours}//deleted", "/etc/hosts"), SETTINGS.hosts)
    assert has_mounted(mountinfo(ours.removeprefix("/tmp"), "/etc/hosts"), SETTINGS.hosts)  # /tmp is a mount itself
    assert not has_mounted(mountinfo(ours, "/etc/other"), SETTINGS.hosts)
    assert not has_mounted(mountinfo(str(Settings(Path("/tmp/two")).hosts), "/etc/hosts"), SETTINGS.hosts)
    assert not has_mounted(mountinfo("/", "/etc/hosts"), SETTINGS.hosts)


def test_descendants_are_found_at_any_depth() -> None:
    assert with_descendants({2}, {2: 1, 3: 2, 4: 3, 5: 1, 6: 4}) == {2, 3, 4, 6}
    assert with_descendants(set(), {2: 1}) == set()


def test_end_kills_the_marked_and_their_children_and_nobody_else(tmp_path: Path, start: Start) -> None:
    settings = Settings(tmp_path)
    mark = {MARK: str(tmp_path)}
    ours = start("sh", "-c", "env -i sleep 60 & echo $!; wait", env=mark)
    assert ours.stdout
    child = identify(int(ours.stdout.readline()))
    other_cluster = start("sleep", "60", env={MARK: f"{tmp_path}x"})
    stranger = start("sleep", "60")
    recycled = Process(stranger.pid, identify(stranger.pid).start - 1)
    end(settings, [recycled])
    assert not identify(ours.pid).alive
    assert not child.alive
    assert identify(other_cluster.pid).alive
    assert identify(stranger.pid).alive
    assert find(settings) == set()


def test_end_kills_what_was_written_down_even_without_a_mark(tmp_path: Path, start: Start) -> None:
    unmarked = start("sleep", "60")
    end(Settings(tmp_path), [identify(unmarked.pid)])
    assert not identify(unmarked.pid).alive


def test_a_job_sees_that_it_is_one(tmp_path: Path, start: Start) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from devclusterlib.processes import find, is_inside\n"
        "from devclusterlib.settings import Settings\n"
        "print(is_inside(find(Settings(Path(sys.argv[2])))))"
    )
    library = str(Path(sys.modules["devclusterlib"].__path__[0]).parent)
    inside = start(sys.executable, "-c", script, library, str(tmp_path), env={MARK: str(tmp_path)})
    outside = start(sys.executable, "-c", script, library, str(tmp_path))
    assert inside.communicate(timeout=30)[0].strip() == "True"
    assert outside.communicate(timeout=30)[0].strip() == "False"
    assert not is_inside([])
