"""What is saved: states of models as their training has them, by shape; nothing is trained, so numbers are random."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

State = dict[str, Any]
Shapes = Sequence[tuple[int, ...]]


def gpt2(*, width: int = 768, layers: int = 12) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of GPT-2's parameters (124 M; 355 M with 24 layers of width 1024)."""
    yield from [(50257, width), (1024, width)]
    for _ in range(layers):
        yield from [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        yield from [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    yield from [(width,), (width,)]


def resnet50() -> Iterator[tuple[int, ...]]:
    """Yield the shapes of ResNet-50's parameters (25.6 M)."""
    yield from [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            yield from [(width, inside, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            yield from [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                yield from [(4 * width, inside, 1, 1), (4 * width,), (4 * width,)]
            inside = 4 * width
    yield from [(1000, 2048), (1000,)]


def training_state(shapes: Iterator[tuple[int, ...]], moments: Sequence[str], *, steps: bool) -> State:
    """Return a model's and its optimizer's state.

    Args:
        shapes: of the parameters.
        moments: what the optimizer keeps of each parameter, in its shape.
        steps: whether it keeps the number of steps of each, as a tensor.
    """
    model = {f"layer{number}.weight": torch.randn(shape) for number, shape in enumerate(shapes)}
    kept = {
        number: {**({"step": torch.tensor(7.0)} if steps else {}), **{moment: torch.randn(value.shape) for moment in moments}}
        for number, value in enumerate(model.values())
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(kept)}]
    return {"model": model, "optimizer": {"state": kept, "param_groups": groups}, "step": 7}


def small(count: int, size_bytes: int) -> State:
    """Return many tensors of one size."""
    whole = torch.randn(count, size_bytes // 4)
    return {"model": {f"part{number}": row.clone() for number, row in enumerate(whole)}, "step": 7}


def tiny() -> Iterator[tuple[int, ...]]:
    """Yield the shapes of two linear layers."""
    yield from [(64, 32), (64,), (10, 64), (10,)]


ADAM = ("exp_avg", "exp_avg_sq")
STATES: dict[str, Callable[[], State]] = {
    "gpt2": lambda: training_state(gpt2(), ADAM, steps=True),
    "gpt2-medium": lambda: training_state(gpt2(width=1024, layers=24), ADAM, steps=True),
    "resnet50": lambda: training_state(resnet50(), ("momentum_buffer",), steps=False),
    "tiny": lambda: training_state(tiny(), ADAM, steps=True),
    "10000 x 1 KB": lambda: small(10_000, 1024),
    "100000 x 1 KB": lambda: small(100_000, 1024),
}
# The same bytes in ever more tensors, and ever more tensors of the same size.
GROWING: dict[str, Callable[[], State]] = {
    "10 x 100 MB": lambda: small(10, 100_000_000),
    "1000 x 1 MB": lambda: small(1_000, 1_000_000),
    "10000 x 100 KB": lambda: small(10_000, 100_000),
    "gpt2-medium": STATES["gpt2-medium"],
    "1000 x 1 KB": lambda: small(1_000, 1024),
    "10000 x 1 KB": STATES["10000 x 1 KB"],
    "100000 x 1 KB": STATES["100000 x 1 KB"],
}
# The least that a program tries when it has a minute.
QUICK_GROWING = ("1000 x 1 KB", "10000 x 1 KB")


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for item in state.values():
            yield from tensors_of(item)


def flat(state: State) -> dict[str, torch.Tensor]:
    """Return all tensors by name, for what knows nothing else."""
    found = {f"model.{name}": value for name, value in state["model"].items()}
    for number, kept in state.get("optimizer", {"state": {}})["state"].items():
        found |= {f"optimizer.{number}.{name}": value for name, value in kept.items()}
    return found


def size_bytes(state: State) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))
