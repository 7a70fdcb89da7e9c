"""What makes an ensemble runnable: its steps hand tensors on, from its inputs to its outputs.

An ensemble has no weights and no program: its `steps` are models of the repository, and each tensor
has a name.  A step runs when the tensors are there that it takes; what it gives has names in turn.

Invariants, of what `check` lets pass
 1. Every tensor comes from one place: an input of the ensemble, or an output of one step.
 2. Steps can be put in an order in which each takes only what came before; so a run ends.
 3. Every output of the ensemble is a tensor that something gives.

Pure.  Called by the repository scan.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from overcommit.runtime import reshape
from overcommit.runtime.config import ModelConfig, Step
from overcommit.runtime.errors import RepositoryError

ENGINE: Final = "ensemble"


def check(config: ModelConfig) -> None:
    """Raise RepositoryError when the steps cannot be run, naming the tensor or the step."""
    if not config.steps:
        if config.engine == ENGINE:
            raise RepositoryError("an ensemble has steps; add [[ensemble.step]]")
        return
    if config.engine not in (None, ENGINE):
        raise RepositoryError(
            f"it has steps, and the engine '{config.engine}'; leave one of them out"
        )
    if not config.inputs or not config.outputs:
        raise RepositoryError(
            "an ensemble says its inputs and outputs; add [[input]] and [[output]]"
        )
    if reshape.has_any(config):
        raise RepositoryError(
            "an ensemble hands tensors on as they are; its steps may reshape them"
        )
    given = {spec.name for spec in config.inputs}
    for number, step in enumerate(config.steps):
        if not step.outputs:
            raise RepositoryError(f"{_title(number, step)} hands no output on")
        for tensor in step.outputs.values():
            if tensor in given:
                raise RepositoryError(
                    f"{_title(number, step)} gives the tensor '{tensor}', which is there already"
                )
            given.add(tensor)
    optional = {spec.name for spec in config.inputs if spec.optional}
    order(config.steps, {spec.name for spec in config.inputs})
    for spec in config.outputs:
        if spec.name not in given - optional:
            raise RepositoryError(f"no step gives the output '{spec.name}'")


def order(steps: Sequence[Step], inputs: Collection[str]) -> list[int]:
    """Return an order in which the steps can run, one after the other.

    Raises RepositoryError for steps that wait for each other, or for what nothing gives.
    """
    there = set(inputs)
    left = dict(enumerate(steps))
    ordered: list[int] = []
    while left:
        ready = [n for n, step in left.items() if there.issuperset(step.inputs.values())]
        if not ready:
            number, step = next(iter(left.items()))
            missing = sorted(set(step.inputs.values()) - there)[0]
            raise RepositoryError(
                f"{_title(number, step)} takes the tensor '{missing}', which nothing gives, or only "
                f"a step that waits for this one"
            )
        for number in ready:
            there.update(left.pop(number).outputs.values())
            ordered.append(number)
    return ordered


def _title(number: int, step: Step) -> str:
    return f"step {number + 1} (model '{step.model}')"
