"""NaN and the infinities in JSON, which has no words for them.

Triton reads and writes `NaN`, `Infinity` and `-Infinity` (and reads `Inf`), as do Python's JSON and with it
tritonclient; so do we.  Both ways are a second try: a request is looked through when it was found to be
no JSON, and an answer when an encoder wrote `null`, which would be NaN for some clients and 0 for others.

Pure; called by the codec.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, Final, Literal

import numpy as np

from overcommit.runtime.errors import BadRequest
from overcommit.server.limits import SPECIAL_STRINGS_MAX

# As they stand in data that was quoted; `float` reads each of them.
Number = float | Literal["NaN", "Inf", "-Inf"]

LETTER_OF_NULL: Final = ord("n")  # is in no number, neither in true nor in false
# One that does not end matches too: else each quote would be tried up to the end.
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_QUOTED: Final = (
    *((b"Infinity", b"Inf"), (b"Inf", b'"Inf"'), (b'-"Inf"', b'"-Inf"')),
    *((b"NaN", b'"NaN"'), (b'-"NaN"', b'"NaN"')),
)


def quote(text: bytes) -> bytes | None:
    """Write those of a text that is no JSON as strings; None where it has none.

    Raises BadRequest for a text with too many strings to look between.
    """
    if b"NaN" not in text and b"Inf" not in text:
        return None
    if text.count(b'"') > 2 * SPECIAL_STRINGS_MAX:
        raise BadRequest(
            f"NaN or Infinity in a JSON of over {SPECIAL_STRINGS_MAX} strings; send the tensors in "
            f"binary form"
        )
    pieces: list[bytes] = []
    at = 0
    for string in _STRING.finditer(text):
        pieces += (_quote(text[at : string.start()]), string[0])
        at = string.end()
    quoted = b"".join((*pieces, _quote(text[at:])))
    return quoted if quoted != text else None


def _quote(text: bytes) -> bytes:
    """Quote them in a text without strings."""
    for old, new in _QUOTED:
        text = text.replace(old, new)
    return text


def name(text: bytes, numbers: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    """Write them into the JSON of a flat list of these numbers, where it says `null`."""
    values = numbers[~np.isfinite(numbers)].tolist()
    names = [b"NaN" if v != v else b"Infinity" if v > 0 else b"-Infinity" for v in values]
    pieces = zip(text.split(b"null"), (*names, b""), strict=True)
    return b"".join(itertools.chain.from_iterable(pieces))
