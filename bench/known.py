"""A workload of a few fixed inputs whose right answers are known exactly.

Requests are rendered once per model and input and then sent again and again, so that drawing one is
a pop from a list, and an answer is compared byte by byte with one that was judged before.

Invariants
 1. An answer is right only if its values are those of its own model for its own input, to the bit
    (with a tolerance above zero: within it).
 2. A wrong answer that is another model's, or another input's, is named as that.

The workloads that are sent to more than one server derive from this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from overcommit.bench.dialect import JSON_CHARS_PER_VALUE, Array, Dialect, is_text
from overcommit.bench.popularity import Popularity, make_draws
from overcommit.bench.request import Request

_BLOCK: Final = 256  # requests drawn at once
_HEAD_BYTES: Final = 4096


class KnownWorkload:
    """See the module.  `expected(model number, input number)` is the right answer."""

    uses_ids = False

    def __init__(
        self,
        names: Sequence[str],
        inputs: Sequence[Array],
        expected: Callable[[int, int], Array],
        dialect: Dialect,
        popularity: Popularity,
        *,
        seed: int,
        part: int = 0,
        parts: int = 1,
        tolerance: float = 0.0,
    ) -> None:
        self.names = tuple(names)
        self.inputs = tuple(inputs)
        self.expected = expected
        self.dialect = dialect
        self._tolerance = tolerance
        self._models = make_draws(popularity, len(self.names), seed, part, parts)
        self._random = np.random.default_rng((seed, 1))
        self._requests: dict[tuple[int, int], Request] = {}
        self._block: list[Request] = []
        largest = max(array.size for array in self.inputs)
        self.answer_bytes_max = _HEAD_BYTES + largest * (
            JSON_CHARS_PER_VALUE if is_text(dialect) else np.float32().nbytes
        )

    def draw(self, request_id: bytes = b"") -> Request:
        """Return a request to a model by popularity, for a random input."""
        if not self._block:
            numbers = self._random.integers(len(self.inputs), size=_BLOCK).tolist()
            # Popped from the end, and the order of the models is the popularity's to say.
            self._block = [self.request(self._models.draw(), number) for number in numbers][::-1]
        return self._block.pop()

    def request(self, model: int, number: int) -> Request:
        """Return the request for a model and an input, always the same object."""
        request = self._requests.get((model, number))
        if request is None:
            name = self.names[model]
            payload = self.dialect.request(name, self.inputs[number])
            request = Request(payload, name, b"", model, number, is_repeated=True)
            self._requests[model, number] = request
        return request

    def judge(self, request: Request, headers: dict[bytes, bytes], body: bytes) -> str | None:
        """Compare with the model's own answer."""
        try:
            got = self.dialect.read(request.target, headers, body)
        except (ValueError, TypeError, KeyError, msgspec.MsgspecError) as error:
            return f"{request.target}: not an answer: {error!r}"
        expected = self.expected(request.variant, request.input)
        if got.size != expected.size:
            return f"{request.target}: {got.size} values instead of {expected.size}"
        if self._is_right(got, expected):
            return None
        return f"{request.target}: input {request.input}: {self._explain(request, got, expected)}"

    def _is_right(self, got: Array, expected: Array) -> bool:
        ours, theirs = expected.ravel(), got.ravel()
        if self._tolerance:
            return bool(np.all(np.abs(theirs - ours) <= self._tolerance))  # False for NaN too
        # As integers: NaN is equal to itself then, and 0.0 is not -0.0.
        return np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))

    def _explain(self, request: Request, got: Array, expected: Array) -> str:
        for model, name in enumerate(self.names):
            if model != request.variant and self._is_right(
                got, self.expected(model, request.input)
            ):
                return f"got the answer of {name}"
        for number in range(len(self.inputs)):
            other = self.expected(request.variant, number)
            if other.size == got.size and self._is_right(got, other):
                return f"got the answer to input {number}"
        wrong = np.flatnonzero(got.ravel() != expected.ravel())
        first = int(wrong[0]) if len(wrong) else 0
        return (
            f"{len(wrong)} of {got.size} values are wrong, the first is value {first}: "
            f"{got.ravel()[first]!r} instead of {expected.ravel()[first]!r}"
        )
