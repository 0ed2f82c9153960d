"""The batch sampler of a resumable loader: this rank's batches, from any place in the epoch on, at the cost of none."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from hpcckpt.data.order import Batch, Order, Orders
from hpcckpt.data.place import Place
from hpcckpt.data.plan import EpochPlan
from hpcckpt.errors import CheckpointMismatchError, UsageError
from hpcckpt.state.rng import derive_seed


class Cursor(Place):
    """Gives a map-style DataLoader its batches; the position is units (samples, or a batch sampler's batches) over all ranks.

    The order depends on seed, epoch and loader number only. It yields batches ahead of the training: workers prefetch.
    """

    def __init__(self, orders: Orders, *, batch_size: int, drop_last: bool, rank: int, world_size: int, seed: int, number: int) -> None:
        super().__init__(number)
        _refuse_too_few(orders.num_units, orders, world_size)
        self._orders = orders
        self._order: Order | None = None
        self._rank = rank
        self._seed = seed
        self._plan = EpochPlan(orders.num_units, world_size, batch_size, 0, drop_last)
        self._draws = 0
        self.generator = torch.Generator()

    def __len__(self) -> int:
        """Return the batches of a whole epoch, for schedulers and progress bars, wherever this one goes on."""
        return self._behind(0).num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches of indices, from the position on."""
        plan, order, draws = self._plan, self._order or self._made(), self._draws
        for batch in range(plan.num_batches):
            yield order.batch(plan.share(batch, self._rank), draws)

    @property
    def may_differ(self) -> bool:
        """As `Place.may_differ`: of a sampler nobody else can say whether it gives the same again."""
        return self._orders.may_vary

    def end(self, *, is_exhausted: bool = True) -> None:
        """As `Place.end`; the order's memory is given back, and whoever iterates without `run.batches` gets the whole of it."""
        super().end(is_exhausted=is_exhausted)
        self._order, self._plan = None, self._behind(0)

    def _enter(self, position: Mapping[str, Any] | None) -> None:
        # Workers' seeds come from here: the global generator must not depend on how often an epoch was begun.
        self.generator.manual_seed(self._seed_for("workers"))
        self._draws = self._seed_for("samples")
        self._order = self._made()
        _refuse_too_few(self._order.num_units, self._orders, self._plan.world_size)
        self.digest = self._order.digest() if self._orders.may_vary else None
        self._plan = replace(self._plan, num_samples=self._order.num_units, start=0)
        if position is not None:
            self._fit(position)
            self._plan = self._behind(position["consumed"])

    def _behind_step(self) -> dict[str, Any]:
        return self._at(self._plan.bounds(self._handed_out - 1)[1])

    def _over(self) -> dict[str, Any]:
        return self._at(self._plan.num_samples)

    def _is_end(self, position: Mapping[str, Any]) -> bool:
        return bool(position["is_over"]) or self._behind(position["consumed"]).num_batches == 0

    def _at(self, consumed: int) -> dict[str, Any]:
        order = {} if self.digest is None else {"order": self.digest}
        return {"consumed": consumed, "num_samples": self._plan.num_samples, **order}

    def _check(self, position: Mapping[str, Any]) -> None:
        if not self._orders.may_vary:
            self._fit(position)

    def _fit(self, position: Mapping[str, Any]) -> None:
        if position.get("num_samples") != self._plan.num_samples:
            now, then = self._plan.num_samples, position.get("num_samples", "an unknown number")
            raise CheckpointMismatchError(
                f"the dataset of loader {self.number} has {now} {self._orders.unit}, but had {then} "
                "when the epoch was interrupted: bring back the former data, or go on from the end of an epoch (resume.epoch=…)"
            )
        if self.digest is not None and position.get("order", self.digest) != self.digest:
            raise CheckpointMismatchError(
                f"the sampler of loader {self.number} gives another order than when the epoch was interrupted: let it draw from the "
                "global generators or from a torch.Generator called `generator`, or go on from the end of an epoch (resume.epoch=…)"
            )

    def _made(self) -> Order:
        return self._orders.of(self._seed_for("order"), max(self._epoch, 0))

    def _seed_for(self, purpose: str) -> int:
        return derive_seed(self._seed, purpose, self.number, max(self._epoch, 0))

    def _behind(self, start: int) -> EpochPlan:
        return replace(self._plan, start=start)


def _refuse_too_few(num_units: int, orders: Orders, world_size: int) -> None:
    if num_units < world_size:
        raise UsageError(f"run.loader: {num_units} {orders.unit} are too few for {world_size} ranks; ask for fewer tasks")
