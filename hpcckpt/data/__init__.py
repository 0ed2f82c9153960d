"""Data loading that knows where in the epoch it is."""

from hpcckpt.data.loader import Cursor, make_loader
from hpcckpt.data.loops import Loops
from hpcckpt.data.plan import EpochPlan

__all__ = ["Cursor", "EpochPlan", "Loops", "make_loader"]
