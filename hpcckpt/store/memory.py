"""How much memory this process may still take: of the machine, and of each cgroup it is in, as a Slurm job is in one.

Taking more ends the process, or the whole job step, by SIGKILL; nothing says so before. (proc(5): meminfo; the kernel's
cgroup-v1/memory.rst and cgroup-v2.rst.)
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# File, what is in use, and the lines of memory.stat that count what the kernel takes back by itself.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return what may still be taken, in bytes; None where nothing says it.

    `root`: where proc and sys are, for tests.
    """
    known = [free for free in (_machine(root), *_cgroups(root)) if free is not None]
    return min(known, default=None)


def _machine(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable" and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) * 1024
    return None


def _cgroups(root: Path) -> Iterator[int | None]:
    """Yield what is left of each memory limit above this process."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "" and path:
            files, bases = _V2, [mounts, mounts / "unified"]
        elif "memory" in controllers.split(","):
            files, bases = _V1, [mounts / "memory"]
        else:
            continue
        # In a container the path may be one of the host, where nothing of it is to be seen; the mount itself is ours then.
        relative = PurePosixPath(path.lstrip("/"))
        for base in bases:
            for folder in (relative, *relative.parents):
                yield _left(base / folder, *files)


def _left(folder: Path, limit_file: str, usage_file: str, reclaimable: tuple[str, ...]) -> int | None:
    limit, usage = _text(folder / limit_file).strip(), _text(folder / usage_file).strip()
    if not limit.isdigit() or not usage.isdigit():  # "max": no limit
        return None
    stat = dict(line.partition(" ")[::2] for line in _text(folder / "memory.stat").splitlines())
    cached = sum(int(stat[key]) for key in reclaimable if stat.get(key, "").isdigit())
    return max(0, int(limit) - int(usage) + cached)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
