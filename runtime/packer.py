"""Making images out of model folders.

Runs in the packer process (`main`), or in the command line's process (`pack`).  It imports torch and
may run a model's code, where allowed.

The way of a version: find the engine -> content key -> an image that exists is reused -> build the
module for real -> trial runs -> manifest -> image.

Invariants
 1. The source files are only read.
 2. `pack` never raises for bad input: it answers `ok=False` with a message that names the model, the
    reason and the remedy.
 3. Nothing is left behind by a failure; an image under its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from overcommit.runtime import trials
from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.engines import binding, torch_export, torch_module
from overcommit.runtime.errors import ImageError, ModelError, OvercommitError, RepositoryError
from overcommit.runtime.image import (
    FORMAT_VERSION,
    ImageHeader,
    lay_out,
    layout_hash,
    read_header,
    write_image,
)
from overcommit.runtime.messages import Pack, PackDone, PackProgress, Ready, Start, Stop

log = logging.getLogger("overcommit.packer")

Progress = Callable[[int, int], None]
PACKER_VERSION = 1  # part of the content key: a packer that writes other images says so here
_HASH_BYTES = 1 << 22


# --- sources --------------------------------------------------------------------------------------
def find_engine(job: Pack) -> tuple[str, list[Path]]:
    """Return the engine and the source files of a folder.  Raises RepositoryError."""
    folder = Path(job.folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    names = {path.name for path in files}
    weights = [path for path in files if path.suffix == ".safetensors"]
    programs = [path for path in files if path.suffix == ".pt2"]
    user = folder / (job.config.entry or "model.py").partition(":")[0]
    engine = job.config.engine
    if engine not in (None, "torch", "torch_export"):
        raise RepositoryError(
            f"model '{job.name}': unknown engine '{engine}'; known: torch, torch_export"
        )
    if engine in (None, "torch_export") and programs:
        if len(programs) > 1:
            raise RepositoryError(
                f"model '{job.name}' has {len(programs)} .pt2 files; leave one in {folder}"
            )
        return "torch_export", programs
    if engine in (None, "torch") and weights:
        if user.is_file():
            return "torch", [user, *weights]
        if "config.json" in names:
            return "torch", [folder / "config.json", *weights]
    shown = ", ".join(sorted(names)[:10]) or "nothing"
    raise RepositoryError(
        f"model '{job.name}': {folder} holds {shown}; supported are config.json + *.safetensors "
        f"(Hugging Face), model.py + *.safetensors, and one *.pt2 (torch.export)"
    )


def content_key(job: Pack, engine: str, sources: list[Path], program: str) -> str:
    """Name the image: equal sources and settings, equal name."""
    digest = hashlib.blake2b(digest_size=20)
    settings = msgspec.json.encode(job.config)
    for text in (str(PACKER_VERSION), engine, program, torch.__version__):
        digest.update(text.encode() + b"\0")
    digest.update(settings)
    for path in sources:
        digest.update(struct.pack("<Q", path.stat().st_size) + path.name.encode())
        with path.open("rb") as file:
            while part := file.read(_HASH_BYTES):
                digest.update(part)
    return digest.hexdigest()


def read_safetensors(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Read every tensor of these files (memory-mapped by the library)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise RepositoryError(f"{path} cannot be read as safetensors: {error}") from error
    return tensors


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Put a checkpoint's tensors into a module that was built for real.

    Extra keys are tolerated (checkpoints carry them); a missing one that is neither tied nor
    non-persistent is an error that names it.
    """
    prefix = getattr(module, "base_model_prefix", "")
    wanted = {name for name, _, persistent, _ in binding.registered(module) if persistent}
    given = dict(tensors)
    if prefix and not wanted & given.keys():
        # A headless class over a checkpoint with a head, or the other way round.
        cut = {name.removeprefix(f"{prefix}."): value for name, value in given.items()}
        added = {f"{prefix}.{name}": value for name, value in given.items()}
        given = cut if wanted & cut.keys() else added
    old = {name: tensor for name, _, _, tensor in binding.registered(module)}
    for name in wanted & given.keys():
        if given[name].shape != old[name].shape:
            raise RepositoryError(
                f"{where}: tensor '{name}' is {tuple(given[name].shape)} in the checkpoint, the "
                f"model's configuration makes it {tuple(old[name].shape)}"
            )
    module.load_state_dict(given, strict=False, assign=True)
    tie_weights = getattr(module, "tie_weights", None)
    if callable(tie_weights):
        tie_weights()
    filled = {name for name in wanted if name in given}
    shared = {
        tensor.data_ptr() for name, _, _, tensor in binding.registered(module) if name in filled
    }
    missing = sorted(
        name
        for name, _, persistent, tensor in binding.registered(module)
        if persistent and name not in filled and tensor.data_ptr() not in shared
    )
    if missing:
        raise RepositoryError(
            f"{where}: the checkpoint lacks {missing[:5]}; is it complete, and of this class?"
        )
    module.requires_grad_(False)


# --- programs -------------------------------------------------------------------------------------
class _Prepared(msgspec.Struct):
    """A source, built for real."""

    engine: str
    program_key: str
    program: dict[str, str]
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    positional: bool


