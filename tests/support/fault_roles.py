"""What the processes do that the tests of faults break: one role each, in a fork of a process that has torch imported.

`python -m support.fault_roles SOCKET` is that process; a test connects, names a role, and from then on talks to its fork.
"""

import contextlib
import gc
import json
import os
import random
import resource
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from hpcckpt.errors import CheckpointSaveError, FencedError, HpcckptError
from hpcckpt.layout import RunLayout
from hpcckpt.policy import Retention
from hpcckpt.state.pickled import write_as_torch
from hpcckpt.store.checkpoints import CheckpointStore
from support.digests import digest_of

RETENTION = Retention(keep_last=2, keep_best=1, monitor="loss")
# All are starts of one job: a later one takes over from an earlier one that still lives.
JOB = "7"
STEPS_PER_EPOCH = 10
KIB = 300


def state_of(step, kib=KIB):
    """Return what a checkpoint of this step holds: several tensors, a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    shares = {"embedding": 0.5, "layer.weight": 0.3, "head.weight": 0.15, "head.bias": 0.05}
    model = {name: torch.rand(max(int(share * kib * 128), 1), generator=generator) for name, share in shares.items()}
    averages = {name: tensor * 0.5 for name, tensor in model.items()}
    return {"format_version": 1, "step": step, "model_state_dict": model, "optimizer_state_dict": averages}


def loss_of(step):
    """Return a loss that goes up and down."""
    return (step * 7919 % 101) / 101


def position(step):
    """Return (epoch, whether it is finished) of a step."""
    return (step - 1) // STEPS_PER_EPOCH, step % STEPS_PER_EPOCH == 0


def commit(store, step, kib=KIB, loss=None, before_write=lambda: None):
    """Commit the checkpoint of a step; `before_write` is called when the store has begun."""
    state = state_of(step, kib)
    epoch, finished = position(step)

    def write(file):
        before_write()
        write_as_torch(state, file)

    manifest = {"metrics": {"loss": loss_of(step) if loss is None else loss}, "kib": kib}
    return store.commit(epoch, step, epoch_finished=finished, write=write, manifest=manifest)


def wrong_with(path, manifest):
    """Return what is wrong with a checkpoint, None if it is bit for bit what was committed at the manifest's step."""
    data = path.read_bytes()
    if digest_of(data) != manifest["digest"] or len(data) != manifest["size_bytes"]:
        return f"{path}: not the bytes of its manifest"
    found, expected = torch.load(path, weights_only=True), state_of(manifest["step"], manifest["kib"])
    if found.keys() != expected.keys() or found["step"] != expected["step"]:
        return f"{path}: not the content of step {manifest['step']}"
    for part in ("model_state_dict", "optimizer_state_dict"):
        names = found[part].keys()
        if names != expected[part].keys() or not all(torch.equal(found[part][name], expected[part][name]) for name in names):
            return f"{path}: other tensors than at step {manifest['step']}"
    return None


def free_bytes(folder):
    """Return what a file system has left."""
    status = os.statvfs(folder)
    return status.f_bfree * status.f_frsize


def fill(ballast, leave):
    """Let a file grow or shrink until its file system has `leave` bytes left, to a few blocks."""
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        surplus = free_bytes(Path(ballast).parent) - leave
        if surplus < 0:
            os.truncate(descriptor, max(os.fstat(descriptor).st_size + surplus, 0))
        while surplus >= 4096:
            try:
                os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, surplus)
            except OSError:
                surplus //= 2  # the file system needs some for itself
            else:
                surplus = free_bytes(Path(ballast).parent) - leave
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Line:
    """One JSON object a line on a socket: sendto and recvfrom, which no file system ever sees."""

    def __init__(self, connection):
        self.connection = connection
        self.received = b""

    def say(self, **message):
        """Send a message."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self):
        """Return the next message, None when there will be none."""
        while b"\n" not in self.received:
            more = self.connection.recv(65536)
            if not more:
                return None
            self.received += more
        line, self.received = self.received.split(b"\n", 1)
        return json.loads(line)

    def is_over(self):
        """Return whether the other side said something, or has gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            return bool(selector.select(0))


