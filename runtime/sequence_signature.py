"""What the requests of a version with sequences must look like.

Invariants
 1. A request that is read belongs to a sequence that is known, or begins one.  It has one row, as its
    ask has.

Called by the worker when it takes a request, and by the batches of sequences.
"""

from __future__ import annotations

import time
from typing import Final

from overcommit.runtime.config import Control, ModelConfig
from overcommit.runtime.errors import BadRequest
from overcommit.runtime.sequence_terms import Ask, asked_of_workers, decode, key_problem
from overcommit.runtime.sequences import AskForm, Sequences
from overcommit.runtime.signature import Signature


class SequenceSignature(Signature):
    """The signature of one version, in one worker."""

    def __init__(self, config: ModelConfig, sequences: Sequences) -> None:
        super().__init__(asked_of_workers(config))
        assert config.sequence is not None, "a version with sequences"
        self._sequences: Final = sequences
        self._ask_at: Final = len(self.inputs) - 1
        self._key: Final[Control | None] = next(
            (each for each in config.sequence.controls if each.kind == "corrid"), None
        )

    def read(self, block: memoryview) -> AskForm:
        """Read and check a request.  Raises as `Signature.read`; BadRequest for one of no sequence."""
        form = super().read(block)
        place = form.places[-1]
        assert place.index == self._ask_at, "the ask is required"
        ask = decode(block[place.offset : place.offset + place.nbytes])
        self._check_ask(ask)
        return AskForm(form.places, form.rows, form.row_bytes, form.key, form.sizes, form.end, ask)

    def _check_ask(self, ask: Ask) -> None:
        self._sequences.check(ask, time.monotonic_ns())
        problem = None if self._key is None else key_problem(self._key, ask.key)
        if problem is not None:
            raise BadRequest(problem)
