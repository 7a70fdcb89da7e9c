"""The CPU path of `digest`."""

from _typeshed import ReadableBuffer

def digest(data: ReadableBuffer, first: int, /) -> int:
    """Return the digest of C-contiguous memory whose first word has this number.  Releases the GIL."""
