"""What a model's folder holds, and the key of the image that it becomes.

Invariants
 1. The files are only read, none of them is executed or unpickled here.
 2. Equal files and settings, equal key; what can change an image's bytes is part of its key.

Called by the packer.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from overcommit.runtime import checkpoint_files
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.image import made_by
from overcommit.runtime.packer_messages import Pack

# Suffixes by engine; a library that reads its own files.
_TREES: Final = {
    "lightgbm": (".lgb", ".txt", ".bst"),
    "xgboost": (".ubj", ".json", ".bst"),
    "sklearn": (".joblib", ".pkl", ".pickle"),
}
# What a folder for another engine may hold as well: only where the model says so is it a model.
_AMBIGUOUS: Final = frozenset({".txt", ".json", ".pkl", ".pickle", ".bst"})
_SCRIPTS: Final = (".pt", ".jit", ".pth", ".ts")
ENGINES: Final = ("torch", "torch_export", "aoti", "onnx", "python", "torchscript", *_TREES)
_NO_WEIGHTS: Final = frozenset({"model.toml", "model-settings.json", "settings.json"})
_HASH_BYTES: Final = 1 << 22


@dataclass(slots=True, frozen=True)
class Source:
    """A model version's files; `main` is what decides about its program."""

    kind: Literal[
        "hugging_face", "user", "export", "aoti", "onnx", "python", "torchscript", "trees"
    ]
    engine: str
    main: Path
    weights: tuple[Path, ...] = ()
    class_name: str = ""


