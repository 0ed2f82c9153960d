"""Processes and file systems for the tests of faults; none outlives them."""

import shutil

import pytest

from support.faults import FileSystems, Server, Strace, needed


@pytest.fixture(scope="session")
def session_server(environ):
    server = Server(environ())
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(session_server):
    """The fork server; what it has forked for a test ends with the test."""
    yield session_server
    session_server.end_children()


@pytest.fixture(scope="session")
def file_systems(tmp_path_factory):
    """Where file systems can be mounted."""
    needed("mount", "mkfs.ext4", why="a file system of one's own")
    mounts = FileSystems(tmp_path_factory.mktemp("mounts"))
    try:
        yield mounts
    finally:
        mounts.unmount_all()


@pytest.fixture(scope="session")
def memory(file_systems):
    """A tmpfs for images: what is not asked to reach a disk costs nothing here."""
    return file_systems.tmpfs("memory", size="2g")


@pytest.fixture(scope="session")
def disk(file_systems, memory):
    """A real ext4."""
    return file_systems.ext4("disk", file_systems.image(memory / "disk.img", size_mb=256))


@pytest.fixture
def run_dir(disk, request):
    """A folder on a real ext4 for the run directories of one test."""
    folder = disk / f"{request.node.name[:40]}{len(list(disk.iterdir()))}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def strace():
    """The tool that breaks system calls; what is still attached after a test is detached."""
    needed("strace", why="a fault at a system call")
    yield
    for attached in Strace.attached.copy():
        attached.stop()


@pytest.fixture
def committed(server, run_dir):
    """A run directory with the checkpoints of steps 10, 20 and 30, the first of them the best."""
    root = run_dir / "template"
    writer = server.start("writer", root=str(root))
    assert "generation" in writer.hear()
    for step, loss in ((10, 0.3), (20, 0.8), (30, 0.9)):
        assert writer.ask(step=step, loss=loss)["acknowledged"] == step
    assert writer.end() == 0
    return root


_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def figure(request):
    """Tell a figure that was measured, printed at the end."""
    lines = request.config.stash.setdefault(_FIGURES, [])
    return lambda text: lines.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(_FIGURES, []):
        terminalreporter.section("what the faults came to")
        for line in config.stash[_FIGURES]:
            terminalreporter.write_line(line)
