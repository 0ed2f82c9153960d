"""Weights in files of any origin, and checkpoints of one process: what scripts call that have no Run.

None of these functions is a collective. A model that is spread over ranks is saved by a Run or a checkpoint manager.
"""

import ctypes
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from hpcckpt.errors import CheckpointMismatchError, CheckpointSaveError, UsageError
from hpcckpt.reading import ALIASES_KEY, read_content
from hpcckpt.state.foreign import common_prefixes, fitted, model_state_in
from hpcckpt.state.model import LoadReport, load_model_state, model_state, parameter_names, portable_names, wrapper_name
from hpcckpt.state.optimizer import check_optimizer_state, load_optimizer_state, optimizer_state
from hpcckpt.state.pickled import write_as_torch
from hpcckpt.state.portable import compacted, portable
from hpcckpt.state.text import listed, printable
from hpcckpt.state.tracked import FORMAT_VERSION, check_version, naming
from hpcckpt.store.durable import write_durably

_LOG = logging.getLogger("hpcckpt")
_CHUNK_BYTES = 16 * 1024 * 1024
_LARGEST_EXPANDED = 1024**3
_SAFETENSORS_TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8",
    torch.int16: "I16", torch.uint16: "U16", torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


def save_dataparallel_checkpoint(
    model: nn.Module,
    optimizer: Optimizer | None,
    epoch: int,
    filepath: str | Path,
    save_portable: bool = True,  # noqa: FBT001, FBT002 - the signature that scripts know
    **extra_state: Any,
) -> None:
    """Save model, optimizer and epoch in one file that plain `torch.load(weights_only=True)` reads; call it in one process.

    The file appears under its name complete and durable, or not at all; what was there before stays until then.

    Args:
        model: with any wrappers or none.
        optimizer: None for none.
        epoch: kept under `epoch`.
        filepath: in a folder that is there.
        save_portable: model keys without wrappers' prefixes; False keeps the keys of `model.state_dict()`.
        extra_state: further keys of the file; tensors, primitives and containers of them.

    Raises:
        CheckpointSaveError: the file cannot be written, or something in it could not be read back.
        UsageError: a key of `extra_state` is one of the file's own.
    """
    content: dict[str, Any] = {
        "epoch": epoch,
        "model_state_dict": model_state(model) if save_portable else model.state_dict(),
        "optimizer_state_dict": None if optimizer is None else optimizer_state(optimizer, parameter_names(model)),
        "is_wrapped": wrapper_name(model) != "none",
        "save_portable": save_portable,
        "format_version": FORMAT_VERSION,
        "saved_with_wrapper": wrapper_name(model),
    }
    taken = sorted(content.keys() & extra_state.keys())
    if taken:
        raise UsageError(f"save_dataparallel_checkpoint({taken[0]}=…): this key is the file's own; give it another name")
    save_plain({key: portable(value, key) for key, value in {**content, **extra_state}.items()}, Path(filepath))


def load_dataparallel_checkpoint(
    model: nn.Module,
    optimizer: Optimizer | None,
    filepath: str | Path,
    device: torch.device | str | int,
    use_dataparallel: bool = False,  # noqa: FBT001, FBT002 - the signature that scripts know
    device_ids: Sequence[int] | None = None,
) -> tuple[nn.Module, int]:
    """Load model and optimizer from a file of `save_dataparallel_checkpoint` or of like content; returns (model, epoch).

    The model goes to `device`, and the optimizer's state to where its parameters are then. It does not matter which wrappers
    the model was saved with, or has now.

    Args:
        model: loaded in place, wrapped or not.
        optimizer: made from the model's parameters; None leaves the file's optimizer state alone.
        filepath: where it was saved.
        device: the model's.
        use_dataparallel: return the model in a DataParallel, unless it has one or a DistributedDataParallel already. Without
            any GPU on the machine that is a wrapper which does nothing.
        device_ids: for DataParallel; without, all GPUs, `device` first.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError: as `read_content`.
        CheckpointMismatchError: the model or the optimizer does not fit, or the file has no epoch (0 would be an answer that
            means something): load such a file with `load_checkpoint_universal`. Nothing is changed, unless the model's or the
            optimizer's own load_state_dict raised.
        UsageError: DataParallel is asked for on the CPU of a machine with GPUs, where it cannot work.
    """
    path, target = Path(filepath), torch.device(device)
    wraps = use_dataparallel and not isinstance(model, DataParallel | DistributedDataParallel)
    if wraps and target.type == "cpu" and torch.cuda.is_available():
        raise UsageError(
            "load_dataparallel_checkpoint(use_dataparallel=True, device='cpu'): DataParallel needs the model on a GPU; give "
            "device='cuda', or use_dataparallel=False"
        )
    content = read_content(path)
    fields = content if isinstance(content, Mapping) else {}
    state = _model_state(content, path)
    epoch, saved_optimizer = fields.get("epoch"), fields.get("optimizer_state_dict")
    if not isinstance(epoch, int) or isinstance(epoch, bool):
        raise CheckpointMismatchError(f"{path}: has no epoch; load the model alone with hpcckpt.load_checkpoint_universal")
    if optimizer is not None and not isinstance(saved_optimizer, Mapping):
        raise CheckpointMismatchError(f"{path}: has no optimizer_state_dict; give optimizer=None to load the model alone")
    if optimizer is not None and isinstance(saved_optimizer, Mapping):
        with naming(f"{path}: optimizer", optimizer):
            check_optimizer_state(optimizer, saved_optimizer, parameter_names(model))
    _load(model, state, path)
    model = model.to(target)
    if optimizer is not None and isinstance(saved_optimizer, Mapping):
        with naming(f"{path}: optimizer", optimizer):
            load_optimizer_state(optimizer, saved_optimizer, parameter_names(model))
    return (DataParallel(model, _device_ids(target, device_ids)) if wraps else model), epoch


