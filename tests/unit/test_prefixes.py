"""The prefix of DataParallel, added and removed by hand."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DataParallel

import hpcckpt
from hpcckpt import add_module_prefix, normalize_state_dict, remove_module_prefix
from hpcckpt.errors import CheckpointMismatchError

FUNCTIONS = (add_module_prefix, remove_module_prefix, normalize_state_dict, lambda state: normalize_state_dict(state, remove_prefix=False))
PARTS = st.sampled_from(["module", "a", "weight", "module_", "modules", "0"])
KEYS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
STATES = st.dictionaries(KEYS, st.integers(), max_size=12)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_a_wrapped_models_state_loads_into_a_plain_one_and_back():
    plain, wrapped = net(), DataParallel(net())
    assert list(remove_module_prefix(wrapped.state_dict())) == list(plain.state_dict())
    plain.load_state_dict(remove_module_prefix(wrapped.state_dict()))
    wrapped.load_state_dict(add_module_prefix(net().state_dict()))
    assert list(add_module_prefix(plain.state_dict())) == list(wrapped.state_dict())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_empty_state_dict_stays_empty(function):
    assert function({}) == OrderedDict()
    assert type(function({})) is OrderedDict


def test_one_prefix_goes_at_a_time_and_only_a_leading_one():
    state = {"module.module.w": 1, "module.a.module.b": 2, "modules.c": 3, "module": 4}
    assert remove_module_prefix(state) == {"module.w": 1, "a.module.b": 2, "modules.c": 3, "module": 4}


def test_of_a_mixed_state_dict_the_prefixed_part_alone_changes():
    state = {"module.backbone.w": 1, "head.w": 2}
    assert list(remove_module_prefix(state).items()) == [("backbone.w", 1), ("head.w", 2)]
    assert list(add_module_prefix(state).items()) == [("module.backbone.w", 1), ("module.head.w", 2)]


@pytest.mark.parametrize("state", [{"module.w": 1, "w": 2}, {"w": 1, "module.w": 2}])
def test_two_keys_never_become_one(state):
    with pytest.raises(CheckpointMismatchError, match="both become 'w', and one tensor would be lost"):
        remove_module_prefix(state)
    with pytest.raises(CheckpointMismatchError, match=r"both become 'module\.w'"):
        add_module_prefix(state)
    assert normalize_state_dict(state, remove_prefix=False) == state


def test_normalizing_without_removing_is_a_copy():
    state = OrderedDict({"module.w": torch.ones(2)})
    copy = normalize_state_dict(state, remove_prefix=False)
    assert copy is not state
    assert copy["module.w"] is state["module.w"]
    assert normalize_state_dict(state) == remove_module_prefix(state)


def test_nothing_that_was_given_is_changed():
    state = DataParallel(net()).state_dict()
    keys, metadata = list(state), dict(state._metadata)
    for function in FUNCTIONS:
        function(state)
    assert (list(state), dict(state._metadata)) == (keys, metadata)


def test_versions_of_layers_go_with_the_keys():
    # BatchNorm reads its version there: without one, it takes a state of today for one of before PyTorch 0.4.1.
    plain, wrapped = net().state_dict(), DataParallel(net()).state_dict()
    assert remove_module_prefix(wrapped)._metadata == plain._metadata
    added = add_module_prefix(plain)._metadata
    assert added == {path: entry for path, entry in wrapped._metadata.items() if path}
    assert add_module_prefix(wrapped)._metadata == wrapped._metadata
    assert remove_module_prefix(plain)._metadata == plain._metadata
    assert normalize_state_dict(wrapped, remove_prefix=False)._metadata == wrapped._metadata


def test_versions_of_a_mixed_state_dict_go_with_their_own_keys():
    state = OrderedDict({"module.w": 1, "head.w": 2})
    state._metadata = OrderedDict({"": {"version": 1}, "module": {"version": 2}, "head": {"version": 3}})
    assert remove_module_prefix(state)._metadata == {"": {"version": 2}, "head": {"version": 3}}
    assert add_module_prefix(state)._metadata == {"": {"version": 1}, "module": {"version": 2}, "module.head": {"version": 3}}


@given(STATES)
def test_what_comes_back_has_every_value_in_order_or_nothing_comes_back(state):
    for function in FUNCTIONS:
        try:
            renamed = function(state)
        except CheckpointMismatchError:
            continue
        assert list(renamed.values()) == list(state.values())


@given(STATES)
def test_removing_undoes_adding_where_no_key_had_the_prefix(state):
    plain = {key: value for key, value in state.items() if not key.startswith("module.")}
    assert list(remove_module_prefix(add_module_prefix(plain)).items()) == list(plain.items())


@given(STATES)
def test_adding_twice_is_adding_once(state):
    try:
        once = add_module_prefix(state)
    except CheckpointMismatchError:
        return
    assert add_module_prefix(once) == once


def test_they_are_public():
    assert {"add_module_prefix", "remove_module_prefix", "normalize_state_dict"} <= set(hpcckpt.__all__)
