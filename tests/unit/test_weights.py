"""Weights in files of any origin: saved by one process, loaded into any model, readable by torch or safetensors alone."""

import ctypes
import json
import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.nn.parallel import DataParallel

import hpcckpt
from hpcckpt import (
    load_checkpoint_universal,
    load_dataparallel_checkpoint,
    load_weights,
    save_dataparallel_checkpoint,
    save_safetensors,
    weights,
)
from hpcckpt.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError, CheckpointSaveError, UsageError
from hpcckpt.state.foreign import renamed

NEEDED_BY_TORCH = ("torch", "torchgen", "typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock")


class Net(nn.Module):
    """Buffers, tied weights, and a submodule that is really called `module`."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.module = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.module(self.embedding(x))))


def trained(wrap=lambda model: model):
    model = wrap(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2, 3])).square().sum().backward()
        optimizer.step()
    return model, optimizer


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "plain": lambda model: model,
    "dp": DataParallel,
    "compiled": compiled,
    "dp-of-compiled": lambda model: DataParallel(compiled(model)),
}
any_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def plain(model):
    return dict(hpcckpt.state.model.unwrap(model).state_dict())


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def same_optimizers(left, right):
    one, other = left.state_dict(), right.state_dict()
    return one["param_groups"] == other["param_groups"] and all(
        same({k: torch.as_tensor(v) for k, v in one["state"][n].items()}, {k: torch.as_tensor(v) for k, v in other["state"][n].items()})
        for n in one["state"].keys() | other["state"].keys()
    )


# --- checkpoints of one process


def test_the_file_says_what_is_in_it(tmp_path):
    model, optimizer = trained(DataParallel)
    assert save_dataparallel_checkpoint(model, optimizer, 3, tmp_path / "x.pt", note="mine", history=[1, 2.5]) is None
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    rest = {key: value for key, value in content.items() if not key.endswith("_state_dict")}
    own = {"epoch": 3, "is_wrapped": True, "save_portable": True, "format_version": 1, "saved_with_wrapper": "DataParallel"}
    assert rest == own | {"note": "mine", "history": [1, 2.5]}
    assert same(content["model_state_dict"], plain(model))
    assert content["optimizer_state_dict"]["param_groups"][0]["param_names"][0] == "embedding.weight"
    assert (tmp_path / "x.pt").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_the_wrappers_own_keys_stay_where_that_is_asked_for(tmp_path):
    model, _ = trained(DataParallel)
    save_dataparallel_checkpoint(model, None, 0, tmp_path / "x.pt", save_portable=False)
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert same(content["model_state_dict"], dict(model.state_dict()))
    assert content["save_portable"] is False
    assert content["optimizer_state_dict"] is None


@any_wrapper
@pytest.mark.parametrize("save_portable", [True, False])
@pytest.mark.parametrize("use_dataparallel", [True, False])
def test_any_wrapper_saves_and_any_other_one_loads(tmp_path, wrap, save_portable, use_dataparallel):
    source, optimizer = trained(DataParallel)
    save_dataparallel_checkpoint(source, optimizer, 3, tmp_path / "x.pt", save_portable)
    model = wrap(Net())
    own = torch.optim.AdamW(model.parameters(), lr=9.0)
    loaded, epoch = load_dataparallel_checkpoint(model, own, str(tmp_path / "x.pt"), "cpu", use_dataparallel)
    assert epoch == 3
    assert same(plain(loaded), plain(source))
    assert same_optimizers(own, optimizer)
    if use_dataparallel and not isinstance(model, DataParallel):
        assert isinstance(loaded, DataParallel)
        assert loaded.module is model
    else:
        assert loaded is model


def test_the_model_goes_to_the_device(tmp_path):
    save_dataparallel_checkpoint(nn.Linear(2, 2), None, 0, tmp_path / "x.pt")
    model, epoch = load_dataparallel_checkpoint(nn.Linear(2, 2), None, tmp_path / "x.pt", "meta")
    assert model.weight.is_meta
    assert epoch == 0


def test_training_goes_on_with_the_same_bits(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2, 3])).square().sum().backward()
        optimizer.step()

    source, optimizer = trained()
    save_dataparallel_checkpoint(source, optimizer, 0, tmp_path / "x.pt")
    model = Net()
    own = torch.optim.AdamW(model.parameters(), lr=9.0)
    load_dataparallel_checkpoint(model, own, tmp_path / "x.pt", torch.device("cpu"))
    (tmp_path / "x.pt").write_bytes(b"")  # nothing of the file is in use any more
    for _ in range(2):
        step(source, optimizer)
        step(model, own)
    assert same(plain(model), plain(source))


def test_where_dataparallel_cannot_work_it_is_refused(tmp_path, monkeypatch):
    save_dataparallel_checkpoint(Net(), None, 0, tmp_path / "x.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="DataParallel needs the model on a GPU"):
        load_dataparallel_checkpoint(Net(), None, tmp_path / "x.pt", "cpu", use_dataparallel=True)
    load_dataparallel_checkpoint(Net(), None, tmp_path / "x.pt", "cpu")


def test_dataparallel_gets_the_models_gpu_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert weights._device_ids(torch.device("cuda:1"), None) == [1, 0, 2]
    assert weights._device_ids(torch.device("cuda"), None) == [2, 0, 1]
    assert weights._device_ids(torch.device("cuda"), (0, 2)) == [0, 2]
    assert weights._device_ids(torch.device("cpu"), None) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("epoch"), "has no epoch; load the model alone with hpcckpt.load_checkpoint_universal"),
        (lambda content: content.update(epoch="3"), "has no epoch"),
        (lambda content: content.update(epoch=True), "has no epoch"),
        (lambda content: content.pop("optimizer_state_dict"), "has no optimizer_state_dict; give optimizer=None"),
        (lambda content: content.update(optimizer_state_dict=None), "has no optimizer_state_dict"),
        (lambda content: content.pop("model_state_dict"), "has no model state under model_state_dict"),
        (lambda content: content["model_state_dict"].pop("norm.bias"), r"it lacks norm\.bias"),
        (lambda content: content["optimizer_state_dict"].clear(), "AdamW did not take its saved state"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_files_name(tmp_path, change, said):
    model, optimizer = trained()
    save_dataparallel_checkpoint(model, optimizer, 3, tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "x.pt")
    target = Net()
    before = {key: value.clone() for key, value in plain(target).items()}
    own = torch.optim.AdamW(target.parameters())
    with pytest.raises(CheckpointMismatchError, match=said) as caught:
        load_dataparallel_checkpoint(target, own, tmp_path / "x.pt", "cpu")
    assert str(caught.value).startswith(f"{tmp_path / 'x.pt'}: ")
    assert not own.state
    if "AdamW" not in said:
        assert same(plain(target), before)


@pytest.mark.parametrize("key", ["format_version", "is_wrapped", "saved_with_wrapper", "optimizer_state_dict"])
def test_the_files_own_keys_are_not_for_extra_state(tmp_path, key):
    with pytest.raises(UsageError, match=f"save_dataparallel_checkpoint\\({key}=…\\): this key is the file's own"):
        save_dataparallel_checkpoint(Net(), None, 0, tmp_path / "x.pt", **{key: 1})
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_back_is_not_saved(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"older")
    with pytest.raises(CheckpointSaveError, match=r"args holds a .*Path"):
        save_dataparallel_checkpoint(Net(), None, 0, tmp_path / "x.pt", args=Path())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.pt": b"older"}


SAVES = {
    "dataparallel": lambda path: save_dataparallel_checkpoint(Net(), None, 0, path),
    "safetensors": lambda path: save_safetensors({"w": torch.ones(1000)}, path),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_full_disk_leaves_what_was_there(tmp_path, save, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(b"older")
    fsync = lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointSaveError, match=r"could not be written \(No space left on device\), and what was there is intact"):
            save(path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.pt": b"older"}
    save(path)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_where_it_cannot_be_written_the_error_says_why(tmp_path, save):
    with pytest.raises(CheckpointSaveError, match=r"there is no folder .*gone; make it, then save again"):
        save(tmp_path / "gone" / "x.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointSaveError, match=r"folder: could not be written \(Is a directory\)"):
        save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# --- files of any origin


def lightning(state, path):
    content = {"state_dict": {f"model.{k}": v for k, v in state.items()}, "pytorch-lightning_version": "2.5.0", "epoch": 3}
    torch.save({**content, "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{}], "callbacks": {}}, path)


ORIGINS = {
    "plain": torch.save,
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "dp": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "ddp-of-compiled": lambda state, path: torch.save({"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, path),
    "lightning": lightning,
    "compiled lightning": lambda state, path: lightning({f"_orig_mod.{k}": v for k, v in state.items()}, path),
    "safetensors": lambda state, path: save_file({k: v.clone() for k, v in state.items()}, path),
    "safetensors, ours": save_safetensors,
    "hugging face": lambda state, path: save_file(
        {f"bert.{k}": v for k, v in state.items() if k != "head.weight"}, path, metadata={"format": "pt"}
    ),
}


@any_wrapper
@pytest.mark.parametrize("write", ORIGINS.values(), ids=ORIGINS)
def test_a_file_of_any_origin_loads_into_any_wrapper(tmp_path, write, wrap):
    source, _ = trained()
    write(source.state_dict(), tmp_path / "x.bin")
    model = wrap(Net())
    assert load_checkpoint_universal(model, tmp_path / "x.bin") is model
    assert same(plain(model), plain(source))
    report = load_weights(wrap(Net()), str(tmp_path / "x.bin"))
    assert report.is_complete
    assert sorted(report.loaded) == sorted(plain(source))


def test_a_prefix_of_the_model_is_found_too(tmp_path):
    source, _ = trained()
    torch.save(source.state_dict(), tmp_path / "x.pt")
    task = nn.ModuleDict({"base": Net(), "classifier": nn.Linear(3, 2)})
    with pytest.raises(CheckpointMismatchError, match=r"x\.pt: the checkpoint does not fit the model: it lacks classifier\.weight"):
        load_weights(task, tmp_path / "x.pt")
    report = load_weights(task, tmp_path / "x.pt", strict=False)
    assert report.missing == ("classifier.weight", "classifier.bias")
    assert same(plain(task["base"]), plain(source))


def test_of_two_prefixes_one_has_to_be_chosen(tmp_path):
    one, two = trained()[0], Net()
    torch.save(
        {**{f"model.{k}": v for k, v in one.state_dict().items()}, **{f"ema.{k}": v for k, v in two.state_dict().items()}},
        tmp_path / "x.pt",
    )
    with pytest.raises(CheckpointMismatchError, match=r"its names fit behind any of ema\., model\.: choose with load_weights\(prefix=…\)"):
        load_weights(Net(), tmp_path / "x.pt", strict=False)
    model = Net()
    report = load_weights(model, tmp_path / "x.pt", prefix="ema", strict=False)
    assert same(plain(model), plain(two))
    assert report.is_complete
    assert load_weights(Net(), tmp_path / "x.pt", prefix="ema").is_complete


def test_a_name_that_is_left_over_takes_no_other_ones_place(tmp_path):
    torch.save({"weight": torch.zeros(2, 2), "model.weight": torch.ones(2, 2)}, tmp_path / "x.pt")
    model = nn.Linear(2, 2, bias=False)
    assert load_weights(model, tmp_path / "x.pt", prefix="model.").is_complete
    assert torch.equal(model.weight, torch.ones(2, 2))
    state = {"weight": torch.zeros(2, 2), "model.weight": torch.ones(2, 2)}
    assert list(renamed(state, {"weight": "model.weight"})) == ["weight", "weight (beside model.weight)"]


def test_tensors_become_what_the_model_has(tmp_path):
    source, _ = trained()
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in source.state_dict().items()}, tmp_path / "x.pt")
    model = Net()
    report = load_weights(model, tmp_path / "x.pt")
    assert report.is_complete
    assert report.cast
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_what_does_not_fit_is_an_error_or_a_warning(tmp_path, caplog):
    state = dict(Net().state_dict())
    state["norm.weight"] = torch.ones(7)
    state["other"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "x.pt")
    model = Net()
    before = {key: value.clone() for key, value in plain(model).items()}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_checkpoint_universal(model, tmp_path / "x.pt")
    assert all(part in str(caught.value) for part in ("lacks norm.bias", "no other", "norm.weight (7,) for (3,)"))
    assert same(plain(model), before)
    with caplog.at_level(logging.WARNING, "hpcckpt"):
        load_checkpoint_universal(model, tmp_path / "x.pt", strict=False)
    assert [record.name for record in caplog.records] == ["hpcckpt"]
    assert "1 missing: norm.bias; 1 unexpected: other; 1 of another shape" in caplog.text
    assert torch.equal(model.norm.bias, before["norm.bias"])
    assert torch.equal(model.module.weight, state["module.weight"])


@pytest.mark.parametrize("state", [{"nothing": torch.ones(1)}, {}, {"weight": torch.ones(9)}])
def test_a_file_of_which_nothing_fits_is_refused_though_it_need_not_be_complete(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointMismatchError, match=r"has none of the model's names|not one tensor fits"):
        load_checkpoint_universal(nn.Linear(2, 2, bias=False), tmp_path / "x.pt", strict=False)


def test_a_model_without_a_state_loads_a_state_without_content(tmp_path):
    torch.save({}, tmp_path / "x.pt")
    assert load_weights(nn.ReLU(), tmp_path / "x.pt").is_complete


def test_a_model_stays_where_it_is_unless_it_is_told(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pt")
    model = load_checkpoint_universal(nn.Linear(2, 2), tmp_path / "x.pt", device="meta")
    assert model.weight.is_meta
    assert not load_checkpoint_universal(nn.Linear(2, 2), tmp_path / "x.pt").weight.is_meta


@pytest.mark.parametrize("load", [load_weights, load_checkpoint_universal, lambda m, p: load_dataparallel_checkpoint(m, None, p, "cpu")])
def test_every_loader_has_the_readers_errors(tmp_path, load):
    with pytest.raises(CheckpointNotFoundError, match="there is no such file"):
        load(Net(), tmp_path / "gone.pt")
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointCorruptError):
        load(Net(), tmp_path / "x.pt")


# --- safetensors

EVERY_TYPE = {
    str(dtype).removeprefix("torch."): torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8).to(dtype) for dtype in weights._SAFETENSORS_TYPES
}


def test_every_type_is_read_back_by_the_library(tmp_path):
    save_safetensors(EVERY_TYPE, tmp_path / "x.safetensors", {"note": "Grüße"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == EVERY_TYPE.keys()
    for name, tensor in EVERY_TYPE.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "Grüße"}
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o600


def test_each_tensor_begins_at_a_multiple_of_its_elements_size(tmp_path):
    save_safetensors({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3), "c": torch.ones(3, dtype=torch.float64)}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert {name: header[name]["data_offsets"] for name in "abc"} == {"c": [0, 24], "b": [24, 36], "a": [36, 39]}


def test_odd_tensors_are_written_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    odd = {
        "transposed": base.t(),
        "column": base[:, 1],
        "expanded": base[:1].expand(3, 4),
        "negative": torch.view_as_complex(base.reshape(6, 2)).conj().imag,
        "negative in place": torch._neg_view(torch.arange(4.0)),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "empty too": torch.empty(0, 4),
        "parameter": nn.Parameter(base[1]),
        "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "large": torch.arange(weights._CHUNK_BYTES // 4 + 3, dtype=torch.float32),
    }
    save_safetensors(odd, tmp_path / "x.safetensors")
    assert same(load_file(tmp_path / "x.safetensors"), odd)


def test_tied_tensors_are_written_once_and_noted(tmp_path):
    source, _ = trained()
    save_safetensors(source.state_dict(), tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["hpcckpt.aliases"]) == {"head.weight": "embedding.weight"}
        assert "head.weight" not in file.keys()  # noqa: SIM118
    theirs, ours = Net(), Net()
    load_model(theirs, tmp_path / "x.safetensors")
    assert load_weights(ours, tmp_path / "x.safetensors").is_complete
    assert same(plain(theirs), plain(source))
    assert same(plain(ours), plain(source))


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    state = dict(trained()[0].state_dict())
    save_safetensors(state, tmp_path / "a", {"x": "1", "y": "2"})
    save_safetensors({key: value.clone() if key != "head.weight" else state["head.weight"] for key, value in state.items()}, tmp_path / "b")
    save_safetensors(state, tmp_path / "c", {"x": "1", "y": "2"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a._extra_state": {"calls": 3}}, r"a\._extra_state is a dict, and safetensors files hold dense tensors"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, r"a is a tensor of torch\.complex64"),
        ({"a": torch.ones(2, device="meta")}, "a is a tensor of torch.float32 on meta"),
        ({"a": torch.eye(2).to_sparse()}, "a is a tensor of torch.float32"),
        ({"__metadata__": torch.ones(2)}, "cannot be the name of a tensor"),
        ({3: torch.ones(2)}, "3 cannot be the name of a tensor"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused(tmp_path, state, said):
    with pytest.raises(CheckpointSaveError, match=said):
        save_safetensors(state, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metadata", [{"epoch": 3}, {3: "x"}, {"hpcckpt.aliases": "{}"}])
def test_notes_are_strings_and_ours_are_ours(tmp_path, metadata):
    with pytest.raises(UsageError, match="keys and values have to be strings"):
        save_safetensors({}, tmp_path / "x.safetensors", metadata)


# --- read back without hpcckpt


def alone(tmp_path, packages, code, *arguments):
    """Run Python with nothing but these packages; returns what it prints."""
    folder = tmp_path / "packages"
    folder.mkdir()
    site = Path(torch.__file__).parents[1]
    for name in packages:
        (folder / name).symlink_to(site / name)
    for found in site.glob("torch-*.dist-info"):
        (folder / found.name).symlink_to(found)
    prelude = f"""if True:
        import sys, warnings
        warnings.simplefilter("ignore")
        sys.path.append({str(folder)!r})
        for name in ("numpy", "hpcckpt"):
            try:
                __import__(name)
            except ImportError:
                continue
            raise SystemExit(name + " can be imported")
    """
    argv = [sys.executable, "-I", "-S", "-c", f"{prelude}\n{code}", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def raw(tensor):
    whole = tensor.detach().contiguous()
    return ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size()).hex()


def expected(state):
    return {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), raw(tensor)] for name, tensor in state.items()}


READ_BY_TORCH = """
import ctypes, json, torch
content = torch.load(sys.argv[1], weights_only=True)
raw = lambda t: ctypes.string_at(t.contiguous().data_ptr(), t.numel() * t.element_size()).hex()
model = {n: [str(t.dtype).removeprefix("torch."), list(t.shape), raw(t)] for n, t in content["model_state_dict"].items()}
state = content["optimizer_state_dict"]["state"]
print(json.dumps({"model": model, "exp_avg": [raw(entry["exp_avg"]) for entry in state.values()], "epoch": content["epoch"]}))
"""


def test_torch_alone_reads_a_checkpoint_back_bit_for_bit(tmp_path):
    model, optimizer = trained(DataParallel)
    save_dataparallel_checkpoint(model, optimizer, 3, tmp_path / "x.pt")
    assert alone(tmp_path, NEEDED_BY_TORCH, READ_BY_TORCH, tmp_path / "x.pt") == {
        "model": expected(plain(model)),
        "exp_avg": [raw(entry["exp_avg"]) for entry in optimizer.state.values()],
        "epoch": 3,
    }


READ_BY_SAFETENSORS = """
import json, safetensors
with open(sys.argv[1], "rb") as file:
    found = safetensors.deserialize(file.read())
