"""A program that AOTInductor compiled, without weights, and its manifest: what it binds and takes.

`compile_program` makes both from an exported program; `overcommit compile` puts them into one file (`.aoti`),
which anybody can serve with weights of these names and shapes beside it.

A compiled program believes what it is given: a constant of another shape is a segmentation fault, one of
other strides a wrong answer, and a CPU that lacks what it was compiled for ends the process.  So everything
it depends on is in the manifest, and is checked before it runs.

Invariants
 1. No value of a tensor is in the code (the compiler would write vectors of up to eight into it, which
    another version's weights would not change): each is in the manifest, or nothing uses it.
 2. What writes to its tensors is refused: weights are read-only.
 3. A file under its final name is complete; the manifest is there before the code.

Called by the packer and the command line; `aoti` reads manifests in workers.
"""

from __future__ import annotations

import functools
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch.export.graph_signature import InputKind, InputSpec

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.engines import torch_export
from overcommit.runtime.engines.store import save_once
from overcommit.runtime.errors import ConfigurationError, ImageError, RepositoryError

CODE_FILE: Final = "program.so"
MANIFEST_FILE: Final = "program.json"
SUFFIX: Final = ".aoti"
FORMAT: Final = 1
MEMBER_BYTES_MAX: Final = 1 << 30
_OPTIONS: Final[dict[str, Any]] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.use_runtime_constant_folding": False,  # folded ones would be copies
    "always_keep_tensor_constants": True,
    "cpp.dynamic_threads": True,  # as many as the worker has, not as the packer had
}
_CPU_FLAGS: Final = ("avx", "amx", "fma", "asimd", "sve")


class Constant(msgspec.Struct, frozen=True):
    """A tensor that the program binds."""

    dtype: str  # as torch calls it
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a compiled program depends on."""

    format: int = FORMAT
    torch: str
    cpu_flags: tuple[str, ...]
    constants: dict[str, Constant]
    inputs: tuple[TensorSpec, ...]
    limits: dict[str, tuple[int, int]]  # least and most of each axis that varies
    sizes: tuple[dict[str, int], dict[str, int]]  # two choices for the axes
    batch_limits: tuple[int, int]
    modules: tuple[str, ...] = ()  # whose output types it gives


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """What this CPU can do of what compilers make use of."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            found = line.partition(":")[2].split()
            return tuple(sorted(flag for flag in found if flag.startswith(_CPU_FLAGS)))
    return ()


# --- compiling ------------------------------------------------------------------------------------
def manifest_of(
    exported: torch.export.ExportedProgram, modules: tuple[str, ...] = ()
) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Describe an exported program before it is compiled; return its tensors by name as well.

    Raises RepositoryError for a program that cannot run over read-only weights.
    """
    given = exported.graph_signature
    # An exported program writes in place; without such operators, its signature says what it writes to.
    plain = exported.run_decompositions({}).graph_signature
    writes = sorted({*plain.buffers_to_mutate.values(), *plain.user_inputs_to_mutate.values()})
    if writes:
        raise RepositoryError(
            f"the program writes to {writes[:5]} while it runs, but weights are read-only; compute "
            f"new tensors instead"
        )
    signature = torch_export.signature_of(exported)
    tensors: dict[str, torch.Tensor] = {}
    for spec in given.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            name = str(spec.target)
            held = exported.state_dict if name in exported.state_dict else exported.constants
            value: object = held[name]
            if not isinstance(value, torch.Tensor):
                raise RepositoryError(f"'{name}' is no tensor, but {type(value).__name__}")
            tensors[name] = value
    manifest = Manifest(
        torch=str(torch.__version__),
        cpu_flags=cpu_flags(),
        constants={
            name: Constant(
                str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride()
            )
            for name, tensor in tensors.items()
        },
        inputs=signature.specs,
        limits=_limits(exported, signature.specs),
        sizes=signature.sizes,
        batch_limits=signature.batch_limits,
        modules=modules,
    )
    return manifest, tensors


def _limits(
    exported: torch.export.ExportedProgram, specs: tuple[TensorSpec, ...]
) -> dict[str, tuple[int, int]]:
    """Read the range of every axis.  Raises RepositoryError for one that depends on others."""
    ranges = {str(symbol): limits for symbol, limits in exported.range_constraints.items()}
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    found: dict[str, tuple[int, int]] = {}
    for spec in specs:
        for axis, size in zip(spec.axes, nodes[spec.name].meta["val"].shape, strict=True):
            if axis is None:
                continue
            expression = size.node.expr
            if not expression.is_symbol:
                raise RepositoryError(
                    f"input '{spec.name}' has an axis of the size {expression}: a compiled program "
                    f"needs sizes that are independent; use the engine torch_export"
                )
            limits = ranges[str(expression)]
            upper = int(limits.upper) if limits.upper.is_Integer else 1 << 40
            found[axis] = (int(limits.lower), upper)
    return found


def compile_program(exported: torch.export.ExportedProgram, manifest: Manifest) -> bytes:
    """Compile it; return the shared library.  Takes seconds to minutes, and a C++ compiler.

    Raises RepositoryError.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor import config as inductor_config
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # one that torch keeps to itself
        raise RepositoryError(
            "compiling it needs a C++ compiler, and there is none here: install g++ where models are "
            "packed, or use the engine torch_export"
        ) from error
    specs = exported.graph_signature.input_specs
    for position, spec in enumerate(specs):
        if spec.kind is InputKind.CONSTANT_TENSOR:
            # Their names would be lost.
            specs[position] = InputSpec(InputKind.BUFFER, spec.arg, spec.target, persistent=False)
    with tempfile.TemporaryDirectory(prefix="overcommit-aoti-") as folder:
        path = f"{folder}/model.pt2"
        try:
            with inductor_config.patch({"compile_threads": 1}):
                aoti_compile_and_package(
                    exported, package_path=path, inductor_configs=dict(_OPTIONS)
                )
            with zipfile.ZipFile(path) as archive:
                (name,) = [each for each in archive.namelist() if each.endswith(".so")]
                code = archive.read(name)
        except Exception as error:  # a compiler's failure has any type
            raise RepositoryError(
                f"it cannot be compiled: {type(error).__name__}: {str(error)[-1000:]}"
            ) from error
        library = Path(folder) / CODE_FILE
        library.write_bytes(code)
        bound = names_of(open_library(library)).values()
    used = {
        str(spec.target)
        for spec in specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        and any(node.users for node in exported.graph.nodes if node.name == spec.arg.name)
    }
    if lost := sorted(used - {*bound}):
        raise RepositoryError(f"the compiler has written the tensors {lost[:5]} into the code")
    if unknown := sorted({*bound} - manifest.constants.keys()):
        raise RepositoryError(f"the compiled program binds {unknown[:5]}, which nobody knows")
    return code