def leave_out_fsync(of):
    """Have fsync do nothing for files, directories or both: what a careless writer would be like."""
    real = os.fsync

    def fsync(descriptor):
        directory = os.path.isdir(f"/proc/self/fd/{descriptor}")
        if of == "everything" or directory == (of == "directories"):
            return
        real(descriptor)

    os.fsync = fsync


def writer(line, root, without_fsync=None, claims=True):
    """Claim, then commit each step that is asked for; says what came of it."""
    if without_fsync:
        leave_out_fsync(without_fsync)
    store = CheckpointStore(RunLayout(Path(root)), RETENTION)
    line.say(generation=store.claim(JOB) if claims else 0)
    while (order := line.hear()) is not None:
        ballast, limit = order.pop("ballast", None), order.pop("limit_bytes", None)
        before = (lambda ballast=ballast: fill(*ballast)) if ballast else (lambda: None)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            path = commit(store, **order, before_write=before)
        except Exception as error:
            answer = {"failed": type(error).__name__, "is_save_error": isinstance(error, CheckpointSaveError), "message": str(error)}
        else:
            answer = {"acknowledged": order["step"], "path": str(path)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        line.say(**answer)


def looper(line, root, step, kib=KIB):
    """Claim, then commit one step after the other for ever, and say each that returned."""
    store = CheckpointStore(RunLayout(Path(root)), RETENTION)
    store.claim(JOB)
    line.say(ready=True)
    while True:
        commit(store, step, kib)
        line.say(acknowledged=step)
        step += 1


def facts_of(layout):
    """Return what a process that knows nothing but the directory finds in it."""
    problems = []
    facts = {"newest": None, "problems": problems, "wrong": [], "error": None}
    try:
        info = CheckpointStore(layout, RETENTION).newest_good(problems.append)
    except HpcckptError as error:
        facts["error"] = f"{type(error).__name__}: {error}"
        return facts
    folder = layout.checkpoints
    manifests = {}
    for path in folder.glob("checkpoint_*.json"):
        if path.with_suffix(".pt").exists():
            manifests[path.with_suffix(".pt").name] = json.loads(path.read_text())
    if info is not None:
        facts |= {"newest": info.step, "name": info.name}
        facts["wrong"] += filter(None, [wrong_with(folder / info.name, manifests[info.name])])
    if layout.best.exists():
        best = torch.load(layout.best, weights_only=True)
        facts["best"] = best["step"]
        manifest = {"digest": digest_of(layout.best.read_bytes()), "size_bytes": layout.best.stat().st_size}
        kib = next((known["kib"] for known in manifests.values() if known["digest"] == manifest["digest"]), KIB)
        facts["wrong"] += filter(None, [wrong_with(layout.best, {**manifest, "step": best["step"], "kib": kib})])
    facts["losses"] = {manifest["step"]: manifest["metrics"]["loss"] for manifest in manifests.values()}
    facts["files"] = sorted(path.name for path in folder.glob("checkpoint_*.pt"))
    facts["manifests"] = sorted(path.name for path in folder.glob("checkpoint_*.json"))
    facts["temporary"] = sorted(path.name for path in folder.rglob(".tmp-*"))
    return facts


def observer(line, root):
    """Look at a directory."""
    line.say(**facts_of(RunLayout(Path(root))))


def seeker(line, root):
    """Look for the newest checkpoint when told to; says its step."""
    store, problems = CheckpointStore(RunLayout(Path(root)), RETENTION), []
    line.say(ready=True)
    line.hear()
    try:
        info = store.newest_good(problems.append)
    except HpcckptError as error:
        line.say(newest=None, error=f"{type(error).__name__}: {error}", problems=problems)
    else:
        line.say(newest=None if info is None else info.step, error=None, problems=problems)


def examiner(line, root, next_step=None, kib=KIB):
    """Look at a directory, then go on as the next attempt would: claim, commit, look again."""
    layout = RunLayout(Path(root))
    before = facts_of(layout)
    line.say(before=before)
    store = CheckpointStore(layout, RETENTION)
    store.claim(JOB)
    temporary = sorted(path.name for path in layout.checkpoints.rglob(".tmp-*"))
    newest = before["newest"] or 0
    step = (newest // STEPS_PER_EPOCH + 1) * STEPS_PER_EPOCH if next_step is None else next_step
    commit(store, step, kib)
    line.say(temporary_after_claim=temporary, step=step, after=facts_of(layout))


def contender(line, root, updates, seed, kib=4):
    """Claim and commit until a newer attempt takes over, and claim again, until `updates` were acknowledged."""
    random.seed(seed)
    layout = RunLayout(Path(root))
    acknowledged, fenced, claims, problems = 0, 0, 0, []
    while acknowledged < updates:
        store = CheckpointStore(layout, RETENTION)
        store.claim(JOB)
        claims += 1
        try:
            found = store.newest_good(problems.append)
            step = found.step if found else 0
            store.refuse_if_fenced()  # what it saw was its own only until then
            while acknowledged < updates:
                step += 1
                commit(store, step, kib)
                acknowledged += 1
        except FencedError:
            fenced += 1
            time.sleep(random.uniform(0, 0.5))
    line.say(acknowledged=acknowledged, fenced=fenced, claims=claims, problems=problems)


def reader(line, root):
    """Follow the pointer until told to stop; says what must never have been seen."""
    layout = RunLayout(Path(root))
    faults, looks, verified, moved_on, found = [], 0, 0, 0, 0
    last, last_found = (0, 0), 0

    def pointer():
        try:
            return json.loads(layout.latest.read_text())
        except FileNotFoundError:
            if last != (0, 0):
                faults.append("the pointer is missing")
        except ValueError as error:
            faults.append(f"the pointer does not parse: {error}")
        return None

    while not line.is_over():
        looks += 1
        seen = pointer()
        if seen is None:
            continue
        now = (seen["generation"], seen["step"])
        if now[0] < last[0] or now[1] < last[1]:
            faults.append(f"the pointer went from {last} to {now}")
        last = now
        try:
            data = (layout.checkpoints / seen["file"]).read_bytes()
            good = digest_of(data) == seen["digest"]
        except FileNotFoundError:
            good = False
        if good:
            verified += 1
        elif pointer() == seen:
            faults.append(f"{seen['file']} is not what the pointer says, and the pointer still says it")
        else:
            moved_on += 1
        if looks % 5 == 0:
            problems = []
            try:
                info = CheckpointStore(layout, RETENTION).newest_good(problems.append)
            except HpcckptError as error:
                faults.append(f"newest_good: {type(error).__name__}: {error}; {problems}")
                continue
            if info is None or info.step < last_found:
                faults.append(f"newest_good went from step {last_found} to {info}; {problems}")
            else:
                last_found = info.step
            found += 1
    line.say(faults=faults[:20], looks=looks, verified=verified, moved_on=moved_on, newest=found)


ROLES = {role.__name__: role for role in (writer, looper, observer, seeker, examiner, contender, reader)}


def play(connection):
    """Be the fork: hear which role, and play it."""
    code = 1
    try:
        line = Line(connection)
        line.say(pid=os.getpid())
        order = line.hear()
        ROLES[order.pop("role")](line, **order)
        code = 0
    except (BrokenPipeError, ConnectionResetError):
        code = 0  # the test has gone
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve(path):
    """Fork for each connection, and say on it at last how the fork ended; ends with the process that started it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # whatever is imported late is imported now
        store = CheckpointStore(RunLayout(Path(folder)), RETENTION)
        store.claim(JOB)
        commit(store, 10)
        facts_of(RunLayout(Path(folder)))
    gc.collect()
    gc.freeze()
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    children = {}
    with selectors.DefaultSelector() as selector:
        for source in (listener, woken, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if sys.stdin in ready:
                break
            if listener in ready:
                connection, _ = listener.accept()
                child = os.fork()
                if child == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    play(connection)
                children[child] = connection
            if woken in ready:
                woken.recv(4096)
                reap(children)
    for child in children:
        os.kill(child, signal.SIGKILL)


def reap(children):
    """Say of each fork that has ended how it did."""
    for child in list(children):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            connection = children.pop(child)
            with contextlib.suppress(OSError):  # nobody listens any more
                Line(connection).say(exit=os.waitstatus_to_exitcode(status))
            connection.close()


if __name__ == "__main__":
    serve(sys.argv[1])
