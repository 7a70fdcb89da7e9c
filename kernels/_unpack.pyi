"""The CPU path of `unpack`: encoder and decoder of packed weights.  Both release the GIL."""

from typing import Final

from _typeshed import ReadableBuffer, WriteableBuffer

BLOCK_BYTES: Final[int]  # 65536, of raw bytes
STREAMS: Final[int]  # 128, of a block
CODE_BITS_MAX: Final[int]  # 11
GROUP_BLOCKS: Final[int]  # 32, which share their tables
ALIGN: Final[int]  # 16
GUARD_BYTES: Final[int]  # 16, at the end
# kinds of blocks
RAW: Final[int]
HALF: Final[int]  # numbers of 16 bits
FP32: Final[int]
ZEROS: Final[int]

def encode(data: ReadableBuffer, /) -> bytes:
    """Pack C-contiguous memory.  Raises ValueError for more than 64 GiB."""

def decode(packed: ReadableBuffer, out: WriteableBuffer, first: int, count: int, /) -> None:
    """Write `count` blocks from block `first` to `out`, which has just their length.

    Raises ValueError for what is not packed, blocks that are not there, a length that does not fit,
    and a block that is damaged so that it cannot be decoded.
    """
