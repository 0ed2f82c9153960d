"""What tells a file's bytes from any other bytes: a tree of XXH3, so that parts can be hashed apart, by threads or by ranks.

XXH3 finds damage, as SHA-256 did in earlier versions, at ten times its speed; neither finds a forger who may write the manifest, too.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import xxhash

# A leaf of the tree.
BLOCK_BYTES: Final = 16 * 1024 * 1024
# What a leaf is hashed with.
Leaf: Final = xxhash.xxh3_128


class Digest(Protocol):
    """The digest of what was given so far."""

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""

    def text(self) -> str:
        """Return the digest with its algorithm, as manifests have it."""


class Blocks:
    """The digest of this version: XXH3-128 of the XXH3-128 of each block of 16 MiB (https://xxhash.com)."""

    algorithm: Final = "xxh3-16m"

    def __init__(self) -> None:
        self._tree = xxhash.xxh3_128()
        self._block = Leaf()
        self._filled_bytes = 0

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""
        while data:
            part = data[: BLOCK_BYTES - self._filled_bytes]
            self._block.update(part)
            self._filled_bytes += len(part)
            if self._filled_bytes == BLOCK_BYTES:
                self._tree.update(self._block.digest())
                self._block.reset()
                self._filled_bytes = 0
            data = data[len(part) :]

    def append(self, leaves: Iterable[bytes]) -> None:
        """Take in the next blocks by their digests, whoever hashed them; only the last block of all may be smaller than others."""
        if self._filled_bytes:
            raise ValueError("a block is not complete; leaves can be appended behind whole blocks only")
        for leaf in leaves:
            self._tree.update(leaf)

    def text(self) -> str:
        """Return the digest with its algorithm, as manifests have it."""
        tree = self._tree.copy()
        if self._filled_bytes:
            tree.update(self._block.digest())
        return f"{self.algorithm}:{tree.hexdigest()}"


class Whole:
    """The digest of earlier versions: SHA-256 of the whole file."""

    algorithm: Final = "sha256"

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""
        self._hash.update(data)

    def text(self) -> str:
        """Return the digest with its algorithm, as manifests have it."""
        return f"{self.algorithm}:{self._hash.hexdigest()}"


_ALGORITHMS: dict[str, Callable[[], Digest]] = {Blocks.algorithm: Blocks, Whole.algorithm: Whole}


def is_known(digest: str) -> bool:
    """Return whether the algorithm of a digest is known here."""
    return digest.partition(":")[0] in _ALGORITHMS


def begun_like(digest: str) -> Digest:
    """Return an empty digest of the algorithm of another one; of this version's where that is not known."""
    return _ALGORITHMS.get(digest.partition(":")[0], Blocks)()
