"""Whether an ensemble can be asked: its steps' models are there, and their tensors fit each other.

`ensemble` says whether steps can run at all, from the ensemble's own file; this says it of the models that
their names mean now.

    ready     every step's model serves
    waits     as far as is known, but the image of one is being made
    missing   a step's model or version is not there, or was unloaded
    broken    a step's model cannot be served, or tensors contradict each other

Invariants
 1. `broken` is said only of what would fail for every request: sizes that may vary fit, and so does
    what is not known yet.
 2. A reason names the ensemble, the step, its model, and what to do; of steps that are ensembles, all of
    them on the way.
 3. Each (version, depth) is looked at once, however many steps lead to it.

Pure: `Route` is what a version is for a front end, for the supervisor, and for who looks at folders alone.
Called by the routing table, by `ensemble_watch` and by `overcommit check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from overcommit.runtime.config import ENSEMBLE_DEPTH_MAX, Step, TensorSpec
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.misfits import fits

# What a step's model and version ("": what the name means) lead to; None: to nothing.
Find = Callable[[str, str], Route | None]


@dataclass(slots=True, frozen=True)
class Verdict:
    """What an ensemble is good for; `reason` is "" where it is ready."""

    fate: Literal["ready", "waits", "missing", "broken"]
    reason: str = ""

    @property
    def problem(self) -> str:
        """Why requests cannot be answered; "": they can, or will be."""
        return self.reason if self.fate in ("missing", "broken") else ""


READY: Final = Verdict("ready")


def verdict_of(ensemble: Route, find: Find) -> Verdict:
    """Say whether requests for this ensemble can be answered, by what `find` knows of its steps."""
    return _Look(find).at(ensemble, 1)


class _Look:
    def __init__(self, find: Find) -> None:
        self._find = find
        self._known: dict[tuple[int, int], Verdict] = {}  # by slot and depth
        self._around: list[int] = []  # ensembles that are being looked at

    def at(self, ensemble: Route, depth: int) -> Verdict:
        """Look at one ensemble, `depth` - 1 others around it."""
        key = (ensemble.slot, depth)
        if key in self._known:
            return self._known[key]
        if ensemble.slot in self._around:
            return Verdict(
                "broken",
                f"its steps lead back to ensemble '{ensemble.name}', in a circle; let one of them name "
                f"another model",
            )
        self._around.append(ensemble.slot)
        found = self._known[key] = self._at(ensemble, depth)
        self._around.pop()
        return found

    def _at(self, ensemble: Route, depth: int) -> Verdict:
        if depth > ENSEMBLE_DEPTH_MAX:
            return Verdict(
                "broken",
                f"ensembles are nested more than {ENSEMBLE_DEPTH_MAX} deep here; put the steps of one into "
                f"another",
            )
        models: list[Route] = []
        waiting = READY
        for number, step in enumerate(ensemble.steps):
            where = _where(ensemble, number)
            model = self._find(step.model, step.version)
            verdict = _of_model(step, model)
            if model is not None and verdict.fate == "ready" and model.steps:
                verdict = self.at(model, depth + 1)
            if verdict.problem:
                return Verdict(verdict.fate, f"{where}: {verdict.reason}")
            if verdict.fate == "waits" and waiting is READY:
                waiting = Verdict("waits", f"{where}: {verdict.reason}")
            assert model is not None, "what is not there is missing"
            models.append(model)
        for problem in _contradictions(ensemble, models):
            return Verdict("broken", problem)
        return waiting


def _where(ensemble: Route, number: int) -> str:
    model = ensemble.steps[number].model
    return f"ensemble '{ensemble.name}', step {number + 1} (model '{model}')"


def _of_model(step: Step, model: Route | None) -> Verdict:
    if model is None:
        what = f"version {step.version}" if step.version else "model of this name"
        return Verdict(
            "missing",
            f"there is no {what}: put it into the repository, or let the step name what is there",
        )
    if model.state == "unloaded":
        return Verdict(
            "missing",
            f"it is unloaded: POST /v2/repository/models/{model.name}/load brings it back",
        )
    if model.state == "unavailable":
        return Verdict(
            "broken",
            f"its version {model.version} cannot be served, mend that and the ensemble is ready: "
            f"{model.reason}",
        )
    return READY if model.state == "ready" else Verdict("waits", "its image is being made")


# --- tensors ------------------------------------------------------------------------------------
def _contradictions(ensemble: Route, models: list[Route]) -> Iterator[str]:
    """Say what no request could get through.  `models`: of each step."""
    sources: dict[str, tuple[str, TensorSpec]] = {
        spec.name: (f"the ensemble's input '{spec.name}'", spec) for spec in ensemble.inputs
    }
    for number, (step, model) in enumerate(zip(ensemble.steps, models, strict=True)):
        where = _where(ensemble, number)
        yield from _names(where, step, model)
        given = {spec.name: spec for spec in model.outputs}
        for name, tensor in step.outputs.items():
            if name in given:
                sources[tensor] = (f"output '{name}' of step {number + 1}", given[name])
    for number, (step, model) in enumerate(zip(ensemble.steps, models, strict=True)):
        taken = {spec.name: spec for spec in model.inputs}
        for name, tensor in step.inputs.items():
            spec = next(iter(model.inputs)) if _adapts(model) else taken.get(name)
            if tensor not in sources or spec is None:
                continue
            title, source = sources[tensor]
            if problem := _misfit(source, spec, model):
                yield (
                    f"{_where(ensemble, number)}: {title} is {_shown(source)}, its input '{name}' "
                    f"{problem}: map another tensor to it, or change one of the models"
                )
    for spec in ensemble.outputs:
        if spec.name in sources:
            title, source = sources[spec.name]
            if source.datatype != spec.datatype or not _may_fit(source, spec):
                yield (
                    f"ensemble '{ensemble.name}': {title} is {_shown(source)}, its output "
                    f"'{spec.name}' is {spec.datatype} {list(spec.shape)}: correct the output in the "
                    f"ensemble's configuration, or map another tensor to it"
                )


def _names(where: str, step: Step, model: Route) -> Iterator[str]:
    """What a step feeds and takes that its model does not have, or has and needs."""
    remedy = "correct the step's maps in the ensemble's configuration"
    inputs = {spec.name: spec for spec in model.inputs}
    if inputs and not _adapts(model):
        for name in step.inputs:
            if name not in inputs:
                yield f"{where}: it has no input '{name}', but {_list(inputs)}: {remedy}"
        for name, spec in inputs.items():
            if name not in step.inputs and not spec.optional:
                yield f"{where}: nothing is fed to its input '{name}': {remedy}"
    outputs = [spec.name for spec in model.outputs]
    for name in step.outputs if outputs else ():
        if name not in outputs:
            yield f"{where}: it has no output '{name}', but {_list(outputs)}: {remedy}"


def _misfit(source: TensorSpec, spec: TensorSpec, model: Route) -> str:
    """Say what an input takes that this tensor cannot be; "": it can."""
    shape, most = _shape(source), model.max_batch_size
    is_converted = _adapts(model) and source.datatype != "BYTES"
    if not (source.datatype == spec.datatype or is_converted) or not _may_fit(source, spec):
        return f"takes {spec.datatype} {list(spec.shape)}"
    if most and shape and shape[0] > most:
        return f"at most {most} rows (max_batch_size)"
    return ""


def _may_fit(source: TensorSpec, spec: TensorSpec) -> bool:
    """Whether some tensor has both shapes; what a graph says with no axes may have any."""
    return not _shape(source) or fits(_shape(source), spec.shape)


def _adapts(model: Route) -> bool:
    return model.adapts and len(model.inputs) == 1


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """What a tensor is sure to be: what trials showed may be less than what its file allows."""
    return spec.declared or spec.shape


def _shown(spec: TensorSpec) -> str:
    return f"{spec.datatype} {list(_shape(spec))}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