print(json.dumps({name: [view["dtype"], list(view["shape"]), bytes(view["data"]).hex()] for name, view in found}))
"""


def test_safetensors_alone_reads_an_export_back_bit_for_bit(tmp_path):
    state = {**EVERY_TYPE, "w": torch.randn(5, 3).t()}
    save_safetensors(state, tmp_path / "x.safetensors")
    read = alone(tmp_path, ("safetensors",), READ_BY_SAFETENSORS, tmp_path / "x.safetensors")
    names = {str(dtype).removeprefix("torch."): name for dtype, name in weights._SAFETENSORS_TYPES.items()}
    assert read == {name: [names[dtype], shape, data] for name, (dtype, shape, data) in expected(state).items()}


def test_the_library_is_one_that_is_declared():
    assert tuple(map(int, version("safetensors").split(".")[:2])) >= (0, 5)


def test_nothing_outside_of_a_prefix_is_used(tmp_path):
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.scale = nn.Parameter(torch.ones(()))

    torch.save({"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2), "scale": torch.tensor(77.0)}, tmp_path / "x.pt")
    for options in ({}, {"prefix": "model."}):
        with pytest.raises(CheckpointMismatchError, match="it lacks scale"):
            load_weights(Scaled(), tmp_path / "x.pt", **options)
        model = Scaled()
        load_weights(model, tmp_path / "x.pt", strict=False, **options)
        assert model.scale == 1
        assert torch.equal(model.bias, torch.ones(2))


def test_a_file_of_a_later_format_is_not_read(tmp_path):
    model, optimizer = trained()
    save_dataparallel_checkpoint(model, optimizer, 1, tmp_path / "x.pt")
    torch.save({**torch.load(tmp_path / "x.pt"), "format_version": 2}, tmp_path / "x.pt")
    for load in (
        lambda: load_weights(model, tmp_path / "x.pt"),
        lambda: load_dataparallel_checkpoint(model, None, tmp_path / "x.pt", "cpu"),
    ):
        with pytest.raises(CheckpointMismatchError, match="was written in format 2"):
            load()


def test_an_optimizer_that_does_not_fit_leaves_the_model_alone(tmp_path):
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    save_dataparallel_checkpoint(source, torch.optim.SGD(source.parameters()), 0, tmp_path / "x.pt")
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointMismatchError, match="optimizer: "):
        load_dataparallel_checkpoint(model, torch.optim.SGD([model.weight]), tmp_path / "x.pt", "cpu")
    assert torch.equal(model.weight, before)


def test_a_conversion_is_logged(tmp_path, caplog):
    torch.save(nn.Linear(2, 2).half().state_dict(), tmp_path / "x.pt")
    with caplog.at_level(logging.INFO, "hpcckpt"):
        load_checkpoint_universal(nn.Linear(2, 2), tmp_path / "x.pt")
    assert "2 of another dtype: weight float16 for float32" in caplog.text


def test_a_small_view_makes_a_small_file(tmp_path):
    save_dataparallel_checkpoint(nn.Linear(1, 1), None, 0, tmp_path / "x.pt", row=torch.randn(1000, 1000)[3])
    assert (tmp_path / "x.pt").stat().st_size < 20_000


def test_names_in_messages_do_nothing_to_a_terminal(tmp_path):
    state = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    for content in ({"\x1b[2J\n" + "x" * 100_000: torch.zeros(2)}, {**state, "\x1b[2J\n" + "x" * 100_000: torch.zeros(2)}, {"\x07": 3}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointMismatchError) as caught:
            load_weights(nn.Linear(2, 2), tmp_path / "x.pt")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


def test_a_note_that_is_no_name_is_nothing_the_model_lacks(tmp_path):
    source = nn.Linear(2, 2)
    save_file(dict(source.state_dict()), tmp_path / "x", metadata={"format": "pt", "best": "weight"})
    assert load_weights(nn.Linear(2, 2), tmp_path / "x").is_complete


@pytest.mark.parametrize(
    ("name", "tensor", "said"), [("\ud800w", torch.zeros(1), "cannot be the name"), ("w", torch.zeros(1).expand(1 << 40), "expanded")]
)
def test_what_a_safetensors_file_cannot_say_is_refused(tmp_path, name, tensor, said):
    with pytest.raises(CheckpointSaveError, match=said):
        save_safetensors({name: tensor}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