def _prepare_hugging_face(job: Pack, sources: list[Path]) -> _Prepared:
    text = sources[0].read_text()
    try:
        config: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise RepositoryError(f"{sources[0]} is no JSON: {error}") from error
    where = f"model '{job.name}'"
    tensors = read_safetensors(sources[1:])
    arguments: dict[str, Any] = {}
    cls = torch_module.hugging_face_class(config, where)
    has_pooler = any("pooler" in name for name in tensors)
    if "add_pooling_layer" in _parameters_of(cls) and not has_pooler:
        arguments["add_pooling_layer"] = False
    clean = {k: v for k, v in config.items() if k not in torch_module._NOISE}
    program = {
        "kind": "hugging_face",
        "config": json.dumps(clean, sort_keys=True),
        "arguments": json.dumps(arguments),
    }
    module = torch_module.build_hugging_face(program, where)
    fill(module, tensors, where)
    inputs = torch_module.hugging_face_inputs(module)
    return _Prepared("torch", _key(program), program, module, inputs, False)


def _parameters_of(cls: type[nn.Module]) -> set[str]:
    import inspect

    return set(inspect.signature(cls.__init__).parameters)


def _prepare_user(job: Pack, sources: list[Path]) -> _Prepared:
    torch_module.require_code_allowed(job.name, job.config, job.allow_code)
    _, _, class_name = (job.config.entry or "").partition(":")
    where = f"model '{job.name}'"
    program = {
        "kind": "user",
        "file": str(sources[0].resolve()),
        "class": class_name,
        "arguments": json.dumps(job.config.parameters, sort_keys=True),
        "source": hashlib.blake2b(sources[0].read_bytes(), digest_size=16).hexdigest(),
    }
    module = torch_module.build_user(program, where)
    program["class"] = type(module).__name__
    fill(module, read_safetensors(sources[1:]), where)
    return _Prepared("torch", _key(program), program, module, (), False)


def _prepare_export(job: Pack, sources: list[Path]) -> _Prepared:
    torch_export.refuse_pickles(sources[0])
    try:
        exported = torch_export.load(sources[0])
        inputs = torch_export.inputs_of(exported)
        key = torch_export.program_key(exported)
        module = exported.module()
    except OvercommitError:
        raise
    except Exception as error:  # torch raises anything for a damaged archive
        raise RepositoryError(
            f"model '{job.name}': {sources[0]} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    folder = Path(job.cache_dir) / "programs" / key
    path = folder / "program.pt2"
    if not path.exists():
        path = torch_export.save_program(folder, torch_export.strip(torch_export.load(sources[0])))
    return _Prepared("torch_export", key, {"file": str(path)}, module, inputs, True)


def _key(program: Mapping[str, str]) -> str:
    text = json.dumps(dict(program), sort_keys=True) + torch.__version__
    if program["kind"] == "hugging_face":
        import transformers

        text += str(transformers.__version__)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- packing --------------------------------------------------------------------------------------
def _pack(job: Pack, on_progress: Progress) -> PackDone:
    engine, sources = find_engine(job)
    if engine == "torch_export":
        prepare = _prepare_export
    elif sources[0].suffix == ".py":
        torch_module.require_code_allowed(job.name, job.config, job.allow_code)
        prepare = _prepare_user
    else:
        prepare = _prepare_hugging_face
    key = content_key(job, engine, sources, prepare.__name__)
    path = Path(job.cache_dir) / "images" / f"{key}.image"
    if path.exists():
        try:
            header, _ = read_header(path)
            return _done(job, path, key, header)
        except ImageError as error:
            log.warning("%s is made again", error)
    prepared = prepare(job, sources)
    bound = torch_module.BoundTorch(
        prepared.module,
        ModelConfig(inputs=job.config.inputs or prepared.inputs),
        positional=prepared.positional,
    )
    config = trials.complete(
        job.name, job.config, prepared.inputs, bound.run, lambda: bound.datatypes
    )
    facts, tensors = binding.scan(prepared.module)
    entries, nbytes = lay_out(facts)
    header = ImageHeader(
        format_version=FORMAT_VERSION,
        engine=prepared.engine,
        program_key=prepared.program_key,
        program={**prepared.program, "positional": "1" if prepared.positional else "0"},
        layout_hash=layout_hash(entries),
        nbytes=nbytes,
        tensors=entries,
        config=msgspec.structs.replace(config, engine=prepared.engine),
    )
    parts = (
        (entry, binding.tensor_bytes(tensors[entry.name]))
        for entry in entries
        if entry.alias_of is None
    )
    return _done(job, path, key, write_image(path, header, parts, on_progress))


def _done(job: Pack, path: Path, key: str, header: ImageHeader) -> PackDone:
    return PackDone(
        job=job.job,
        ok=True,
        image_path=str(path),
        content_key=key,
        program_key=header.program_key,
        nbytes=header.nbytes,
        engine=header.engine,
        config=header.config,
    )


def pack(job: Pack, on_progress: Progress) -> PackDone:
    """Make the image of one version; the answer says whether it worked, and why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _pack(job, on_progress)
    except ModelError as error:
        message = f"model '{job.name}' failed its trial run: {error.message}"
    except OvercommitError as error:
        message = error.message
    except OSError as error:
        message = f"model '{job.name}': {error}"
    except MemoryError:
        message = f"model '{job.name}' needs more memory to be packed than there is"
    return PackDone(job=job.job, ok=False, message=message)


def main(control_fd: int) -> None:
    """Pack what the supervisor asks for until Stop or until it is gone."""
    control = ControlSocket(control_fd)
    received = control.receive()
    assert received is not None
    assert isinstance(received[0], Start)
    torch.set_num_threads(1)  # packing is bound by the disk and shares the machine with requests
    control.send(Ready(pid=os.getpid()))
    while (received := control.receive()) is not None:
        message, _ = received
        if isinstance(message, Stop):
            return
        if isinstance(message, Pack):
            job = message.job

            def on_progress(done: int, total: int, job: int = job) -> None:
                control.send(PackProgress(job=job, done=done, total=total))

            control.send(pack(message, on_progress))
