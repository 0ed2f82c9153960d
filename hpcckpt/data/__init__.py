"""Data loading that knows where in the epoch it is."""

from hpcckpt.data.loader import BatchSize, Share, make_loader
from hpcckpt.data.loops import CUT, Loops
from hpcckpt.data.plan import EpochPlan
from hpcckpt.data.stream import STATES

__all__ = ["CUT", "STATES", "BatchSize", "EpochPlan", "Loops", "Share", "make_loader"]
