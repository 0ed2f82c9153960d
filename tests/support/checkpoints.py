"""A checkpoint store as the tests of its failures use it."""

from hpcckpt.policy import Retention
from hpcckpt.store.checkpoints import CheckpointStore

BEST = Retention(keep_last=2, keep_best=1, monitor="loss")


def claimed(layout, retention=BEST):
    store = CheckpointStore(layout, retention)
    store.claim(None)
    return store


def commit(store, epoch, loss=1.0, content=None):
    data = f"epoch {epoch}".encode() if content is None else content
    write = lambda file: file.write(data) and None  # noqa: E731
    return store.commit(epoch, (epoch + 1) * 10, epoch_finished=True, write=write, manifest={"metrics": {"loss": loss}})


def name_of(epoch):
    return f"checkpoint_epoch{epoch:04d}.pt"


def files(layout):
    """All files below checkpoints/ but the locks and the generation, with their content."""
    others = (layout.lock, layout.attempt_lock, layout.generation)
    paths = [path for path in layout.checkpoints.rglob("*") if path.is_file() and path not in others]
    return {str(path.relative_to(layout.checkpoints)): path.read_bytes() for path in paths}


def newest(layout):
    """Return the name of the newest good checkpoint, and what was reported; by a process that knows nothing else."""
    problems = []
    info = CheckpointStore(layout, BEST).newest_good(problems.append)
    return (None if info is None else info.name), problems
