"""How the samples of one epoch fall into batches and onto ranks. Pure arithmetic.

The epoch is one order of all samples, the same on every rank. A *global batch* is the next stretch of that order, split
evenly over the ranks. So a position in the epoch is a single number, samples consumed, and means the same for any
number of ranks.

Every rank must get a batch each time (DDP waits for all of them), and every sample must be seen once. So where fewer
samples than ranks are left over at the end, the batch before gives some of its own away; only when fewer samples than
ranks are left in all (after a change of the world size, say) do ranks see some of them twice.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochPlan:
    """The batches of an epoch of `num_samples` behind its first `start` samples.

    `batch_size` is per rank. With `drop_last` an incomplete global batch at the end is left out.
    """

    num_samples: int
    world_size: int
    batch_size: int
    start: int = 0
    drop_last: bool = False

    @property
    def num_batches(self) -> int:
        """How many batches each rank gets."""
        full, tail = divmod(self.num_samples - self.start, self.world_size * self.batch_size)
        if tail == 0 or self.drop_last or (self._lends(full, tail) and self.batch_size == 1):
            return full
        return full + 1

    def bounds(self, batch: int) -> tuple[int, int]:
        """Return where global batch number `batch` (0 is the first behind `start`) begins and ends in the order."""
        size = self.world_size * self.batch_size
        low, high = self.start + batch * size, min(self.start + (batch + 1) * size, self.num_samples)
        full, tail = divmod(self.num_samples - self.start, size)
        if self.drop_last or not self._lends(full, tail):
            return low, high
        if self.batch_size == 1:  # nothing to give away: the last batch takes what is left over
            return low, self.num_samples if batch == full - 1 else high
        last = self.num_samples - self.world_size
        if batch == full - 1:
            return low, last
        return (last, self.num_samples) if batch == full else (low, high)

    def share(self, batch: int, rank: int) -> range:
        """Return the positions in the order that `rank` gets of global batch `batch`; never empty."""
        low, high = self.bounds(batch)
        size, larger = divmod(high - low, self.world_size)
        if size == 0 and rank >= larger:
            return range(low + rank % larger, low + rank % larger + 1)
        begin = low + rank * size + min(rank, larger)
        return range(begin, begin + size + (rank < larger))

    def _lends(self, full: int, tail: int) -> bool:
        return full > 0 and 0 < tail < self.world_size
