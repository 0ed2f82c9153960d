"""`hpcckpt ckpt …`: the checkpoints of a run, looked at from outside. torch is imported by what needs it only."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcckpt.exits import EXIT_OK, exit_code

if TYPE_CHECKING:
    from hpcckpt.layout import RunLayout

_SAFETENSORS = ".safetensors"
_TORCH = (".pt", ".pth", ".bin")
_EPILOG = """\
exit codes: 0 done, 2 bad input: nothing was written
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; returns the exit code. Prints one line on stderr, never a traceback, for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="hpcckpt ckpt",
        description="Checkpoints of a run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, add_arguments, run) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_arguments(command)
        command.set_defaults(run=run)
    options = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    return exit_code(lambda: int(options.run(options)), "hpcckpt ckpt", "try again")


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_FILE", type=Path, help="a run directory, or a checkpoint's file")
    parser.add_argument("--to", metavar="FILE", type=Path, required=True, help=f"{_SAFETENSORS}, or {', '.join(_TORCH)} for torch.load")
    parser.add_argument("--which", metavar="latest|best|epoch=N|step=N", type=_which, help="of a run directory; default: latest")
    parser.add_argument("--name", default="model", help="which tracked object; default: model")
    parser.add_argument("--force", action="store_true", help="write over FILE")


def _which(text: str) -> tuple[str, int]:
    key, _, number = text.partition("=")
    if text in ("latest", "best"):
        return text, 0
    if key in ("epoch", "step") and number.isdecimal():
        return key, int(number)
    raise argparse.ArgumentTypeError(f"{text!r} is none of latest, best, epoch=N, step=N")


def _export(options: argparse.Namespace) -> int:
    from hpcckpt.errors import CheckpointMismatchError, UsageError

    source, target = options.source, options.to
    _refuse_target(target, force=options.force)
    if source.is_dir():
        path = _chosen(source, *(options.which or ("latest", 0)))
    elif options.which is not None:
        raise UsageError(f"{source}: --which chooses within a run directory, and this is none; leave it out, or give the run directory")
    else:
        path = source
        _verify(path)
    from hpcckpt.reading import read_content
    from hpcckpt.state.text import listed
    from hpcckpt.weights import save_plain, save_safetensors

    content = read_content(path)
    try:
        state = _state(content, options.name)
        _refuse_state(state)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{path}: {error}") from None
    left_out = _extra_states(state) if target.suffix == _SAFETENSORS else []
    state = {name: value for name, value in state.items() if name not in left_out}
    if target.suffix == _SAFETENSORS:
        save_safetensors(state, target)
    else:
        save_plain(state, target)
    without = [f"without {listed(left_out)} (no tensor)"] if left_out else []
    tensors = len(state) - len(_extra_states(state))
    count = f"{tensors} tensor{'' if tensors == 1 else 's'}"
    place = [f"{key} {content[key]}" for key in ("epoch", "step") if isinstance(content, Mapping) and isinstance(content.get(key), int)]
    print(", ".join([f"{target}: {count}", *without, f"{target.stat().st_size} bytes", *place, f"from {path}"]))
    return EXIT_OK


def _refuse_target(target: Path, *, force: bool) -> None:
    from hpcckpt.errors import UsageError

    if target.suffix not in (_SAFETENSORS, *_TORCH):
        raise UsageError(f"--to {target}: the suffix says what is written; give one of {_SAFETENSORS}, {', '.join(_TORCH)}")
    if _layout(target.parent) is not None:
        raise UsageError(f"--to {target}: that folder holds a run's checkpoints and nothing else; choose another one")
    if target.is_dir():
        raise UsageError(f"--to {target}: is a directory; give a file's path")
    if os.path.lexists(target) and not force:
        raise UsageError(f"--to {target}: is there already; choose another name, or write over it with --force")


def _layout(folder: Path) -> "RunLayout | None":
    """Return the layout of which `folder` is the folder of checkpoints; None if it is none."""
    from hpcckpt.layout import RunLayout

    folder = folder.resolve()
    layout = RunLayout(folder.parent, folder.name)
    return layout if layout.generation.exists() or layout.latest.exists() else None


