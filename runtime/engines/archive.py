"""Looking into a `.pt2` archive before torch.export reads it.

Loading one runs code that the archive may choose: torch unpickles entries that are flagged so, or
merely named so, falls back to unpickling for sample inputs, hands size expressions to sympy's
`eval`, compiles guards from strings, and resolves operators by walking attributes of `torch`.
Each of these was seen to run a shell command from a crafted file.  So everything that is not plainly
data is refused here.  torch itself promises nothing about files of strangers: this closes the doors
that we know, it is no proof that there are no others.

Invariants
 1. Only entries of known names are accepted, each once: torch and zipfile see the same files.
 2. No entry is unpickled, but for sample inputs with `weights_only`.
 3. Expressions and guards are arithmetic over known names; operators are from known namespaces.

Called by the packer, before `torch_export.load`.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from overcommit.runtime.errors import RepositoryError

ENTRY_BYTES_MAX: Final = 256 << 20  # of what is parsed here; weights are not

_PLAIN: Final = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|\.format_version"
    r"|\.storage_alignment|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|extra/.*"
)
_PAYLOAD: Final = re.compile(r"weight_\d+|tensor_\d+")
_NAME: Final = re.compile(r"\w*")  # becomes a variable of generated code
_PATH: Final = re.compile(r"[\w.\-:/ ]*")  # an attribute path, or a key of a dict
_OPERATOR: Final = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|torchvision)\.\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|associative_scan|flex_attention"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(not|ite|max|min|int|float|sum|sqrt)"
)
_DANGEROUS_OPERATORS: Final = (".from_file",)  # reads, or makes, a file of any name
_TREES: Final = re.compile(
    r"builtins\.(tuple|list|dict)|collections\.(OrderedDict|namedtuple)"
    r"|transformers\.modeling_outputs\.\w+|torch\.(Size|return_types\.\w+)"
)
_OUTPUT_TYPES: Final = "transformers.modeling_outputs"
_SYMBOL: Final = re.compile(r"[suz]f?\d+|[suz]+[a-z]*\d+")
_FUNCTIONS: Final = frozenset(
    {
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod"),
        *("Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Equality"),
        *("Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
        *("Piecewise", "ExprCondPair", "floor", "ceiling", "true", "false", "True", "False"),
        *("oo", "int_oo", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv"),
        *("CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural"),
        *("FloatPow", "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator"),
        *("TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
    }
)
_ARITHMETIC: Final = (
    *(ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Tuple),
    *(ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.Load, ast.keyword),
)


class _Refused(Exception):
    """What is wrong, without the file's name."""


def inspect(path: Path) -> tuple[str, ...]:
    """Check that the archive holds nothing but a program and its tensors.

    Return the modules whose output types it needs, to be imported before it is loaded.  Raises
    RepositoryError.
    """
    modules: set[str] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive)
            for name, entry in entries.items():
                if name.endswith(".json") or name == "data/sample_inputs/model.pt":
                    if entry.file_size > ENTRY_BYTES_MAX:
                        raise _Refused(f"'{name}' is longer than {ENTRY_BYTES_MAX} bytes")
                    content = archive.read(entry)
                    _check_entry(name, content)
                    if name == "models/model.json" and _OUTPUT_TYPES.encode() in content:
                        modules.add(_OUTPUT_TYPES)
            if "models/model.json" not in entries:
                raise _Refused("it holds no program 'models/model.json'")
    except _Refused as refused:
        raise RepositoryError(
            f"{path}: {refused}; export the model again with this torch, without custom objects "
            f"or operators"
        ) from refused
    except (zipfile.BadZipFile, ValueError, KeyError, OSError, RecursionError) as error:
        raise RepositoryError(f"{path} is no .pt2 archive: {error}") from error
    return tuple(modules)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    roots: set[str] = set()
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        root, _, name = entry.filename.partition("/")
        roots.add(root)
        if name in entries or len(roots) > 1:
            raise _Refused(f"entry '{entry.filename}' is there twice, or in a second folder")
        if not _PLAIN.fullmatch(name):
            if name.startswith("data/aotinductor/"):
                raise _Refused(
                    "it is a package of AOTInductor with its weights in the code; serve the exported "
                    'program with engine = "aoti", or make a package with `overcommit compile`'
                )
            if re.search(r"custom_obj|opaque_obj|\.pt$|\.pkl$|pickle", name):
                raise _Refused(f"entry '{name}' needs unpickling, which can run any code")
            raise _Refused(f"entry '{name}' is not part of an exported program")
        entries[name] = entry
    return entries


