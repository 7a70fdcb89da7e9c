"""A model's own class, hosted: in the worker, or in a process that runs this file as a script.

    class Model:
        def load(self, folder, parameters): ...      # optional; once, before anything else
        def bind(self, tensors): ...                 # optional; weights over the mapping, in the worker only
        def preprocess(self, inputs): ...            # optional; what it returns goes to infer
        def infer(self, inputs): ...                 # {name: array} -> {name: array}
        def postprocess(self, outputs): ...          # optional; what infer returned

Each may be `async`.  Arrays are numpy's; texts are object arrays of bytes.  A class TritonPythonModel is one
of Triton's Python backend: `triton_backend_utils` gives it what it imports, and runs it.

As a script it needs nothing but numpy, since a virtual environment of the model's own has none of ours:

    python_child.py CONTROL_FD INPUT_FD OUTPUT_FD PARENT_PID

Tensors lie in two memfds, one for each direction; a message says where.  Each direction has one
writer: the worker grows the one of the inputs, this process that of the outputs.

Invariants
 1. It never outlives the worker: PR_SET_PDEATHSIG first, then a look at who the parent is.
 2. Whatever the model raises is an answer; the process goes on.
"""

import asyncio
import ctypes
import importlib.util
import inspect
import json
import mmap
import os
import signal
import socket
import struct
import sys
import types
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple  # noqa: UP035 - old Pythons too

import numpy as np

Arrays = Dict[str, Any]  # noqa: UP006
Place = Tuple[str, str, List[int], int, int]  # noqa: UP006 - name, dtype, shape, offset, bytes

ALIGN = 64
MESSAGE_BYTES_MAX = 65_536
ERROR_CHARS_MAX = 2000
_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1
TRITON_CLASS = "TritonPythonModel"
_TRITON_UTILS = "triton_python_backend_utils"


class Hosted:
    """One instance of a model's class."""

    def __init__(
        self,
        source: bytes,
        path: str,
        class_name: str,
        folder: str,
        parameters: Arrays,
        triton: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    ) -> None:
        """Run the source, make an instance and call its `load`.  Raises what they raise.

        `triton`: what a class of Triton's is initialized with.
        """
        utils = _triton_utils() if triton is not None and TRITON_CLASS.encode() in source else None
        module = types.ModuleType("overcommit_python_model")
        module.__file__ = path
        sys.modules.setdefault(module.__name__, module)
        exec(compile(source, path, "exec"), vars(module))
        if utils is not None and class_name in ("", TRITON_CLASS):
            self._model = utils.Hosting(vars(module)[TRITON_CLASS](), triton)
        else:
            self._model = _find(vars(module), class_name)()
        self._loop: Optional[asyncio.AbstractEventLoop] = None  # noqa: UP045
        load = getattr(self._model, "load", None)
        if load is not None:
            self._call(load, Path(folder), parameters)

    @property
    def takes_tensors(self) -> bool:
        """Whether the model wants the image's weights."""
        return hasattr(self._model, "bind")

    def bind(self, tensors: Arrays) -> None:
        """Give it its weights."""
        self._call(self._model.bind, tensors)

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch.  Raises what the model raises."""
        value: Any = inputs
        for name in ("preprocess", "infer", "postprocess"):
            step = getattr(self._model, name, None)
            if step is not None:
                value = self._call(step, value)
        return named(value)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*arguments)
        if inspect.isawaitable(result):
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
            result = self._loop.run_until_complete(_awaited(result))
        return result


def _triton_utils() -> Any:
    """Load what models of Triton import, from beside this file."""
    if _TRITON_UTILS not in sys.modules:
        place = Path(__file__).with_name("triton_backend_utils.py")
        spec = importlib.util.spec_from_file_location(_TRITON_UTILS, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[_TRITON_UTILS] = module
        spec.loader.exec_module(module)
    return sys.modules[_TRITON_UTILS]


async def _awaited(value: Any) -> Any:
    return await value


def _find(names: Arrays, class_name: str) -> Any:
    found = {
        name: value
        for name, value in names.items()
        if isinstance(value, type)
        and hasattr(value, "infer")
        and value.__module__ == "overcommit_python_model"
    }
    if class_name:
        if class_name not in found:
            raise TypeError("no class %s with a method infer" % class_name)  # noqa: UP031
        return found[class_name]
    if len(found) != 1:
        raise TypeError("classes with a method infer: %s; name one by entry" % sorted(found))  # noqa: UP031
    return next(iter(found.values()))


def named(result: Any) -> Arrays:
    """Make arrays of what a model returned; without names they are output0, output1 ..."""
    if not isinstance(result, dict):
        if isinstance(result, tuple):
            result = {f"output{number}": row for number, row in enumerate(result)}
        else:
            result = {"output": result}
    return {str(name): _array(value) for name, value in result.items()}


def _array(value: Any) -> Any:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind in "SUO":
        texts = np.empty(array.shape, object)
        flat = [t.encode() if isinstance(t, str) else bytes(t) for t in array.reshape(-1)]
        texts.reshape(-1)[:] = flat
        return texts
    return np.ascontiguousarray(array) if array.ndim else array


# --- tensors in a memfd -------------------------------------------------------------------------
class Channel:
    """One direction: a memfd that its writer grows."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: Any = None

    def write(self, arrays: Arrays) -> List[Place]:  # noqa: UP006
        """Lay arrays out; return where each lies."""
        pieces = [(name, array, _raw(array)) for name, array in arrays.items()]
        places: List[Place] = []  # noqa: UP006
        at = 0
        for name, array, raw in pieces:
            kind = "object" if array.dtype == object else array.dtype.str
            places.append((name, kind, list(array.shape), at, len(raw)))
            at += -(-len(raw) // ALIGN) * ALIGN
        if at > os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, at)
        memory = self._memory(at)
        for (_, _, raw), (_, _, _, start, nbytes) in zip(pieces, places):  # noqa: B905
            memory[start : start + nbytes] = raw
        return places

    def read(self, places: List[Place]) -> Arrays:  # noqa: UP006
        """Copy arrays out: the other side uses the memory again.  Raises ValueError for bad places."""
        size = os.fstat(self._fd).st_size
        arrays: Arrays = {}
        for name, kind, shape, start, nbytes in places:
            if start < 0 or nbytes < 0 or start + nbytes > size:
                raise ValueError("a tensor lies outside the memory")
            raw = bytearray(self._memory(size)[start : start + nbytes]) if nbytes else bytearray()
            if kind == "object":
                arrays[name] = _texts(raw, shape)
            else:
                arrays[name] = np.frombuffer(raw, np.dtype(kind)).reshape(shape)
        return arrays

    def close(self) -> None:
        """Unmap it."""
        if self._map is not None:
            self._map.close()
            self._map = None
        os.close(self._fd)

    def _memory(self, nbytes: int) -> Any:
        if self._map is None or len(self._map) < nbytes:
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self._fd, max(nbytes, 1)) if nbytes else bytearray()
            if not nbytes:
                empty, self._map = self._map, None
                return empty
        return self._map


