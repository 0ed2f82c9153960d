"""The file `cluster.json`: what a running cluster is, for the next command and for tests."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .processes import Process, boot_id
from .settings import PARTITIONS, Settings

FILE = "cluster.json"


@dataclass
class State:
    """A cluster as it was written down."""

    settings: Settings
    processes: dict[str, Process] = field(default_factory=dict)
    ready: bool = False  # `up` got to its end; without it, what is there are leftovers
    boot: str = field(default_factory=boot_id)

    @property
    def dead(self) -> list[str]:
        """The processes that should run and do not."""
        return [name for name, process in self.processes.items() if not process.alive]

    @property
    def running(self) -> bool:
        """True while at least one of the daemons of a finished `up` is alive."""
        return self.ready and len(self.dead) < len(self.processes)

    def to_json(self) -> dict[str, Any]:
        """What `up --json` prints; all of it is also what the next command needs."""
        settings = self.settings
        return {
            "root": str(settings.root),
            "slurm_conf": str(settings.slurm_conf),
            "cluster": settings.name,
            "nodes": settings.node_names,
            "namespaces": settings.namespaces,
            "accounting": settings.accounting,
            "partitions": list(PARTITIONS),
            "addresses": {node: str(settings.node_address(node)) for node in settings.node_names},
            "interfaces": {node: settings.interface(node) for node in settings.node_names if settings.namespaces},
            "processes": {name: asdict(process) for name, process in self.processes.items()},
            "ready": self.ready,
            "boot": self.boot,
            "settings": asdict(settings) | {"root": str(settings.root)},
        }

    def save(self) -> None:
        """Write the file as a whole or not at all: `up` may be killed at any moment."""
        path = self.settings.root / FILE
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(self.to_json(), indent=2) + "\n")
        os.replace(draft, path)


def from_json(data: dict[str, Any], root: Path) -> State:
    """Read what `State.to_json` wrote for the cluster at `root`."""
    raw = data["settings"] | {"root": root}
    raw["overrides"] = tuple((key, value) for key, value in raw["overrides"])
    raw["slurm_version"] = tuple(raw["slurm_version"])
    state = State(Settings(**raw), ready=data["ready"], boot=data["boot"])
    if state.boot == boot_id():  # after a reboot the process ids mean nothing
        state.processes = {name: Process(**process) for name, process in data["processes"].items()}
    return state


def load(root: Path) -> State | None:
    """The cluster written down at `root`; of an unreadable file only the root is known, which is enough to clean up."""
    try:
        text = (root / FILE).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return from_json(json.loads(text), root)
    except (ValueError, KeyError, TypeError):
        return State(Settings(root))