def find(job: Pack) -> Source:
    """Find out which engine a folder is for.  Raises RepositoryError that says what it holds."""
    folder, config = Path(job.folder), job.config
    where = f"model '{job.name}'"
    if config.engine is not None and config.engine not in ENGINES:
        raise RepositoryError(
            f"{where}: unknown engine '{config.engine}'; known: {', '.join(ENGINES)}"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if config.engine == "onnx" or (config.engine is None and not _is_torch(names)):
        graphs = [name for name in names if name.endswith(".onnx")]
        if graphs:
            return _onnx(where, folder, graphs, names, config.entry)
    if config.engine in _TREES or (config.engine is None and "config.json" not in names):
        trees = _trees(where, names, config)
        if trees is not None:
            return Source("trees", trees[0], folder / trees[1])
    if config.engine in (None, "torchscript") and (
        config.engine or not ({"model.py", "config.json"} & {*names})
    ):
        script = _script(where, folder, names, config)
        if script is not None:
            return script
    if config.engine == "python":
        return _python(where, folder, names, config.entry)
    if config.engine == "aoti" or (config.engine is None and any(map(_is_package, names))):
        return _aoti(where, folder, names, config.entry)
    programs = [folder / name for name in names if name.endswith(".pt2")]
    if config.engine in (None, "torch_export") and programs:
        if len(programs) > 1:
            raise RepositoryError(f"{where} has {len(programs)} .pt2 files; leave one in {folder}")
        return Source("export", "torch_export", programs[0])
    if config.engine in (None, "torch"):
        file_name, _, class_name = (config.entry or "model.py").partition(":")
        if config.entry is not None and (file_name not in names or "/" in file_name):
            raise RepositoryError(
                f'{where}: entry = "{config.entry}" names no file of {folder}; it is '
                f'"model.py:Class"'
            )
        weights = tuple(checkpoint_files.files_in(folder))
        if file_name in names and weights:
            return Source("user", "torch", folder / file_name, weights, class_name)
        if "config.json" in names and weights:
            return Source("hugging_face", "torch", folder / "config.json", weights)
    scripts = [name for name in names if name.endswith(_SCRIPTS)]
    if scripts and "model.py" not in names:
        raise RepositoryError(f"{where}: {_no_script(folder / scripts[0])}")
    shown = ", ".join(names[:10]) or "nothing"
    raise RepositoryError(
        f"{where}: {folder} holds {shown}; supported are config.json + *.safetensors "
        f"(Hugging Face), model.py + *.safetensors or a state dict, one *.pt2 (torch.export), *.aoti, "
        f"*.onnx, *.pt (TorchScript), *.lgb (LightGBM), *.ubj (XGBoost), and what engine = in its "
        f"model.toml names"
    )


def _is_torch(names: Sequence[str]) -> bool:
    """Whether a folder that holds an ONNX file too is one for torch: what came first stays first."""
    return any(name.endswith(".pt2") for name in names) or (
        any(name.endswith(".safetensors") for name in names)
        and ("model.py" in names or "config.json" in names)
    )


def _trees(where: str, names: Sequence[str], config: ModelConfig) -> tuple[str, str] | None:
    """Return the engine and the file of a model that its own library reads, if there is one."""
    for engine, suffixes in _TREES.items():
        if config.engine not in (None, engine):
            continue
        found = [name for name in names if name.endswith(suffixes) and name not in _NO_WEIGHTS]
        if config.engine is not None and config.entry is not None and config.entry in names:
            found = [config.entry]  # whatever its suffix
        if config.engine is None:
            found = [name for name in found if Path(name).suffix not in _AMBIGUOUS]
        if config.entry is not None:
            found = [name for name in found if name == config.entry]
        if len(found) > 1:
            raise RepositoryError(
                f'{where} holds {found[:5]}; name one with entry = "{found[0]}" in its model.toml'
            )
        if config.engine is not None and config.entry is not None and not found:
            raise RepositoryError(
                f"{where}: its folder holds no {config.entry}, which entry (parameters.uri in "
                f"model-settings.json) names; it holds {', '.join(names[:10]) or 'nothing'}"
            )
        if found:
            return engine, found[0]
        if config.engine is not None:
            raise RepositoryError(f"{where}: its folder holds none of {', '.join(suffixes)}")
    return None


def _script(where: str, folder: Path, names: Sequence[str], config: ModelConfig) -> Source | None:
    found = [name for name in names if name.endswith(_SCRIPTS) and config.entry in (None, name)]
    if len(found) > 1:
        raise RepositoryError(f"{where} holds {found[:5]}; name one with entry in its model.toml")
    if found and (config.engine is not None or is_torchscript(folder / found[0])):
        return Source("torchscript", "torchscript", folder / found[0])
    if config.engine is not None:
        raise RepositoryError(f"{where}: {folder} holds no {', '.join(_SCRIPTS)}")
    return None


def _no_script(path: Path) -> str:
    """Say what a file is that torch wrote and that is no TorchScript."""
    if zipfile.is_zipfile(path):
        return (
            f"{path} is no TorchScript: it holds pickled objects (torch.save). A state dict needs the "
            f"model.py that builds its module beside it; a whole module is served when it is saved with "
            f"torch.export.save, or torch.jit.script"
        )
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return f"{path} is damaged: its end is missing. Copy it here once more"
    return (
        f"{path} is neither TorchScript nor anything else that torch writes today; export it anew"
    )


def _is_package(name: str) -> bool:
    return name.endswith(".aoti")


def _aoti(where: str, folder: Path, names: Sequence[str], entry: str | None) -> Source:
    """A package with weights beside it, or else an exported program to be compiled."""
    found = [name for name in names if _is_package(name) and entry in (None, name)]
    found = found or [name for name in names if name.endswith(".pt2") and entry in (None, name)]
    if len(found) != 1:
        raise RepositoryError(
            f"{where}: {folder} holds {found[:5] or 'neither a .pt2 program nor an .aoti package'}; the "
            f"engine aoti needs one, which entry may name"
        )
    weights = tuple(checkpoint_files.files_in(folder)) if _is_package(found[0]) else ()
    return Source("aoti", "aoti", folder / found[0], weights)


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of torch.jit, not a state dict."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _python(where: str, folder: Path, names: Sequence[str], entry: str | None) -> Source:
    file_name, _, class_name = (entry or "model.py").partition(":")
    if file_name not in names:
        raise RepositoryError(
            f'{where}: {folder} holds no {file_name}, which engine = "python" runs'
        )
    beside = sorted(path for path in folder.rglob("*") if path.is_file())
    kept = (path for path in beside if path.name not in _NO_WEIGHTS and not _is_hidden(path))
    main = folder / file_name
    return Source("python", "python", main, tuple(p for p in kept if p != main), class_name)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__", "venv")) for part in path.parts[-4:])


def _onnx(
    where: str, folder: Path, graphs: Sequence[str], names: Sequence[str], entry: str | None
) -> Source:
    chosen = entry or ("model.onnx" if "model.onnx" in graphs else graphs[0])
    if chosen not in graphs:
        raise RepositoryError(f'{where}: entry = "{entry}" names none of {list(graphs)}')
    if entry is None and chosen != "model.onnx" and len(graphs) > 1:
        raise RepositoryError(
            f'{where} has {len(graphs)} .onnx files; name one with entry = "{graphs[0]}" in its '
            f"model.toml, or call it model.onnx"
        )
    # Weights may lie in files of any name beside it.
    beside = tuple(
        folder / name for name in names if name not in graphs and name not in _NO_WEIGHTS
    )
    return Source("onnx", "onnx", folder / chosen, beside)


def content_key(job: Pack, source: Source, on_step: Callable[[], None] = lambda: None) -> str:
    """Name the image.  Reads every byte of the source, in pieces; `on_step` is called after each."""
    digest = hashlib.blake2b(digest_size=20)
    for text in (*made_by(), source.kind, source.engine, source.class_name):
        digest.update(text.encode() + b"\0")
    digest.update(msgspec.json.encode(job.config, order="deterministic"))
    for path in (source.main, *source.weights):
        digest.update(struct.pack("<Q", path.stat().st_size) + path.name.encode() + b"\0")
        with path.open("rb") as file:
            while part := file.read(_HASH_BYTES):
                digest.update(part)
                on_step()
    return digest.hexdigest()
