"""Files in pieces that any broker takes, each with a hash of its own.

A manifest names a file by its length and SHA-256 and each chunk by the first 16 bytes of its
SHA-256, so that a wrong chunk is refused when it arrives and not when the file is whole.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

from protocol.errors import BadChunk

CHUNK_BYTES = 128 * 1024
"""Size of a chunk: within every broker's default packet limit (AWS IoT Core has 128 KiB)."""
MAX_CHUNKS = 4096


def split(data: bytes, chunk_bytes: int = CHUNK_BYTES) -> list[bytes]:
    """Cut a file into chunks; an empty file is one empty chunk.

    Raises:
        BadChunk: the file would need more than MAX_CHUNKS.
    """
    pieces = [data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes)] or [b""]
    if len(pieces) > MAX_CHUNKS:
        raise BadChunk(f"{len(data)} bytes need {len(pieces)} chunks, the limit is {MAX_CHUNKS}")
    return pieces


def chunk_count(total_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return how many chunks a file of this length has."""
    return max(1, -(-total_bytes // chunk_bytes))


def chunk_hash(chunk: bytes) -> str:
    """Return a chunk's hash as manifests write it: 16 bytes of SHA-256 in base64url (22 signs)."""
    return base64.urlsafe_b64encode(hashlib.sha256(chunk).digest()[:16]).rstrip(b"=").decode()


def file_hash(data: bytes) -> str:
    """Return the SHA-256 of a whole file in hex."""
    return hashlib.sha256(data).hexdigest()


def check_chunk(index: int, chunk: bytes, hashes: list[str], chunk_bytes: int, total: int) -> None:
    """Refuse a chunk that its manifest does not know.

    Raises:
        BadChunk: its index, length or hash differs from what was announced.
    """
    if not 0 <= index < len(hashes):
        raise BadChunk(f"chunk {index} of a file of {len(hashes)}")
    expected = min(chunk_bytes, total - index * chunk_bytes)
    if len(chunk) != expected:
        raise BadChunk(f"chunk {index} has {len(chunk)} bytes instead of {expected}")
    if chunk_hash(chunk) != hashes[index]:
        raise BadChunk(f"chunk {index} does not have the announced hash")


def assemble(chunks: Iterable[bytes], total: int, sha256: str) -> bytes:
    """Put a file together.

    Raises:
        BadChunk: the whole does not have the announced length and hash.
    """
    data = b"".join(chunks)
    check_file(data, total, sha256)
    return data


def check_file(data: bytes, total: int, sha256: str) -> None:
    """Refuse a file that is not what its manifest says.

    Raises:
        BadChunk: it does not have the announced length and hash.
    """
    if len(data) != total or file_hash(data) != sha256:
        raise BadChunk("the assembled file does not have the announced length and hash")
