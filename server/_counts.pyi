"""The table behind `tallies`; rows by slot, one entry for each size of batch."""

class Counts:
    """Counts of versions whose slots are below `slots`; a batch counts as `batch_unit`.

    Raises IndexError for another slot, OverflowError for a word over 64 bits.  Other numbers are cut to
    0 and 2^50.
    """

    def __new__(cls, slots: int, batch_unit: int, /) -> Counts: ...
    def __len__(self) -> int:
        """How many versions something was counted for."""

    def answer(
        self,
        slot: int,
        request_ns: int,
        queue_ns: int,
        compute_ns: int,
        batch_size: int,
        word: int,
        /,
    ) -> None:
        """Count an answer, and its batch if `word` (see `runtime/stages.py`) is not 0."""

    def batch(self, slot: int, compute_ns: int, batch_size: int, word: int, /) -> None:
        """Count a batch."""

    def failure(self, slot: int, request_ns: int, /) -> None:
        """Count a request that got no answer of its model."""

    def take(
        self,
    ) -> (
        tuple[
            int,
            tuple[int, int, int, int, int, int, int, int, int, int, int],
            list[tuple[int, int, int, int, int]],
        ]
        | None
    ):
        """Return one version's slot, numbers and batches, and forget them; None: that was all.

        The numbers are those of `ModelCounters`, in its order; a batch is rows, executions, and the
        time for input, inference and output.
        """