def load_checkpoint_universal(
    model: nn.Module,
    checkpoint_path: str | Path,
    device: torch.device | str | int | None = None,
    strict: bool = True,  # noqa: FBT001, FBT002 - the signature that scripts know
) -> nn.Module:
    """Load a model from a checkpoint of any origin: with or without wrappers on either side; returns the model.

    Reads files of hpcckpt, of scripts with torch.save, of Lightning and of Hugging Face, safetensors as well.

    Args:
        model: loaded in place; wrappers stay.
        checkpoint_path: a single file.
        device: where the model goes then; None leaves it where it is, and moves nothing to the CPU.
        strict: refuse a file that does not fit in full; else load what fits, and log what did not as a warning of the
            logger `hpcckpt`, which is told of conversions as well.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, CheckpointMismatchError: as `load_weights`.
    """
    report = load_weights(model, checkpoint_path, strict=strict)
    if not report.is_complete:
        _LOG.warning("%s: %s", checkpoint_path, report)
    elif report.cast:
        _LOG.info("%s: %s", checkpoint_path, report)
    return model if device is None else model.to(torch.device(device))


def load_weights(model: nn.Module, path: str | Path, *, prefix: str | None = None, strict: bool = True) -> LoadReport:
    """Load a model's weights from a file of any origin, and say what became of each.

    Tensors are converted to the model's dtypes and devices. Names are matched as `hpcckpt.state.foreign.fit_names` does; those
    of the file that match none of the model's are `unexpected`, with a `prefix` only where they have it.

    Args:
        model: loaded in place, with any wrappers.
        path: a single file of torch.save or safetensors.
        prefix: what the file's names have before the model's (or the model's before the file's), `model.` say; found where
            not given.
        strict: refuse a file that does not fit in full; else load what fits and leave the rest of the model as it is.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError: as `read_content`.
        CheckpointMismatchError: it does not fit, or not one tensor does, or is of a later format; nothing was loaded. Or the
            model's own load_state_dict raised: then it may be loaded in part.
    """
    path = Path(path)
    return _load(model, _model_state(read_content(path), path), path, prefix=prefix, strict=strict)