def open_library(path: Path) -> Any:
    """Open a compiled program, once more each time; it has no weights yet and must not run."""
    aoti: Any = torch._C._aoti
    return aoti.AOTIModelContainerRunnerCpu(str(path), 1)


def names_of(library: Any) -> dict[str, str]:
    """Return the compiler's name of each constant -> the model's."""
    names: dict[str, str] = library.get_constant_names_to_original_fqns()
    return names


# --- files ----------------------------------------------------------------------------------------
def save(folder: Path, code: Any, manifest: Manifest) -> Path:
    """Put a program into its cache folder, once; `code` is called where it is not there yet."""
    save_once(folder / MANIFEST_FILE, lambda: msgspec.json.encode(manifest))
    return save_once(folder / CODE_FILE, code)


def read_manifest(content: bytes) -> Manifest:
    """Raises ImageError for one that this CPU or this torch cannot serve."""
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ImageError(f"its manifest cannot be read: {error}") from error
    if manifest.format != FORMAT or manifest.torch != torch.__version__:
        raise ImageError(
            f"it was compiled with torch {manifest.torch} (format {manifest.format}), this is torch "
            f"{torch.__version__} (format {FORMAT}): compile it again"
        )
    if lacking := sorted({*manifest.cpu_flags} - {*cpu_flags()}):
        raise ImageError(f"it was compiled for a CPU with {lacking[:5]}: compile it again here")
    return manifest


def write_package(source: Path, target: Path) -> Manifest:
    """Compile an exported program (`.pt2`) to a package (`.aoti`) without weights.

    Raises RepositoryError, and ConfigurationError before it takes its time, where nothing can be written.
    """
    from overcommit.runtime.engines import archive

    if not os.access(target.parent, os.W_OK):
        raise ConfigurationError(f"{target.parent} is no folder that can be written")
    modules = archive.inspect(source)
    manifest, _ = manifest_of(torch_export.load(source, modules), modules)
    code = compile_program(torch_export.load(source, modules), manifest)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr(MANIFEST_FILE, msgspec.json.encode(manifest))
        package.writestr(CODE_FILE, code)
    made = target.with_name(f".{target.name}.{os.getpid()}")
    made.write_bytes(content.getvalue())
    made.replace(target)
    return manifest


def read_package(path: Path) -> tuple[bytes, Manifest]:
    """Return the code and the manifest of a package.  Raises RepositoryError."""
    try:
        with zipfile.ZipFile(path) as package:
            members = [package.getinfo(name) for name in (CODE_FILE, MANIFEST_FILE)]
            if any(member.file_size > MEMBER_BYTES_MAX for member in members):
                raise RepositoryError(f"{path.name} is longer than {MEMBER_BYTES_MAX} bytes")
            code, manifest = (package.read(member) for member in members)
        return code, read_manifest(manifest)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise RepositoryError(
            f"{path.name} is no package of `overcommit compile`: {error}"
        ) from error
    except ImageError as error:
        raise RepositoryError(f"{path.name}: {error.message}") from error