def _chosen(run: Path, which: str, number: int) -> Path:
    """Return the path of a run's checkpoint, whose bytes are those that were committed."""
    from hpcckpt.errors import CheckpointNotFoundError
    from hpcckpt.layout import RunLayout
    from hpcckpt.policy import Retention
    from hpcckpt.store.reader import CheckpointReader

    layout = _layout(RunLayout(run).checkpoints) or _layout(run)
    if layout is None:
        raise CheckpointNotFoundError(f"{run}: is no run directory: it has no checkpoints; give a run's directory or a checkpoint's file")
    reader = CheckpointReader(layout, Retention())
    if which == "latest":
        newest = reader.newest_good(lambda problem: print(f"hpcckpt: {problem}; taking an older one", file=sys.stderr))
        if newest is None:
            raise CheckpointNotFoundError(f"{layout.checkpoints}: there is no checkpoint yet; wait for the first one")
        return reader.path(newest.name)
    if which == "best":
        if not layout.best.exists():
            raise CheckpointNotFoundError(
                f"{layout.best}: there is no best checkpoint; set checkpoint.monitor, or choose another with --which"
            )
        reader.own(layout.best)
        return layout.best
    asked = f"--which {which}={number}"
    info = reader.find(asked, epoch=number) if which == "epoch" else reader.find(asked, step=number)
    return reader.path(info.name)


def _verify(path: Path) -> None:
    """Refuse a run's checkpoint whose bytes are not those that were committed; of other files nothing is known."""
    from hpcckpt.errors import CheckpointCorruptError
    from hpcckpt.layout import manifest_name
    from hpcckpt.policy import Retention
    from hpcckpt.store.durable import file_digest, read_json
    from hpcckpt.store.reader import CheckpointReader

    layout = _layout(path.parent)
    if layout is not None and path.is_file():
        CheckpointReader(layout, Retention()).verify(path)
    elif path.is_file():  # what a rewind moved away took its manifest along
        manifest = read_json(path.with_name(manifest_name(path.name))) or {}
        if manifest.get("file") == path.name and manifest.get("digest") != file_digest(path)[1]:
            raise CheckpointCorruptError(f"{path}: is damaged: its digest is not the one that was committed; choose another one")


def _state(content: Any, name: str) -> Mapping[str, Any]:
    from hpcckpt.errors import CheckpointMismatchError
    from hpcckpt.state.foreign import model_state_in
    from hpcckpt.state.text import listed

    key = f"{name}_state_dict"
    if name == "model":
        return model_state_in(content)
    state = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        keys = content if isinstance(content, Mapping) else ()
        known = listed([str(known).removesuffix("_state_dict") for known in keys if str(known).endswith("_state_dict")], 20)
        raise CheckpointMismatchError(f"has no {key}; --name may be {known or 'left out'}")
    return state


def _refuse_state(state: Mapping[str, Any]) -> None:
    """Refuse a state in which there is nothing to be exported, or nothing behind a name."""
    import torch

    from hpcckpt.errors import CheckpointMismatchError
    from hpcckpt.state.text import listed

    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if len(state) == len(_extra_states(state)):
        raise CheckpointMismatchError("holds no tensors, so there is nothing to export; choose another file, or another --name")
    empty = [name for name, value in tensors.items() if value.is_meta]
    if empty:
        raise CheckpointMismatchError(f"{listed(empty)} is on the meta device, without values; save the model again once it has some")


def _extra_states(state: Mapping[str, Any]) -> list[str]:
    """Return the names of what modules keep beside their tensors, and is none."""
    import torch

    return [name for name, value in state.items() if name.rpartition(".")[2] == "_extra_state" and not isinstance(value, torch.Tensor)]


# name -> (what --help says, adds its arguments, does it and returns the exit code)
_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "export": ("write a checkpoint's weights as safetensors, or as a plain state dict", _add_export_arguments, _export),
}
