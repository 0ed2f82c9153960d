"""The format of version 1: the golden file is read for good, by torch, by hpcckpt, and by the reader on the page."""

import builtins
import json
import random
import re
import runpy
import shutil
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcckpt import load_weights
from hpcckpt.layout import RunLayout, manifest_name
from hpcckpt.policy import Retention
from hpcckpt.reading import read_content
from hpcckpt.state.rng import rng_state, set_rng_state
from hpcckpt.state.tracked import FORMAT_VERSION, Tracked
from hpcckpt.store.durable import file_digest
from hpcckpt.store.reader import CheckpointReader
from support.hostile import as_zip, pickles

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "reference" / "format.md"
FOLDER = REPOSITORY / "tests" / "golden"
GOLDEN = FOLDER / "format1.pt"
MANIFEST = json.loads((FOLDER / "format1.json").read_text())
SCRIPT = runpy.run_path(str(FOLDER / "make_format1.py"))

# Written down once; nothing here is computed from what the code does today.
MODEL = {
    "scale": ("bfloat16", [1.5, -0.375, 1024.0]),
    "counts": ("int64", [[1, -2], [9007199254740993, -9223372036854775808]]),
    "embedding.weight": ("float32", [[0.0, 0.25], [0.5, 0.75], [1.0, 1.25], [1.5, 1.75]]),
    "module.weight": ("float32", [[2.0, 2.25], [2.5, 2.75]]),
    "module.bias": ("float32", [3.0, 3.25]),
    "norm.weight": ("float32", [3.5, 3.75]),
    "norm.bias": ("float32", [4.0, 4.25]),
    "norm.running_mean": ("float32", [-1.25, 7.0]),
    "norm.running_var": ("float32", [0.5, 2.0]),
    "norm.num_batches_tracked": ("int64", 12),
    "head.weight": ("float32", [[0.0, 0.25], [0.5, 0.75], [1.0, 1.25], [1.5, 1.75]]),
}
EXP_AVG = {
    "embedding.weight": [[0.0, 0.125], [0.25, 0.375], [0.5, 0.625], [0.75, 0.875]],
    "norm.weight": [1.75, 1.875],
    "module.weight": [[1.0, 1.125], [1.25, 1.375]],
    "module.bias": [1.5, 1.625],
    "norm.bias": [2.0, 2.125],
}
EXP_AVG_SQ = {
    "embedding.weight": [[0.0, 0.03125], [0.0625, 0.09375], [0.125, 0.15625], [0.1875, 0.21875]],
    "norm.weight": [0.4375, 0.46875],
    "module.weight": [[0.25, 0.28125], [0.3125, 0.34375]],
    "module.bias": [0.375, 0.40625],
    "norm.bias": [0.5, 0.53125],
}
REST = {
    "format_version": 1,
    "epoch": 3,
    "step": 12,
    "metrics": {"val_loss": 0.625},
    "world_size": 2,
    "saved_with_wrapper": "DistributedDataParallel",
    "data_state": {"epoch_finished": False, "loaders": {"0": {"consumed": 48, "num_samples": 100}}, "last_loader": "0"},
}
# What rank 0 and rank 1 draw next: Python, torch, NumPy.
DRAWN = [
    (0.8444218515250481, 0.49625658988952637, 0.417022004702574),
    (0.13436424411240122, 0.7576315999031067, 0.417022004702574),
]


@pytest.fixture(scope="module")
def content():
    return torch.load(GOLDEN, weights_only=True)


def as_numbers(state):
    return {name: (str(tensor.dtype).removeprefix("torch."), tensor.tolist()) for name, tensor in state.items()}


def test_torch_alone_reads_the_values_that_were_written(content):
    assert as_numbers(content["model_state_dict"]) == MODEL
    assert {key: content[key] for key in REST} == REST
    assert content.keys() == REST.keys() | {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "rng_state"}
    optimizer = content["optimizer_state_dict"]
    names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
    assert names == ["embedding.weight", "norm.weight", "module.weight", "module.bias", "norm.bias"]
    assert [group["params"] for group in optimizer["param_groups"]] == [[0, 1], [2, 3, 4]]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.0, 0.01]
    for number, name in enumerate(names):
        entry = optimizer["state"][number]
        assert (entry["step"].item(), entry["exp_avg"].tolist(), entry["exp_avg_sq"].tolist()) == (12.0, EXP_AVG[name], EXP_AVG_SQ[name])
    scheduler = content["scheduler_state_dict"]
    assert (scheduler["milestones"], scheduler["gamma"], scheduler["_last_lr"]) == (Counter({2: 1, 3: 2}), 0.5, [0.125, 0.125])
    assert content["model_state_dict"]["head.weight"].data_ptr() == content["model_state_dict"]["embedding.weight"].data_ptr()


def test_generators_go_on_where_they_were(content):
    before = rng_state()
    try:
        for state, drawn in zip(content["rng_state"], DRAWN, strict=True):
            set_rng_state(state)
            assert (random.random(), torch.rand(1).item(), np.random.random_sample()) == drawn  # noqa: NPY002 - the global generator
    finally:
        set_rng_state(before)


