"""Where the bytes of a load lie in the arenas, as they are mapped in this process.

Called by `loading`, in the mover.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

from overcommit.runtime.errors import ImageError
from overcommit.runtime.image_file import Span
from overcommit.runtime.messages import Extents


@dataclass(slots=True, frozen=True)
class Base:
    """An arena as it is mapped here."""

    name: str
    address: int
    nbytes: int


class Places:
    """Where the bytes of one image lie in one arena."""

    def __init__(self, base: Base | None, extents: Extents, nbytes: int) -> None:
        """Raise ImageError for extents that leave the arena or are too short for the image."""
        if base is None:
            raise ImageError("the load names an arena that this server does not have")
        for offset, length in extents:
            if offset < 0 or length <= 0 or offset + length > base.nbytes:
                raise ImageError(
                    f"extent ({offset}, {length}) is not inside the {base.name} arena "
                    f"of {base.nbytes} bytes"
                )
        self._base = base.address
        self._extents = extents
        # _ends[i]: how many bytes of the image the extents up to and with i hold.
        self._ends = list(itertools.accumulate(length for _, length in extents))
        if not extents or self._ends[-1] < nbytes:
            raise ImageError(f"the {base.name} extents are too short for {nbytes} bytes")

    def spans(self, start: int, nbytes: int) -> list[Span]:
        """Return (address, length) of what holds bytes [start, start + nbytes) of the image.

        What lies side by side comes as one: chunks mostly do.
        """
        spans: list[Span] = []
        index = bisect.bisect_right(self._ends, start)
        while nbytes:
            offset, length = self._extents[index]
            inside = start - (self._ends[index] - length)
            part = min(nbytes, length - inside)
            at = self._base + offset + inside
            if spans and sum(spans[-1]) == at:
                spans[-1] = (spans[-1][0], spans[-1][1] + part)
            else:
                spans.append((at, part))
            start, nbytes, index = start + part, nbytes - part, index + 1
        return spans