def save_safetensors(state: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Save tensors as a safetensors file; the same tensors give the same bytes.

    Of tied tensors the first name is written, and the others noted in the metadata (`hpcckpt.aliases`, a JSON object name -> name
    written), which hpcckpt puts back; other libraries tie them by the model's own structure. Views are written in full.

    Args:
        state: name -> tensor, on any device; one tensor at a time is copied to the CPU.
        path: appears complete and durable, or not at all.
        metadata: further notes for the header; `format` is `pt` unless given.

    Raises:
        CheckpointSaveError: the file cannot be written, or a value is no dense tensor of a type that safetensors knows.
        UsageError: `metadata` is not of strings, or has the key `hpcckpt.aliases`.
    """
    path = Path(path)
    notes: dict[Any, Any] = {"format": "pt", **(metadata or {})}
    if not all(isinstance(part, str) for item in notes.items() for part in item) or ALIASES_KEY in notes:
        raise UsageError(f"save_safetensors(metadata=…): keys and values have to be strings, and {ALIASES_KEY} is set by itself")
    tensors, aliases = _distinct(state, path)
    if aliases:
        notes[ALIASES_KEY] = json.dumps(aliases)
    header: dict[str, Any] = {"__metadata__": notes}
    position = 0
    for name, tensor in tensors:
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _SAFETENSORS_TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    # The library's own writer needs NumPy and a whole copy in memory, or names the file itself, which is not durable.
    def write(file: IO[bytes]) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            for chunk in _chunks(tensor):
                file.write(chunk)

    _save(path, write)


def save_plain(content: Any, path: Path) -> None:
    """Save tensors and primitives with torch.save, durably; of large tensors only what is shown of them.

    Raises:
        CheckpointSaveError: the file cannot be written; what was there before is intact.
    """
    compact = compacted(content)
    _save(path, lambda file: write_as_torch(compact, file))


def _save(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    try:
        write_durably(path, write)
    except OSError as error:
        if not path.parent.is_dir():
            raise CheckpointSaveError(f"{path}: there is no folder {path.parent}; make it, then save again") from None
        raise CheckpointSaveError(
            f"{path}: could not be written ({error.strerror or error}), and what was there is intact; free some space or mend the file "
            "system, then save again"
        ) from error


def _model_state(content: object, path: Path) -> Mapping[str, Any]:
    if isinstance(content, Mapping):
        check_version(content, path)
    try:
        return model_state_in(content)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{path}: {error}") from None


def _load(model: nn.Module, state: Mapping[str, Any], path: Path, *, prefix: str | None = None, strict: bool = True) -> LoadReport:
    wanted = list(portable_names(model).values())
    own = fitted(state, set(wanted), prefix)
    if wanted and own.keys().isdisjoint(wanted):
        several = [] if prefix is not None else common_prefixes(state, set(wanted))
        hint = f"; its names fit behind any of {listed(several)}: choose with load_weights(prefix=…)" if len(several) > 1 else ""
        first = printable(next(iter(state), "nothing"))
        raise CheckpointMismatchError(f"{path}: has none of the model's names: it begins with {first}, the model with {wanted[0]}{hint}")
    try:
        report = load_model_state(model, own, strict=strict, cast=True)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{path}: {error}") from None
    if wanted and not report.loaded:
        raise CheckpointMismatchError(f"{path}: not one tensor fits the model: {report}")
    return report


def _device_ids(device: torch.device, device_ids: Sequence[int] | None) -> list[int] | None:
    """Return the GPUs for DataParallel, which expects the model on the first one."""
    if device_ids is not None:
        return list(device_ids)
    if device.type != "cuda":
        return None
    index: int | None = device.index
    first = torch.cuda.current_device() if index is None else index
    return [first, *(other for other in range(torch.cuda.device_count()) if other != first)]


def _distinct(state: Mapping[str, Any], path: Path) -> tuple[list[tuple[str, torch.Tensor]], dict[str, str]]:
    """Return the tensors to be written, in the order of the file, and name -> name written of the others."""
    kept: dict[tuple[object, ...], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        tensor: Any = value.detach() if isinstance(value, torch.Tensor) else value
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _SAFETENSORS_TYPES:
            what = f"a tensor of {value.dtype} on {value.device}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise CheckpointSaveError(
                f"{path}: {printable(str(name))} is {what}, and safetensors files hold dense tensors of common types only; leave it out, "
                "or save with torch.save"
            )
        if name == "__metadata__" or type(name) is not str or not _is_text(name):
            raise CheckpointSaveError(f"{path}: {printable(repr(name))} cannot be the name of a tensor in a safetensors file; rename it")
        size, there = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if size > _LARGEST_EXPANDED and size > 2 * there:
            raise CheckpointSaveError(
                f"{path}: {printable(name)} would take {size} bytes and is {there} in memory (expanded), which safetensors files cannot "
                "say; leave it out, or save with torch.save"
            )
        identity = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()
        if tensor.numel() and identity in kept:
            aliases[name] = kept[identity]
        else:
            kept[identity], tensors[name] = name, tensor
    # Largest elements first, so that each begins at a multiple of its own size.
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])), aliases


def _is_text(name: str) -> bool:
    """Return whether a name can be written as UTF-8: one with half a surrogate pair cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _chunks(tensor: torch.Tensor) -> Iterator[bytes]:
    whole = tensor.resolve_neg().cpu().contiguous()
    size = whole.numel() * whole.element_size()
    for start in range(0, size, _CHUNK_BYTES):
        # No NumPy, which torch does without.
        yield ctypes.string_at(whole.data_ptr() + start, min(_CHUNK_BYTES, size - start))
