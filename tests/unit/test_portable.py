"""What goes into a file is plain: `torch.load(weights_only=True)` reads it back equal."""

import enum
import io
import math
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpcckpt.errors import CheckpointSaveError
from hpcckpt.state.portable import compacted, portable


class Colour(enum.StrEnum):
    RED = "red"


class Word(str, enum.Enum):  # noqa: UP042 - str() of its members is "Word.YES"
    YES = "yes"


class Level(enum.IntEnum):
    HIGH = 3


class Loud(str):
    __slots__ = ()

    def __str__(self):
        return self.upper()


Pair = namedtuple("Pair", "left right")  # noqa: PYI024 - what a user's state may hold


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def identical(left, right):
    """Equal in type as well; NaN equals NaN, and 0.0 is not -0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(map(repr, left)) == list(map(repr, right)) and all(map(identical, left.values(), right.values()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(identical, left, right))
    return repr(left) == repr(right)


BECOMES = {
    "None": (None, None),
    "bool": (True, True),
    "float64": (np.float64(0.1), 0.1),
    "float64 nan": (np.float64("nan"), math.nan),
    "float32": (np.float32(0.5), 0.5),
    "int64": (np.int64(-7), -7),
    "uint8": (np.uint8(255), 255),
    "numpy bool": (np.bool_(True), True),
    "numpy str": (np.str_("a"), "a"),
    "numpy bytes": (np.bytes_(b"a"), b"a"),
    "array of no dimension": (np.array(2.5), 2.5),
    "str enum": (Colour.RED, "red"),
    "str and enum": (Word.YES, "yes"),
    "str subclass": (Loud("quiet"), "quiet"),
    "int enum": (Level.HIGH, 3),
    "ordered dict": (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "default dict": (defaultdict(list, a=[np.float64(1)]), {"a": [1.0]}),
    "user's mapping": (UserDict(a=1), {"a": 1}),
    "read-only mapping": (MappingProxyType({"a": (1,)}), {"a": (1,)}),
    "counter": (Counter({np.int64(3): 1} | {5: 2}), Counter({3: 1, 5: 2})),
    "named tuple": (Pair(1, [2]), (1, [2])),
    "torch.Size": (torch.Size([2, 3]), (2, 3)),
    "keys": ({1: "a", None: "b", (1, "x"): "c", 0.5: "d", np.float64(2): "e"}, {1: "a", None: "b", (1, "x"): "c", 0.5: "d", 2.0: "e"}),
    "largest int": (2**2032 - 1, 2**2032 - 1),
    "smallest int": (1 - 2**2032, 1 - 2**2032),
}


@pytest.mark.parametrize(("value", "plain"), BECOMES.values(), ids=BECOMES)
def test_a_value_becomes_plain_and_is_read_back(value, plain):
    found = portable(value, "model")
    assert identical(found, plain)
    assert identical(through_a_file(found), plain)


@pytest.mark.parametrize(
    "tensor",
    [nn.Parameter(torch.randn(2)), torch.randn(2, requires_grad=True), torch.arange(6).view(2, 3).T, torch.tensor(1), torch.empty(0)],
    ids=["parameter", "with gradient", "transposed", "scalar", "empty"],
)
def test_a_tensor_is_passed_on_detached_and_shares_memory(tensor):
    found = portable([tensor], "model")[0]
    assert type(found) is torch.Tensor
    assert not found.requires_grad
    assert found.data_ptr() == tensor.data_ptr()
    assert torch.equal(through_a_file(found), tensor)


def test_the_containers_are_new_ones():
    state = {"a": [1, {"b": 2}]}
    found = portable(state, "s")
    state["a"][1]["b"] = 3
    state["a"].append(4)
    assert found == {"a": [1, {"b": 2}]}


class Sub(torch.Tensor):
    pass


REFUSED = {
    "object": ({"a": [object()]}, r"^scheduler\.a\[0\] holds a builtins\.object, "),
    "set": ({"seen": {1, 2}}, r"^scheduler\.seen holds a builtins\.set, "),
    "frozen set": (({"x": frozenset()},), r"^scheduler\[0\]\.x holds a builtins\.frozenset, "),
    "function": ([1, len], r"^scheduler\[1\] holds a builtins\.builtin_function_or_method, "),
    "lambda": ({"fn": lambda: None}, r"^scheduler\.fn holds a builtins\.function, "),
    "class": ({"a": {"b": int}}, r"^scheduler\.a\.b holds a builtins\.type, "),
    "array": ({"a": np.zeros(2)}, r"^scheduler\.a holds a numpy\.ndarray, "),
    "array of strings": (np.array(["a"]), r"^scheduler holds a numpy\.ndarray, "),
    "complex": ([1j], r"^scheduler\[0\] holds a builtins\.complex, "),
    "generator": ({"g": torch.Generator()}, r"^scheduler\.g holds a torch\._C\.Generator, "),
    "dtype": ({"dtype": torch.float32}, r"^scheduler\.dtype holds a torch\.dtype, "),
    "iterator": (iter([]), r"^scheduler holds a builtins\.list_iterator, "),
    "enum": ([enum.Enum("E", "A").A], r"^scheduler\[0\] holds a .*E, "),
    "tensor subclass": ({"w": torch.zeros(1).as_subclass(Sub)}, r"^scheduler\.w holds a .*Sub, "),
    "empty bytes": ({"b": [b""]}, r"^scheduler\.b\[0\] holds empty bytes, "),
    "int of 2033 bits": ({"n": 2**2032}, r"^scheduler\.n holds an integer of 2033 bits, "),
    "key of a type": ({"a": {int: 1}}, r"^scheduler\.a \(a key\) holds a builtins\.type"),
    "key of an object": ({(1, object()): 1}, r"^scheduler \(a key\) holds a builtins\.object"),
    "key of a tensor": ({(torch.zeros(1),): 1}, r"^scheduler has a tensor for a key"),
}


@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED)
def test_what_could_not_be_read_back_is_refused_with_its_place(value, message):
    with pytest.raises(CheckpointSaveError, match=message):
        portable(value, "scheduler")


numbers = st.booleans() | st.integers() | st.floats() | st.integers(-(2**2040), 2**2040)
scalars = numbers | st.none() | st.text() | st.binary() | st.floats().map(np.float64) | st.integers(0, 9).map(np.int16)
words = st.integers() | st.text() | st.binary() | st.floats(allow_nan=False) | st.none()
keys = st.recursive(words, lambda inner: st.tuples(inner, inner), max_leaves=3)
tensors = st.lists(st.floats(width=32), max_size=3).map(torch.tensor)
anything = st.recursive(
    scalars | tensors | st.sets(st.integers(), max_size=1),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(keys, st.integers(0, 9), max_size=4).map(Counter)
    ),
    max_leaves=8,
)


def bitwise(value):
    """NaN is unequal to itself in torch.equal: compare the bits."""
    if isinstance(value, torch.Tensor):
        return value.view(torch.int32) if value.dtype == torch.float32 else value
    if isinstance(value, dict):
        return type(value)({key: bitwise(item) for key, item in value.items()})
    return type(value)(map(bitwise, value)) if isinstance(value, list | tuple) else value


@settings(deadline=None)
@given(anything)
def test_whatever_is_accepted_is_read_back_equal(value):
    try:
        plain = portable(value, "state")
    except CheckpointSaveError:
        return
    assert identical(bitwise(through_a_file(plain)), bitwise(plain))
    assert identical(bitwise(portable(plain, "state")), bitwise(plain))


def test_views_are_copied_where_most_of_their_storage_would_be_written_for_nothing():
    large = torch.arange(100_000.0)
    half, row, spread = large[:60_000], large[100:200], torch.ones(100_000)[:2].expand(1 << 20, 2)
    content = {"whole": [half], "n": 1}
    assert compacted(content) is content
    assert compacted([row, large])[0] is row
    copied = compacted({"a": row, "b": (row, Counter(x=1)), "c": row.view(10, 10).t(), "spread": spread})
    assert torch.equal(copied["a"], row)
    assert copied["a"].untyped_storage().nbytes() == 400
    assert copied["a"] is copied["b"][0]
    assert type(copied["b"][1]) is Counter
    assert torch.equal(copied["c"], row.view(10, 10).t())
    assert copied["spread"].shape == spread.shape
    assert copied["spread"].untyped_storage().nbytes() == 8
