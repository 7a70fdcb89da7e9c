"""Requests that differ in their numbers alone.

A client sends the same JSON with other numbers, again and again: `{"inputs":[{...,"data":[` numbers
`]}],...}`.  What stands around the numbers is kept as a `Template`, found by the bytes before the
first of them; reading a request is then cutting the numbers out, and decoding them.

Invariants
 1. A template reads a body only if every byte outside the numbers is as it was when the template was
    made, and what it cuts out is a flat list of as many numbers as there were.
 2. A template is kept only after the general way of reading has read a probe, made of the same
    literals and other numbers, as the template does: the lists that it cuts out are the data of the
    inputs, in their order, and nothing else in the body depends on them.
 3. At most TEMPLATES_MAX are kept for the routes of one shape, none with more than LITERAL_BYTES_MAX
    around the numbers.

Pure; called by `inference`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from overcommit.server import codec
from overcommit.server.limits import LITERAL_BYTES_MAX, TEMPLATES_MAX

Read = Callable[
    [bytes], Sequence[bytes | memoryview] | None
]  # a body's tensors; None: it is refused

_MARK: Final = b'"data":'
_FLOATS: Final = msgspec.json.Decoder(list[float]).decode
_INTEGERS: Final = msgspec.json.Decoder(list[int]).decode
_PROBE_BASE: Final = 3  # fits every datatype, with what is added to it


@dataclass(slots=True, frozen=True)
class _Numbers:
    """One input's list, and the bytes that follow it."""

    decode: Callable[[bytes], list[float] | list[int]]
    pack: Callable[..., bytes]
    count: int
    after: bytes


class Template:
    """The literals of a request, with a list of numbers after each but the last."""

    __slots__ = ("_lists", "prefix")

    def __init__(self, prefix: bytes, lists: Sequence[_Numbers]) -> None:
        self.prefix = prefix
        self._lists = tuple(lists)

    def read(self, body: bytes) -> list[bytes] | None:
        """Return the tensors of a body that begins with the prefix; None when it is another's."""
        at = len(self.prefix)
        tensors: list[bytes] = []
        try:
            for numbers in self._lists:
                end = body.find(b"]", at) + 1
                values = numbers.decode(body[at:end])
                if len(values) != numbers.count:
                    return None
                tensors.append(numbers.pack(*values))
                at = end + len(numbers.after)
                if body[end:at] != numbers.after:
                    return None
        except (msgspec.MsgspecError, UnicodeDecodeError, struct.error, OverflowError):
            return None
        return tensors if at == len(body) else None

    def probe(self) -> bytes:
        """Return a body with other numbers, small and all different in a list of up to 100."""
        pieces = [self.prefix]
        for which, numbers in enumerate(self._lists):
            values = [_PROBE_BASE + which + index % 100 for index in range(numbers.count)]
            pieces += (msgspec.json.encode(values), numbers.after)
        return b"".join(pieces)


def _make(body: bytes, datatypes: Sequence[str], counts: Sequence[int]) -> Template | None:
    """Cut a body at its lists, on the guess that each follows the next `"data":`."""
    starts: list[int] = []
    ends = [0]
    for _ in datatypes:
        start = body.find(_MARK, ends[-1]) + len(_MARK)
        end = body.find(b"]", start) + 1
        if start < len(_MARK) or not end:
            return None
        starts.append(start)
        ends.append(end)
    literals = [body[end:start] for end, start in zip(ends, (*starts, len(body)), strict=True)]
    if sum(map(len, literals)) > LITERAL_BYTES_MAX:
        return None
    lists = []
    for datatype, count, after in zip(datatypes, counts, literals[1:], strict=True):
        code = codec.CODES.get(datatype)  # what is written as anything but plain numbers has none
        if code is None or not count:
            return None
        decode = _FLOATS if code in "fd" else _INTEGERS
        lists.append(_Numbers(decode, struct.Struct(f"<{count}{code}").pack, count, after))
    return Template(literals[0], lists)


class Templates:
    """The templates of all routes that take the same inputs, by what comes before the numbers."""

    __slots__ = ("_by_prefix", "_seen")

    def __init__(self) -> None:
        self._by_prefix: dict[bytes, Template] = {}
        self._seen: dict[bytes, int] = {}  # how often `learn` was asked about a prefix

    def __len__(self) -> int:
        return len(self._by_prefix)

    def find(self, body: bytes) -> Template | None:
        """Return the template that may read this body."""
        return self._by_prefix.get(body[: body.find(_MARK) + len(_MARK)])

    def learn(
        self, body: bytes, datatypes: Sequence[str], counts: Sequence[int], read: Read
    ) -> None:
        """Make a template of a body that was accepted; `read` is the general way of reading one.

        Only when its prefix comes for the second time: what never comes again costs nothing.
        """
        prefix = body[: body.find(_MARK) + len(_MARK)]
        if len(prefix) > LITERAL_BYTES_MAX:
            return
        if len(self._seen) >= TEMPLATES_MAX:
            self._seen.clear()
            self._by_prefix.clear()
        seen = self._seen[prefix] = self._seen.get(prefix, 0) + 1
        if seen != 2:
            return
        template = _make(body, datatypes, counts)
        if template is None:
            return
        for text in (body, template.probe()):
            tensors = template.read(text)
            if tensors is None or read(text) != tensors:
                return
        self._by_prefix[prefix] = template
