"""Data loading that knows where in the epoch it is."""

from hpcckpt.data.loader import BatchSize, Share, make_loader
from hpcckpt.data.loops import Loops
from hpcckpt.data.place import Loop, Place
from hpcckpt.data.plan import EpochPlan
from hpcckpt.data.stream import STATES

__all__ = ["STATES", "BatchSize", "EpochPlan", "Loop", "Loops", "Place", "Share", "make_loader"]
