"""Which requests may share a batch although their versions differ, and whether that pays.

A family is the versions of one program and layout that this worker has bound.  For each form of their
requests the program is recorded in the helper thread (`engines/mixed.py`), for a few sizes.  A size is
used only after trials on requests that really came: the mixed answer must be equal to what each version
gives alone, and come sooner.

A form:  NEW -> ASKED -> KNOWN, with a size each:  TRIAL -> ON    [TRIALS times equal, faster when full]
                      -> OFF                       TRIAL -> OFF   [not equal, slower, or it raised]
                                                   ON    -> OFF   [it raised]

What a size costs hardly depends on how many share it, and alone everybody costs the same.  So trials
with whatever number came tell both, and from which number on the size pays.  They leave out what a
batch costs besides, which is in favour of mixing.

Invariants
 1. A mixed batch is answered only at a size that is ON; in a trial everybody is answered by their own
    version.
 2. What goes wrong with mixing turns mixing off, and costs no request.
 3. Requests that share a batch have the same form (the batcher's business).

Called by the batcher (`room`) and the runner; the results of the helper come through the worker's loop.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np

from overcommit.runtime.config import KIB
from overcommit.runtime.helper import Helper
from overcommit.runtime.signature import Form, Signature

log = logging.getLogger("overcommit.worker")

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]

FORMS_MAX: Final = 8  # of one family; a recording keeps its inputs
REQUEST_BYTES_MAX: Final = 64 * KIB
TRIALS: Final = 6  # the best of each counts: the first ones find nothing in the cache
GAIN_MIN: Final = 1.2  # a full one must be so many times as fast as one after the other
# What a sum may differ by when it is added up in another order.
RELATIVE: Final = {"FP64": 1e-9, "FP32": 1e-5, "FP16": 2e-3}


class Recording(Protocol):
    """A program, recorded for `size` requests of one form."""

    size: int

    def run(self, addresses: Sequence[int], inputs: Mapping[str, Array]) -> Arrays:
        """Run at most `size` requests, of the versions whose weights lie there; rows in and out."""
        ...


class Mixable(Protocol):
    """What records a program over several versions."""

    def trace(self, shapes: Shapes) -> Sequence[Recording]:
        """Record it for requests of these datatypes and shapes, by ascending size.  Slow."""
        ...


class Sized:
    """One size of one form."""

    __slots__ = ("alone_ns", "is_on", "least", "mixed_ns", "recording", "trials")

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.is_on = False
        self.trials = TRIALS  # that are left
        self.least = 2  # requests for which it pays
        self.mixed_ns = math.inf  # of all together
        self.alone_ns = math.inf  # of one request

    def note(self, mixed_ns: int, alone_ns: int, count: int) -> None:
        """Take note of a trial with so many requests: TRIAL -> TRIAL, ON or OFF."""
        self.mixed_ns = min(self.mixed_ns, mixed_ns)
        self.alone_ns = min(self.alone_ns, alone_ns / count)
        self.trials -= 1
        if not self.trials:
            self.least = max(2, math.ceil(self.mixed_ns / self.alone_ns))
            self.is_on = GAIN_MIN * self.mixed_ns <= self.recording.size * self.alone_ns


class _FormState:
    __slots__ = ("room", "sizes")

    def __init__(self) -> None:
        self.sizes: list[Sized] = []
        self.room = 1


class Family:
    """Versions that may share batches; all have this signature."""

    def __init__(
        self,
        mixable: Mixable,
        signature: Signature,
        ask: Callable[[Family, Hashable, Shapes], None],
    ) -> None:
        self.mixable = mixable
        self.signature = signature
        self._ask = ask
        self._forms: dict[Hashable, _FormState] = {}

    def room(self, form: Form) -> int:
        """How many requests of this form a batch may hold now; 1 when they cannot share one (yet)."""
        key = form.shapes
        state = self._forms.get(key)
        if state is not None:
            return state.room
        if len(self._forms) < FORMS_MAX and form.row_bytes * form.rows <= REQUEST_BYTES_MAX:
            self._forms[key] = _FormState()
            inputs = self.signature.inputs
            places = [(inputs[place.index], place.shape) for place in form.places]
            self._ask(self, key, {spec.name: (spec.datatype, shape) for spec, shape in places})
        return 1

    def on_traced(self, key: Hashable, result: Sequence[Recording] | Exception) -> None:
        """The helper has recorded a form, or failed to."""
        if isinstance(result, Exception):
            log.info("a program is not batched across its versions: %s", result)
            return
        state = self._forms[key]
        state.sizes = [Sized(recording) for recording in result]
        self._settle(state)

    def pick(self, form: Form, count: int) -> Sized | None:
        """Return the size that runs so many requests; None: run each version alone."""
        state = self._forms.get(form.shapes)
        if state is None or count < 2:
            return None
        for sized in state.sizes:
            if sized.recording.size >= count:
                # One that is too slow is not replaced by a larger one, which is slower.
                is_used = count >= sized.least if sized.is_on else sized.trials
                return sized if is_used else None
        return None

    def turn_off(self, form: Form, sized: Sized, reason: str) -> None:
        """This size is not used any more."""
        log.warning("batches of %d across versions are given up: %s", sized.recording.size, reason)
        sized.is_on, sized.trials = False, 0
        self._settle(self._forms[form.shapes])

    # --- trials ---------------------------------------------------------------------------------
    def try_out(
        self,
        form: Form,
        sized: Sized,
        count: int,
        run_mixed: Callable[[], Arrays],
        run_alone: Callable[[], Sequence[Arrays]],
    ) -> None:
        """Run so many requests both ways and compare.  Raises what `run_alone` raises."""
        start_ns = time.perf_counter_ns()
        alone = run_alone()
        middle_ns = time.perf_counter_ns()
        try:
            mixed = run_mixed()
        except Exception as error:  # foreign code, recorded
            self.turn_off(form, sized, f"{type(error).__name__}: {error}")
            return
        times_ns = (time.perf_counter_ns() - middle_ns, middle_ns - start_ns)
        for spec in self.signature.outputs:
            expected = np.concatenate([arrays[spec.name] for arrays in alone])
            if not _is_equal(spec.datatype, mixed[spec.name], expected):
                self.turn_off(form, sized, f"output '{spec.name}' differs from each version's own")
                return
        sized.note(*times_ns, count)
        if not sized.trials:
            self._settle(self._forms[form.shapes])
            log.info(
                "batches of %d across versions take %.0f us, a request alone %.0f: %s",
                *(sized.recording.size, sized.mixed_ns / 1000, sized.alone_ns / 1000),
                f"on, from {sized.least} requests" if sized.is_on else "off",
            )

    @staticmethod
    def _settle(state: _FormState) -> None:
        usable = [s.recording.size for s in state.sizes if s.is_on or s.trials]
        state.room = max(usable, default=1)


def _is_equal(datatype: str, mixed: Array, expected: Array) -> bool:
    if mixed.shape != expected.shape or mixed.dtype != expected.dtype:
        return False
    if datatype == "BF16":
        mixed, expected = (
            (array.astype(np.uint32) << 16).view(np.float32) for array in (mixed, expected)
        )
    elif datatype not in RELATIVE:
        return np.array_equal(mixed, expected)
    relative = RELATIVE.get(datatype, 2e-2)
    finite = np.abs(expected[np.isfinite(expected)])
    largest = float(finite.max()) if finite.size else 0.0
    return np.allclose(mixed, expected, rtol=relative, atol=relative * largest, equal_nan=True)


class Families:
    """All families of a worker, and the helper thread that records for them."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._families: weakref.WeakValueDictionary[int, Family] = weakref.WeakValueDictionary()
        self._helper: Helper[tuple[Family, Hashable], Sequence[Recording]]
        self._helper = Helper("recorder", ring)

    def of(self, mixable: Mixable | None, signature: Signature) -> Family | None:
        """Return the family of the versions that share this; None for one that shares nothing."""
        if mixable is None:
            return None
        # The family keeps the program alive, and with it what its number stands for.
        family = self._families.get(id(mixable))
        if family is None:
            family = self._families[id(mixable)] = Family(mixable, signature, self._record)
        return family

    def close(self) -> None:
        """Nobody waits for recordings any more."""
        self._helper.close()

    def take_recorded(self) -> None:
        """Take what the helper has recorded."""
        while (done := self._helper.try_take()) is not None:
            (family, key), result = done
            family.on_traced(key, result)

    def _record(self, family: Family, key: Hashable, shapes: Shapes) -> None:
        self._helper.ask((family, key), lambda: family.mixable.trace(shapes))
