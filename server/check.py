"""`overcommit check`: what of some repositories will be served, before anything starts.

Invariants
 1. Nothing is written, packed, imported from a model or run; files of weights are not read.
 2. Each model of the roots is in the result exactly once, whatever is wrong with it.
 3. A problem is why a version is not served; a fault, what is not as its files mean it where it is.

Called by the command line, in a process of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence

import msgspec

from overcommit.runtime import ensemble, model_files, sources
from overcommit.runtime.checkpoint_files import cut_off
from overcommit.runtime.config import VERSIONS_MAX, ModelConfig, Naming, TensorSpec, imaged
from overcommit.runtime.errors import ConfigurationError, OvercommitError
from overcommit.runtime.hints import hint_of
from overcommit.runtime.known_configs import KnownConfigs
from overcommit.runtime.misfits import misfits_of, missing_versions
from overcommit.runtime.mlserver_config import SERVER_FILE_NAME
from overcommit.runtime.model_toml import read_file
from overcommit.runtime.pack_index import PackIndex
from overcommit.runtime.packer_messages import Pack
from overcommit.runtime.repository import Folder, VersionSource, model_folders, scan_model
from overcommit.runtime.rollout import no_shares
from overcommit.runtime.sequence_terms import slots_of, visible_inputs, visible_outputs
from overcommit.server.check_steps import step_problems

COMPILERS = ("g++", "clang++")
_BROKEN = ModelConfig()
Progress = Callable[[int, int], None]


class VersionReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One version; `problem` "": it will be served, as far as files can tell."""

    version: str
    engine: str = ""
    nbytes: int = msgspec.field(default=0, name="bytes")  # of its image, or else of its files
    is_packed: bool = msgspec.field(default=False, name="packed")
    inputs: tuple[TensorSpec, ...] = ()  # (): known when it is packed
    outputs: tuple[TensorSpec, ...] = ()
    steps: tuple[str, ...] = ()  # models that an ensemble asks
    sequences: str = ""  # of a model with state: how many may be open in each worker
    problem: str = ""


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a repository."""

    name: str
    folder: str
    versions: tuple[VersionReport, ...]
    left_out: tuple[str, ...]  # versions that the version policy does not choose
    aliases: dict[str, str]
    ignored: tuple[str, ...]
    faults: tuple[str, ...] = ()  # it is served, but not as its files mean it

    @property
    def problems(self) -> list[tuple[str, str]]:
        """Version and reason of each that will not be served."""
        return [(each.version, each.problem) for each in self.versions if each.problem]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    models: tuple[ModelReport, ...]
    remarks: tuple[str, ...]

    def counts(self) -> tuple[int, int]:
        """Versions that will be served, and that will not."""
        bad = sum(len(model.problems) for model in self.models)
        return sum(len(model.versions) for model in self.models) - bad, bad

    def faults(self) -> int:
        """How much is wrong with what will be served."""
        return sum(len(model.faults) for model in self.models)


class Checker:
    """Looks at models; what it has read of equal files is kept."""

    def __init__(self, cache_dir: str | None, allow_code: bool) -> None:
        self._configs = KnownConfigs()
        self._indices: list[PackIndex] = []
        if cache_dir is not None:
            self._indices = [PackIndex(cache_dir, packs=packs) for packs in (False, True)]
        self._allow_code = allow_code
        self._found: dict[tuple[str, str], ModelConfig] = {}  # by name and version

    def check(
        self, roots: Sequence[str], on_progress: Progress = lambda done, total: None
    ) -> Report:
        """Look at every model.  Raises ConfigurationError when a root cannot be read."""
        try:
            folders = [(root, model_folders(root)) for root in map(os.path.realpath, roots)]
        except OSError as error:
            raise ConfigurationError(f"a repository cannot be read: {error}") from error
        total = sum(len(models) for _, models in folders)
        remarks: list[str] = []
        found: dict[str, ModelReport] = {}
        done = versions = 0
        for root, models in folders:
            if os.path.isfile(os.path.join(root, SERVER_FILE_NAME)):
                remarks.append(
                    f"{os.path.join(root, SERVER_FILE_NAME)}: the server is set up by flags "
                    f"(overcommit serve --help)"
                )
            if hint := hint_of(root):
                remarks.append(hint)
            for folder in models:
                done += 1
                on_progress(done, total)
                for report in self._models(root, folder):
                    if report.name in found:
                        other = found[report.name].folder
                        remarks.append(
                            f"{report.folder}: a model of this name is served from another place, {other}"
                        )
                        continue
                    found[report.name] = report
                    versions += len(report.versions)
        if versions > VERSIONS_MAX:
            remarks.append(
                f"{versions} versions, the limit is {VERSIONS_MAX}: the last are left out"
            )
        remarks += _clashes(found)
        return Report(models=self._with_steps(found), remarks=tuple(remarks))

    def _models(self, root: str, folder: Folder) -> Iterator[ModelReport]:
        """Report a folder's model; or those further down, where it holds such."""
        found = scan_model(root, folder, None, self._configs)
        if not found:
            yield self._model(folder.name, folder.path, [])
        for name, group in itertools.groupby(found, key=lambda source: source.name):
            versions = list(group)
            inner = versions[0].folder
            path = inner if os.path.basename(inner) == name else os.path.dirname(inner)
            is_inside = path.startswith(folder.path + os.sep) and os.path.basename(path) == name
            yield self._model(name, path if is_inside else folder.path, versions)

    def _model(self, name: str, path: str, versions: list[VersionSource]) -> ModelReport:
        served = [each for each in versions if not each.spare]
        reports = tuple(map(self._version, served))
        naming = next((v.config.naming for v in reversed(versions) if v.config is not None), None)
        return ModelReport(
            name=name,
            folder=os.fsencode(path).decode("utf-8", "backslashreplace"),
            versions=reports,
            left_out=tuple(each.version for each in versions if each.spare),
            aliases={} if naming is None else naming.aliases,
            ignored=(*self._ignored(path, served), *_lost_shares(naming, served)),
            faults=(*missing_versions(versions), *self._misfits(served, reports)),
        )

    def _misfits(
        self, versions: Sequence[VersionSource], reports: Sequence[VersionReport]
    ) -> Iterator[str]:
        """What does not fit the versions that are served."""
        for each, report in zip(versions, reports, strict=True):
            config = self._found.get((each.name, each.version))
            if config is not None:
                is_packed = report.is_packed
                for text in misfits_of(each.folder, config, each.config, is_packed=is_packed):
                    yield f"version {each.version}: {text}"

    def _with_steps(self, found: dict[str, ModelReport]) -> tuple[ModelReport, ...]:
        """Say of ensembles whether their steps let them be served."""
        aliases: dict[str, tuple[str, str]] = {}
        for name, model in found.items():
            for alias, version in model.aliases.items():
                aliases.setdefault(alias, (name, version))
        versions = (
            (name, each.version, self._found.get((name, each.version), _BROKEN), each.problem)
            for name, model in found.items()
            for each in model.versions
        )
        problems = step_problems(versions, aliases)
        for name in {name for name, _ in problems}:
            found[name] = msgspec.structs.replace(
                found[name],
                versions=tuple(
                    msgspec.structs.replace(
                        each, problem=problems.get((name, each.version), each.problem)
                    )
                    for each in found[name].versions
                ),
            )
        return tuple(found.values())

    def _version(self, source: VersionSource) -> VersionReport:
        if source.config is None:
            return VersionReport(version=source.version, problem=source.error or "it is broken")
        config = imaged(source.config)
        known = None
        for index in self._indices:
            known = known or index.take(source.folder, source.fingerprint, config)
        naming = source.config.naming
        whole = msgspec.structs.replace(config if known is None else known.config, naming=naming)
        self._found.setdefault((source.name, source.version), whole)
        if known is not None:
            return VersionReport(
                version=source.version,
                engine=known.engine,
                nbytes=known.nbytes,
                is_packed=True,
                inputs=visible_inputs(known.config),
                outputs=visible_outputs(known.config),
                sequences=_sequences(known.config),
            )
        if config.steps:
            return VersionReport(
                version=source.version,
                engine=ensemble.ENGINE,
                inputs=config.inputs,
                outputs=config.outputs,
                steps=tuple(step.model for step in config.steps),
            )
        engine, problem = config.engine or "", ""
        job = Pack(
            job=0,
            name=source.name,
            version=source.version,
            folder=source.folder,
            config=config,
            cache_dir="",
            allow_code=self._allow_code,
        )
        try:
            found = sources.find(job)
            engine = found.engine
            for path in (found.main, *found.weights):
                if not os.access(path, os.R_OK):
                    problem = f"{path} may not be read: give the server's user the right to"
                elif path.suffix == ".safetensors":
                    problem = cut_off(path) or problem
            is_code = found.kind in ("user", "python") or engine == "sklearn"
            is_code = is_code or found.main.suffix == ".aoti"
            if is_code and not (self._allow_code and config.allow_code):
                problem = (
                    "it brings its own code: served only if its model.toml says allow_code = true and "
                    "the server was started with --allow-code"
                )
            elif engine == "aoti" and not is_code and not any(map(shutil.which, COMPILERS)):
                problem = (
                    "it is compiled when it is packed, and there is no C++ compiler: install g++"
                )
        except OvercommitError as error:
            problem = error.message
        except OSError as error:
            problem = f"its folder cannot be read: {error.strerror or error}"
        return VersionReport(
            version=source.version,
            engine=engine,
            nbytes=sum(_sizes(source.folder)),
            inputs=visible_inputs(config),
            outputs=visible_outputs(config),
            sequences=_sequences(config),
            problem=problem,
        )

    def _ignored(self, model: str, versions: Sequence[VersionSource]) -> tuple[str, ...]:
        """What the files of these versions say that has no meaning here."""
        notes: dict[str, None] = {}
        for version in versions:
            files: list[tuple[str, bytes]] = []
            for name in model_files.RANKS:
                for folder in dict.fromkeys((model, version.folder)):
                    try:
                        files.append((name, read_file(os.path.join(folder, name))))
                    except (OSError, OvercommitError):
                        continue  # absent; or broken, which the version says
            with contextlib.suppress(OvercommitError):
                notes.update(dict.fromkeys(self._configs.read(files)[1]))
        return tuple(notes)


def _lost_shares(naming: Naming | None, versions: Sequence[VersionSource]) -> list[str]:
    """What a rollout says of versions whose requests are of sequences."""
    stateful = {
        v.version for v in versions if v.config is not None and v.config.sequence is not None
    }
    lost = [] if naming is None else [each for each in naming.weights if each in stateful]
    return [no_shares(lost)] if lost else []


def _sequences(config: ModelConfig) -> str:
    if config.sequence is None:
        return ""
    return f"{config.sequence.strategy}: {slots_of(config)} sequences"


def _clashes(found: dict[str, ModelReport]) -> Iterator[str]:
    """Aliases that mean nothing, because a model or another one's alias has the name."""
    owners: dict[str, str] = {}
    for name, model in found.items():
        for alias in model.aliases:
            other = alias if alias in found else owners.setdefault(alias, name)
            if other != name:
                yield f"{name}: its alias '{alias}' already means model '{other}'"


def _sizes(folder: str) -> Iterator[int]:
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(os.path.join(path, name)).st_size
            except OSError:
                continue
