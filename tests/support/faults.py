"""Real processes and real file systems to break: a fork server, strace on one process, small file systems of our own."""

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from hpcckpt.layout import RunLayout
from support.fault_roles import KIB, RETENTION, Line

CHAOS = os.environ.get("HPCCKPT_CHAOS") == "1"
DEADLINE_S = 60.0
# Every system call that can change a file system.
CHANGING = re.compile(
    r"creat|open(at2?)?|close|p?write(v|64|v2)?|f(data)?sync|sync_file_range|rename(at2?)?|unlink(at)?|link(at)?|symlink(at)?|mkdir(at)?|rmdir"
    r"|f?truncate|fallocate|flock|fcntl|f?chmod(at)?|f?chown(at)?|utimensat|sendfile|copy_file_range|ioctl"
)


def scaled(small, full):
    """Return how much of something is done: in `make test`, in `make chaos`."""
    return full if CHAOS else small


def needed(*programs, why):
    """Skip where this is not root or a program is missing; fail there with HPCCKPT_REQUIRE_SLURM=1."""
    missing = [program for program in programs if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None]
    if os.geteuid() != 0:
        missing.insert(0, "root")
    if missing:
        unavailable(f"{why} needs {', '.join(missing)}; to enable these tests: sudo tests/faults/install, and run them as root")


def unavailable(reason):
    """Skip, or fail where everything is required."""
    pytest.fail(reason) if os.environ.get("HPCCKPT_REQUIRE_SLURM") == "1" else pytest.skip(reason)


class Child:
    """A fork of the server that plays a role."""

    def __init__(self, path, role, options):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(DEADLINE_S)
        self.connection.connect(path)
        self.line = Line(self.connection)
        self.line.say(role=role, **options)
        self.pid = self.hear()["pid"]
        self.exit_code = None

    def tell(self, **order):
        """Give the role its next order."""
        self.line.say(**order)

    def hear(self, timeout_s=DEADLINE_S):
        """Return what the role says next, None when it has ended."""
        self.connection.settimeout(timeout_s)
        message = self.line.hear()
        assert message is not None, "the fork server has gone"
        if "exit" in message:
            self.exit_code = message["exit"]
            return None
        return message

    def has_news(self):
        """Return whether `hear` would return at once."""
        return b"\n" in self.line.received or self.line.is_over()

    def ask(self, **order):
        """Give an order and return the answer; None when the role has died of it."""
        self.tell(**order)
        return self.hear()

    def signal(self, number):
        """Send a signal, while it lives."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def rest(self, timeout_s=DEADLINE_S):
        """Return everything that is still said, to the end."""
        messages = []
        while self.exit_code is None and (message := self.hear(timeout_s)) is not None:
            messages.append(message)
        return messages

    def end(self):
        """Let it have no more orders, and wait for its end."""
        if self.exit_code is None:
            self.connection.shutdown(socket.SHUT_WR)
            self.rest()
        self.connection.close()
        return self.exit_code

    def kill(self):
        """Kill it, and return what it had said before."""
        self.signal(signal.SIGKILL)
        messages = self.rest()
        self.connection.close()
        return messages


class Server:
    """Has torch imported and forks: a process that commits costs milliseconds instead of seconds."""

    def __init__(self, environ):
        # A socket's path is short.
        self.folder = tempfile.mkdtemp(prefix="hpcckpt-")
        self.path = f"{self.folder}/server"
        self.children = []
        environ["PYTHONPATH"] = f"{environ['PYTHONPATH']}:{Path(__file__).parents[1]}"
        command = [sys.executable, "-X", "faulthandler", "-m", "support.fault_roles", self.path]
        self.process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_until_ready(self):
        """Wait until it accepts connections."""
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
        assert ready, "the fork server does not start"
        assert self.process.stdout.readline() == b"ready\n", f"the fork server ended with {self.process.wait()}"

    def start(self, role, **options):
        """Fork a process that plays a role."""
        child = Child(self.path, role, options)
        self.children.append(child)
        return child

    def play(self, role, **options):
        """Play a role without orders to its end; returns what it said."""
        child = self.start(role, **options)
        messages = child.rest()
        assert child.end() == 0, (role, options, messages)
        self.children.remove(child)
        return messages

    def end_children(self):
        """End what still runs."""
        for child in self.children:
            if child.exit_code is None:
                child.kill()
            child.connection.close()
        self.children.clear()

    def stop(self):
        """End the forks and the server."""
        self.end_children()
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.folder)


@dataclass(frozen=True)
class Call:
    """A system call as strace has seen it: the `number`-th of that name in its thread, with its arguments and its result."""

    name: str
    number: int
    text: str
    thread: str = ""

    @property
    def is_change(self):
        """Whether it may have changed something."""
        return CHANGING.fullmatch(self.name) is not None and not ("openat" in self.name and "O_CREAT" not in self.text)


def calls_in(trace):
    """Return the calls of a strace output file."""
    count, calls = {}, []
    for line in trace.read_text(errors="replace").splitlines():
        match = re.match(r"(\d+ +)?(\w+)\(", line)
        if match:
            count[match[0]] = count.get(match[0], 0) + 1
            calls.append(Call(match[2], count[match[0]], line, match[1] or ""))
    return calls


class Strace:
    """strace, attached to one process that waits."""

    attached: ClassVar[list] = []

    def __init__(self, pid, output, *expressions, options=()):
        filters = [part for expression in expressions for part in ("-e", expression)]
        self.process = subprocess.Popen(
            ["strace", "-f", "-y", "-s", "200", *options, *filters, "-o", output, "-p", str(pid)], stderr=subprocess.PIPE, text=True
        )
        self.attached.append(self)
        said, deadline = "", time.monotonic() + DEADLINE_S
        while f"Process {pid} attached" not in said:
            ready, _, _ = select.select([self.process.stderr], [], [], max(deadline - time.monotonic(), 0))
            more = os.read(self.process.stderr.fileno(), 4096).decode() if ready else ""
            said += more
            if not more:
                self.stop()
                if "ptrace" in said.lower():
                    unavailable(f"strace may not look at processes here ({said.strip()})")
                pytest.fail(f"strace did not attach: {said}")

    def wait(self):
        """Wait until the process has ended, and strace with it."""
        self.process.wait(timeout=DEADLINE_S)
        self.process.stderr.close()
        if self in self.attached:
            self.attached.remove(self)

    def stop(self):
        """Detach."""
        if self.process.poll() is None:
            self.process.terminate()
        self.wait()


class FileSystems:
    """File systems in files and in memory, unmounted at the end."""

    def __init__(self, folder):
        self.folder = folder
        self.mounted = []

    def mount(self, name, *arguments):
        """Mount something on a new folder of this name, and return the folder."""
        target = self.folder / name
        target.mkdir()
        done = subprocess.run(["mount", *arguments, target], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            target.rmdir()
            unavailable(f"nothing can be mounted here: {done.stderr.strip()}")
        self.mounted.append(target)
        return target

    def tmpfs(self, name, **options):
        """Mount a tmpfs."""
        return self.mount(name, "-t", "tmpfs", "-o", ",".join(f"{key}={value}" for key, value in options.items()), "tmpfs")

    def image(self, path, *options, size_mb=32):
        """Make a file with an empty ext4 in it."""
        with path.open("wb") as file:
            file.truncate(size_mb * 1024 * 1024)
        mkfs = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        subprocess.run([mkfs, "-q", "-F", "-m", "0", *options, path], check=True)
        return path

    def ext4(self, name, image, options="commit=600"):
        """Mount an image; nothing reaches it for ten minutes but what is asked to."""
        return self.mount(name, "-t", "ext4", "-o", f"loop,{options}", image)

    def unmount(self, target):
        """Unmount; the loop device goes with it."""
        done = subprocess.run(["umount", target], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            subprocess.run(["umount", "-l", target], check=True)
        self.mounted.remove(target)
        target.rmdir()
        assert done.returncode == 0, done.stderr

    def unmount_all(self):
        """Unmount what is still mounted, the last one first, and go on where one fails."""
        problems = []
        for target in reversed(self.mounted.copy()):
            try:
                self.unmount(target)
            except (AssertionError, OSError, subprocess.CalledProcessError) as error:
                problems.append(str(error))
        assert not problems, problems


def copied(template, root):
    """Copy a run directory, hard links and all."""
    subprocess.run(["cp", "-a", template, root], check=True)
    return root


def tree(root, but=()):
    """Return every file below a directory: its inode, its mode and its bytes."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder) / name
            status = path.lstat()
            if path.name not in but:
                data = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
                found[str(path.relative_to(root))] = (status.st_ino, status.st_mode, data)
    return found