def test_a_run_of_today_goes_on_from_it(tmp_path):
    layout = RunLayout(tmp_path)
    layout.checkpoints.mkdir()
    shutil.copy(GOLDEN, layout.checkpoints / MANIFEST["file"])
    shutil.copy(FOLDER / "format1.json", layout.checkpoints / manifest_name(MANIFEST["file"]))
    problems = []
    info = CheckpointReader(layout, Retention()).newest_good(problems.append)
    assert not problems
    assert (info.epoch, info.step, info.epoch_finished, info.metrics) == (3, 12, False, {"val_loss": 0.625})

    model = SCRIPT["Net"]()
    # Another order: found by name.
    groups = [[model.norm.weight, model.embedding.weight], [model.norm.bias, model.module.bias, model.module.weight]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=9.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [7], gamma=0.9)
    tracked = Tracked()
    for name, value in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
        tracked.add(name, value)
    tracked.load(read_content(layout.checkpoints / info.name, follow_symlinks=False))
    assert as_numbers(model.state_dict()) == MODEL
    parameters = dict(model.named_parameters())
    assert {name: optimizer.state[parameters[name]]["exp_avg"].tolist() for name in EXP_AVG} == EXP_AVG
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    assert scheduler.milestones == Counter({2: 1, 3: 2})


def test_its_weights_load_into_a_model_of_today():
    model = SCRIPT["Net"]()
    assert load_weights(model, GOLDEN).is_complete
    assert as_numbers(model.state_dict()) == MODEL


def test_the_manifest_is_that_of_the_file():
    assert file_digest(GOLDEN, MANIFEST["digest"]) == (MANIFEST["size_bytes"], MANIFEST["digest"])
    assert GOLDEN.stat().st_size < 100_000


# --- the page


def on_the_page():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return code


def reader_on_the_page():
    """Return read_checkpoint, from exactly what the page says, run where only the standard library can be imported."""
    allowed = sys.stdlib_module_names

    def importing(name, *arguments, **options):
        assert name.partition(".")[0] in allowed, name
        return __import__(name, *arguments, **options)

    scope = {"__name__": "reader", "__builtins__": {**vars(builtins), "__import__": importing}}
    exec(on_the_page(), scope)
    return scope["read_checkpoint"]


def plain(value):
    """As the page's reader gives it."""
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "values": value.flatten().tolist()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


def test_the_reader_on_the_page_reads_every_value_as_torch_does(content):
    assert len(on_the_page().splitlines()) <= 60
    read = reader_on_the_page()(GOLDEN)
    assert read == plain(content)
    assert list(read) == list(content)


def test_the_reader_on_the_page_knows_every_type_and_view(tmp_path):
    base = torch.arange(24).reshape(2, 3, 4)
    types = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16)
    state = {str(dtype): base.to(dtype) for dtype in (*types, torch.uint32, torch.uint64)}
    state |= {"view": base[1:, :, ::2].transpose(0, 2), "empty": torch.empty(0, 3), "scalar": torch.tensor(-2.5)}
    state |= {"bytes": b"\x00\xff", "big": -(2**70), "ordered": OrderedDict(a=1), "counter": Counter(a=2), "tuple": (1, None, True)}
    torch.save(state, tmp_path / "x.pt")
    assert reader_on_the_page()(tmp_path / "x.pt") == plain(state)


@pytest.mark.parametrize("name", list(pickles(Path("mark"))))
def test_the_reader_on_the_page_executes_nothing(tmp_path, name):
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    path.write_bytes(as_zip(pickles(mark)[name]))
    with pytest.raises(Exception):  # noqa: B017, PT011 - it is short, and has no errors of its own
        reader_on_the_page()(path)
    assert not mark.exists()


def test_the_zip_file_is_as_the_page_says():
    data = GOLDEN.read_bytes()
    with zipfile.ZipFile(GOLDEN) as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        assert {name.partition("/")[0] for name in names} == {"archive"}
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
    for entry in entries:
        assert entry.compress_type == zipfile.ZIP_STORED
        name_length, extra_length = struct.unpack_from("<HH", data, entry.header_offset + 26)
        start = entry.header_offset + 30 + name_length + extra_length
        assert start % 64 == 0 or not entry.filename.startswith("archive/data/")
    own = ("data.pkl", ".format_version", ".storage_alignment", "byteorder", "version", ".data/serialization_id")
    assert {name for name in names if "/data/" not in name} == {f"archive/{name}" for name in own}


def test_torch_does_not_notice_a_changed_byte_and_the_digest_does(tmp_path):
    data = bytearray(GOLDEN.read_bytes())
    data[data.index(struct.pack("<4f", 2.0, 2.25, 2.5, 2.75))] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    changed = torch.load(tmp_path / "x.pt", weights_only=True)["model_state_dict"]["module.weight"]
    assert changed.tolist() != MODEL["module.weight"][1]
    assert file_digest(tmp_path / "x.pt", MANIFEST["digest"])[1] != MANIFEST["digest"]


def test_every_key_is_on_the_page(content):
    page = PAGE.read_text()
    generators, data_state = content["rng_state"][0], REST["data_state"]
    keys = {*content, *MANIFEST, *data_state, *data_state["loaders"]["0"], *generators, *generators["numpy"]} - {"scheduler_state_dict"}
    keys |= {"param_names", "is_best", "is_wrapped", "save_portable"}
    assert not {key for key in keys if f"`{key}`" not in page}
    assert f"version {FORMAT_VERSION}" in page.splitlines()[0]
    assert FORMAT_VERSION == 1, "keep this golden file, and add one of the new version"


def test_what_is_written_today_has_the_same_keys(content):
    today = SCRIPT["content"]()
    assert today.keys() == content.keys()
    assert today["optimizer_state_dict"]["param_groups"][0].keys() >= {"params", "param_names", "lr"}
    assert rng_state().keys() - {"cuda"} == content["rng_state"][0].keys()
