"""Nested lists of numbers in JSON, without making the lists.

Numbers hold neither brackets nor commas, so that the text's own say how it is nested.  What is left
when everything else is taken away is compared with what the shape would write: a nesting that is not
the shape's costs one pass over the text, and one that is makes no list for each row.

Pure.  Called by the codec; raises BadRequest.
"""

from __future__ import annotations

from typing import Final

from overcommit.runtime.errors import BadRequest

_BESIDE_NESTING: Final = bytes(set(range(256)) - set(b"[],"))
_SPACE: Final = b" \t\n\r"
_BLANK: Final = bytes.maketrans(b"[]", b"  ")


def flatten(text: bytes, shape: tuple[int, ...]) -> bytes:
    """Return the text of a flat list of the same numbers, which the caller decodes.

    Valid JSON that is not nested as `shape` (two dimensions or more) raises BadRequest, as does
    everything whose numbers stand elsewhere than in the innermost lists.
    """
    nesting = text.translate(None, _BESIDE_NESTING)
    if not _is_nesting(nesting, shape):
        raise BadRequest(f"nested data does not have the shape {list(shape)}")
    flat = text.translate(None, _SPACE)
    if 0 in shape and flat == nesting:
        return b"[]"
    depth = len(shape)
    for level in range(depth - 1, 0, -1):
        flat = flat.replace(b"]" * level + b"," + b"[" * level, b",")
    inner = flat.removeprefix(b"[" * depth).removesuffix(b"]" * depth)
    if 0 in shape or b"[" in inner or b"]" in inner:
        raise BadRequest("nested data has values beside its innermost lists")
    # Of the text as it came: without its spaces, "1 2" would be a number.
    return b"[" + text.translate(_BLANK) + b"]"


def _is_nesting(nesting: bytes, shape: tuple[int, ...]) -> bool:
    length = 0
    for size in reversed(shape):
        length = 2 + size * length + max(size - 1, 0)
    if length != len(nesting):
        return False  # before memory is taken for what a shape may ask for
    wanted = b""
    for size in reversed(shape):
        wanted = b"[" + b",".join([wanted] * size) + b"]"
    return nesting == wanted