def _check_entry(name: str, data: bytes) -> None:
    if name.startswith("extra/"):
        return
    if name == "data/sample_inputs/model.pt":
        _check_sample_inputs(data)
        return
    content = json.loads(data)
    if name == "models/model.json":
        _check_program(content)
    else:
        _check_payloads(content)


def _check_sample_inputs(data: bytes) -> None:
    import torch

    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # torch would unpickle it for real now
        raise _Refused("its sample inputs need unpickling, which can run any code") from error


def _check_payloads(content: Any) -> None:
    for name, payload in content["config"].items():
        if payload["use_pickle"] or not _PAYLOAD.fullmatch(payload["path_name"]):
            raise _Refused(f"tensor '{name}' needs unpickling, which can run any code")
        if not _PATH.fullmatch(name):
            raise _Refused(f"tensor name {name!r} is no attribute path")


# --- the program --------------------------------------------------------------------------------
def _check_program(content: Any) -> None:
    for key, value in _walk(content):
        if key == "expr_str":
            _check_arithmetic(value)
        elif key in ("target", "as_operator"):
            _check_operator(value)
        elif key in ("name", "as_name") and not _NAME.fullmatch(str(value or "")):
            raise _Refused(f"the name {value!r} is no identifier")
        elif key in _PATH_KEYS and not _PATH.fullmatch(str(value or "")):
            raise _Refused(f"{value!r} is no attribute path")
        elif key in ("in_spec", "out_spec") and value:
            _check_tree(value)
        elif key == "custom_obj_values" and value:
            raise _Refused("it holds custom objects, which need unpickling")
    for guard in content.get("guards_code") or ():
        _check_arithmetic(guard, is_guard=True)
    graph = content["graph_module"]["graph"]
    for _, value in _walk([graph["inputs"], content["graph_module"]["signature"]]):
        if isinstance(value, str) and not _PATH.fullmatch(value):
            raise _Refused(f"the input constant {value!r} is neither a name nor a number")
    for symbol in content.get("range_constraints") or {}:
        _check_arithmetic(symbol)


_PATH_KEYS: Final = frozenset(
    {"parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "fqn"}
)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield key, child
            yield from _walk(child)
    elif isinstance(value, list):
        for child in value:
            if isinstance(child, str):
                yield "", child
            yield from _walk(child)


def _check_operator(target: Any) -> None:
    if not _OPERATOR.fullmatch(str(target)) or any(word in target for word in _DANGEROUS_OPERATORS):
        raise _Refused(f"it uses the operator {target!r}, which is not known to be safe")


def _check_tree(text: str) -> None:
    """Check how inputs or outputs are nested: JSON inside the JSON."""
    for key, value in _walk(json.loads(text)):
        if key == "__enum__" or (key == "type" and value and not _TREES.fullmatch(str(value))):
            raise _Refused(f"its inputs or outputs are of type {value!r}; use dicts and tuples")
        if key == "context" and isinstance(value, str):
            context = json.loads(value) if value[:1] in '[{"' else value
            for _, word in _walk([context]):
                if isinstance(word, str) and not _PATH.fullmatch(word):
                    raise _Refused(f"{word!r} is no name for an input or output")


def _check_arithmetic(text: Any, *, is_guard: bool = False) -> None:
    try:
        tree = ast.parse(str(text), mode="eval")
    except (SyntaxError, ValueError, MemoryError) as error:
        raise _Refused(f"{text!r} is no expression") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            is_known = node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None
            is_known = is_known or (is_guard and node.id == "L")
        elif isinstance(node, ast.Constant):
            is_known = isinstance(node.value, (int, float)) or (
                isinstance(node.value, str)
                and (_PATH if is_guard else _NAME).fullmatch(node.value) is not None
            )
        elif isinstance(node, ast.Call):
            is_known = isinstance(node.func, ast.Name) or is_guard
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            is_known = is_guard and getattr(node, "attr", "size") == "size"
        else:
            is_known = isinstance(node, _ARITHMETIC)
        if not is_known:
            raise _Refused(f"{str(text)[:80]!r} is more than arithmetic")