def _raw(array: Any) -> Any:
    if array.dtype == object:
        parts: List[bytes] = []  # noqa: UP006
        for text in array.reshape(-1):
            parts += (_LENGTH.pack(len(text)), text)
        return b"".join(parts)
    return np.ascontiguousarray(array).tobytes()


def _texts(raw: bytearray, shape: List[int]) -> Any:  # noqa: UP006
    texts = []
    at = 0
    while at < len(raw):
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        texts.append(bytes(raw[at : at + length]))
        at += length
    array = np.empty(len(texts), object)
    array[:] = texts
    return array.reshape(shape)


# --- the process ----------------------------------------------------------------------------------
def serve(control: socket.socket, inputs: Channel, outputs: Channel) -> None:
    """Answer messages until the worker is gone."""
    hosted: Any = None
    while True:
        message = control.recv(MESSAGE_BYTES_MAX)
        if not message:
            return
        answer: Arrays
        try:
            request = json.loads(message)
            if request["do"] == "load":
                source = Path(request["file"]).read_bytes()
                sys.path.insert(0, request["folder"])
                if TRITON_CLASS.encode() in source:
                    sys.path.append(os.path.dirname(request["folder"]))  # of all its versions
                hosted = Hosted(
                    source,
                    request["file"],
                    request["class"],
                    request["folder"],
                    request["parameters"],
                    request["triton"],
                )
                answer = {"ok": True}
            else:
                answer = {
                    "ok": True,
                    "outputs": outputs.write(hosted.run(inputs.read(request["inputs"]))),
                }
        except BaseException as error:  # sys.exit() too
            text = "%s: %s" % (type(error).__name__, error)  # noqa: UP031
            answer = {"ok": False, "error": text[:ERROR_CHARS_MAX]}
        control.send(json.dumps(answer).encode())


def main() -> None:
    """Be the process."""
    control, inputs, outputs, parent = (int(argument) for argument in sys.argv[1:5])
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # This file's folder is no place to import from: it has our modules, not the model's.
    sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    serve(socket.socket(fileno=control), Channel(inputs), Channel(outputs))


if __name__ == "__main__":
    main()
