"""The tree of errors is the one that its docstring draws, and every error survives a process boundary."""

import builtins
import inspect
import pickle
import re

import pytest

from hpcckpt import errors

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value)]
LEAVES = [kind for kind in CLASSES if not kind.__subclasses__()]
NODE = re.compile(r"^ {4}(?P<branch>(?:[│ ] {3})*)[├└]── (?P<name>\w+)(?:\s+\((?P<builtin>\w+)\))?")


def drawn() -> dict[str, tuple[str, str | None]]:
    """Return parent and builtin of each error in the docstring's tree."""
    tree, path = {}, ["HpcckptError"]
    for line in (errors.__doc__ or "").splitlines():
        if match := NODE.match(line):
            depth = len(match["branch"]) // 4 + 1
            path[depth:] = [match["name"]]
            tree[match["name"]] = (path[depth - 1], match["builtin"])
    return tree


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_an_hpcckpt_error(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.HpcckptError)


@pytest.mark.parametrize("kind", LEAVES)
def test_every_leaf_is_also_a_builtin_that_says_more_than_exception(kind: type[Exception]) -> None:
    says_more = [base for base in kind.__mro__ if base.__module__ == "builtins" and base not in (Exception, BaseException, object)]
    assert says_more


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not errors.HpcckptError])
def test_the_docstring_draws_parent_and_builtin_of_every_error(kind: type[Exception]) -> None:
    parent, builtin = drawn()[kind.__name__]
    assert parent in [base.__name__ for base in kind.__bases__]
    beside = [base for base in kind.__bases__ if base.__module__ == "builtins"]
    assert beside == ([getattr(builtins, builtin)] if builtin else [])


def test_the_docstring_draws_no_error_that_is_not_there() -> None:
    assert drawn().keys() == {kind.__name__ for kind in CLASSES} - {"HpcckptError"}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_pickled_with_its_message(kind: type[Exception]) -> None:
    again = pickle.loads(pickle.dumps(kind("run/x: is gone; look elsewhere")))
    assert type(again) is kind
    assert str(again) == "run/x: is gone; look elsewhere"


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_a_sentence_of_its_own(kind: type[Exception]) -> None:
    assert (kind.__doc__ or "").endswith(".")
