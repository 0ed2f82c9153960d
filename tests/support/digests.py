"""The digest of a file as docs/reference/format.md describes it, written down a second time."""

import xxhash

_BLOCK_BYTES = 16 * 1024 * 1024


def digest_of(data: bytes) -> str:
    blocks = [data[start : start + _BLOCK_BYTES] for start in range(0, len(data), _BLOCK_BYTES)]
    return "xxh3-16m:" + xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(block) for block in blocks))