def contents(root):
    """Return name and bytes of every file below checkpoints/ that is a checkpoint's, the pointer or the best one."""
    folder = RunLayout(root).checkpoints
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pt", ".json") and path.name != "generation.json"}


def assert_sound(server, root, acknowledged, *, in_flight=(), next_step=None, kib=KIB):
    """Assert in new processes all that is promised after a fault, and that the next attempt can go on; returns (newest, next) step.

    `acknowledged` are the steps whose commit returned, `in_flight` those that may have come through without that.
    """
    said = server.play("examiner", root=str(root), next_step=next_step, kib=kib)
    before = said[0]["before"]
    assert before["error"] is None, before
    assert before["problems"] == [], before
    assert before["wrong"] == [], before
    last = max(acknowledged, default=None)
    if last is not None:
        assert before["newest"] is not None, "an acknowledged checkpoint is lost"
        assert before["newest"] >= last, f"the newest is {before['newest']}, but {last} was acknowledged"
    assert before["newest"] in {None, last, *in_flight}, before
    assert before.get("best") in {None, *acknowledged, before["newest"]}, before
    if acknowledged:
        assert "best" in before, f"best_model.pt is missing: {before}"
    assert said[1]["temporary_after_claim"] == [], "unfinished files survive the next claim"
    step, after = said[1]["step"], said[1]["after"]
    assert (after["newest"], after["error"], after["problems"], after["wrong"], after["temporary"]) == (step, None, [], [], []), after
    losses = after["losses"]
    assert losses[str(after["best"])] == min(losses.values()), after
    names, manifests = ({name.rpartition(".")[0] for name in after[kind]} for kind in ("files", "manifests"))
    assert names <= manifests, f"left behind for ever, for want of a manifest: {sorted(names - manifests)}"
    assert manifests <= names, f"manifests of nothing, left behind for ever: {sorted(manifests - names)}"
    assert len(names) <= RETENTION.keep_last + RETENTION.keep_best, f"more files than retention allows: {sorted(names)}"
    return before["newest"], step


class Findings:
    """What went wrong in many trials: all of it is told at the end."""

    def __init__(self):
        self.found = []

    @contextlib.contextmanager
    def trial(self, what):
        """A trial that may fail."""
        try:
            yield
        except AssertionError as error:
            self.found.append(f"{what}: {str(error).splitlines()[0] if str(error) else error!r}")

    def assert_none(self):
        """Fail with every trial that has failed."""
        assert not self.found, f"{len(self.found)} trials failed:\n" + "\n".join(self.found[:40])
