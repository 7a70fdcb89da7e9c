"""What a model of Triton's Python backend imports as `triton_python_backend_utils`, and how it is run.

    class TritonPythonModel:
        def initialize(self, args): ...      # optional
        def execute(self, requests): ...     # [InferenceRequest] -> [InferenceResponse]; may be async

The names and what they do are those of Triton's documentation (triton-inference-server/python_backend).
A batch is one request here: its tensors are those of all clients in it, row by row, as those of one client
with so many rows would be.

Not offered, each with words: asking other models (BLS; an ensemble does that), decoupled answers, metrics of
one's own, tensors on a GPU.  `finalize` is not called: the process is ended with its worker.

Needs nothing but numpy, since a virtual environment of the model's own has none of ours.  Loaded by
`python_child` under the name that models import.
"""

import json
import logging
import struct
from typing import Any, Dict, List, Optional, Sequence, Tuple  # noqa: UP035 - old Pythons too

import numpy as np

Arrays = Dict[str, Any]

# ruff: noqa: UP006, UP045
TRITON_STRING_TO_NUMPY = {
    "TYPE_BOOL": bool,
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT16": np.uint16,
    "TYPE_UINT32": np.uint32,
    "TYPE_UINT64": np.uint64,
    "TYPE_INT8": np.int8,
    "TYPE_INT16": np.int16,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
}
_LENGTH = struct.Struct("<I")
# Numbers of Triton's DataType, in the order of the names above.
_NUMBERS = dict(enumerate(TRITON_STRING_TO_NUMPY.values(), start=1))
Logger = logging.getLogger("overcommit.model")


class TritonModelException(Exception):
    """An error of a model's own."""


class TritonError:
    """What is wrong with a request; part of its response."""

    (
        UNKNOWN,
        INTERNAL,
        NOT_FOUND,
        INVALID_ARG,
        UNAVAILABLE,
        UNSUPPORTED,
        ALREADY_EXISTS,
        CANCELLED,
    ) = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message = message
        self._code = code

    def message(self) -> str:
        """Return the text."""
        return self._message

    def code(self) -> int:
        """Return which kind of error it is."""
        return self._code


class Tensor:
    """A name and an array."""

    def __init__(self, name: str, array: Any) -> None:
        self._name = name
        self._array = np.asarray(array)

    def name(self) -> str:
        """Return its name."""
        return self._name

    def as_numpy(self) -> Any:
        """Return its array; texts are objects that are bytes."""
        return self._array

    def shape(self) -> List[int]:
        """Return its shape."""
        return list(self._array.shape)

    def triton_dtype(self) -> int:
        """Return the number of its datatype."""
        return numpy_to_triton_type(self._array.dtype.type)

    def is_cpu(self) -> bool:
        """Say where it is: in host memory, always."""
        return True

    def to_dlpack(self) -> Any:
        """Return it as a capsule for another library."""
        return self._array.__dlpack__()

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> "Tensor":
        """Take a tensor of another library, or its capsule."""
        if hasattr(tensor, "__dlpack__"):
            return Tensor(name, np.from_dlpack(tensor))
        return Tensor(name, np.from_dlpack(_Capsule(tensor)))


class _Capsule:
    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **options: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> Tuple[int, int]:
        return 1, 0  # the CPU


class InferenceRequest:
    """Tensors, and what is asked for."""

    def __init__(
        self,
        inputs: Sequence[Tensor] = (),
        requested_output_names: Sequence[str] = (),
        model_name: str = "",
        model_version: int = -1,
        request_id: str = "",
        correlation_id: Any = 0,
        flags: int = 0,
        timeout: int = 0,
        parameters: Optional[Arrays] = None,
        **more: Any,
    ) -> None:
        self._inputs = list(inputs)
        self._outputs = list(requested_output_names)
        self._model = (model_name, model_version)
        self._said = (request_id, correlation_id, flags, timeout)
        self._parameters = parameters or {}

    def inputs(self) -> List[Tensor]:
        """Return its tensors."""
        return self._inputs

    def requested_output_names(self) -> List[str]:
        """Return the names of the outputs that are wanted: all of them."""
        return self._outputs

    def model_name(self) -> str:
        """Return whom it asks."""
        return self._model[0]

    def model_version(self) -> int:
        """Return which version of it."""
        return self._model[1]

    def request_id(self) -> str:
        """Return its id; a batch has none."""
        return str(self._said[0])

    def correlation_id(self) -> Any:
        """Return 0: a model with state has an input for it."""
        return self._said[1]

    def flags(self) -> int:
        """Return 0: a model with state has inputs for what they say."""
        return self._said[2]

    def timeout(self) -> int:
        """Return 0: the server sees to times."""
        return self._said[3]

    def parameters(self) -> str:
        """Return its parameters as JSON; a batch has none."""
        return json.dumps(self._parameters)

    def is_cancelled(self) -> bool:
        """Return False: what runs is not cancelled."""
        return False

    def get_response_sender(self) -> Any:
        """Refuse: there is one response for each request."""
        raise TritonModelException("decoupled responses are not offered: return them from execute")

    def exec(self, decoupled: bool = False) -> Any:
        """Refuse to ask another model."""
        raise TritonModelException(
            "asking model '%s' from inside a model (BLS) is not offered: make an ensemble of both"  # noqa: UP031
            % self._model[0]
        )

    async_exec = exec


class InferenceResponse:
    """Tensors, or what went wrong."""

    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: Optional[TritonError] = None
    ) -> None:
        self._tensors = list(output_tensors or ())
        self._error = error

    def output_tensors(self) -> List[Tensor]:
        """Return its tensors."""
        return self._tensors

    def has_error(self) -> bool:
        """Say whether something went wrong."""
        return self._error is not None

    def error(self) -> Optional[TritonError]:
        """Return what went wrong."""
        return self._error


def _found(tensors: Sequence[Tensor], name: str) -> Optional[Tensor]:
    return next((tensor for tensor in tensors if tensor.name() == name), None)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Optional[Tensor]:
    """Return an input of a request, or None."""
    return _found(request.inputs(), name)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Optional[Tensor]:
    """Return an output of a response, or None."""
    return _found(response.output_tensors(), name)


def _properties(model_config: Arrays, kind: str, name: str) -> Optional[Arrays]:
    rows: List[Arrays] = model_config.get(kind, [])
    return next((row for row in rows if row["name"] == name), None)


def get_input_config_by_name(model_config: Arrays, name: str) -> Optional[Arrays]:
    """Return what a configuration says of an input, or None."""
    return _properties(model_config, "input", name)


def get_output_config_by_name(model_config: Arrays, name: str) -> Optional[Arrays]:
    """Return what a configuration says of an output, or None."""
    return _properties(model_config, "output", name)


def using_decoupled_model_transaction_policy(model_config: Arrays) -> bool:
    """Return False: such a model is not served."""
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_string_to_numpy(triton_type_string: str) -> Any:
    """Return numpy's type for a name as a configuration has it."""
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def triton_to_numpy_type(data_type: int) -> Any:
    """Return numpy's type for the number of a datatype."""
    return _NUMBERS[data_type]


def numpy_to_triton_type(data_type: Any) -> int:
    """Return the number of a datatype for numpy's type."""
    known = {np.dtype(kind): number for number, kind in _NUMBERS.items()}
    kind = np.dtype(data_type)
    return known.get(kind, known[np.dtype(object)] if kind.kind in "SUO" else 0)


def serialize_byte_tensor(input_tensor: Any) -> Any:
    """Write texts one behind the other, each with its length before it."""
    flat = np.asarray(input_tensor, object).reshape(-1)
    texts = [each if isinstance(each, bytes) else str(each).encode() for each in flat]
    return b"".join(_LENGTH.pack(len(text)) + text for text in texts)


def deserialize_bytes_tensor(encoded_tensor: bytes) -> Any:
    """Read what `serialize_byte_tensor` has written."""
    texts, at = [], 0
    while at < len(encoded_tensor):
        (length,) = _LENGTH.unpack_from(encoded_tensor, at)
        at += _LENGTH.size + length
        texts.append(encoded_tensor[at - length : at])
    return np.array(texts, object)


for _name, _level in (("info", "info"), ("warn", "warning"), ("error", "error")):
    setattr(Logger, "log_" + _name, getattr(Logger, _level))
    setattr(Logger, "log_" + _name.upper(), getattr(Logger, _level))
setattr(Logger, "log_verbose", Logger.debug)  # noqa: B010


class Hosting:
    """Runs a model's class as a class with `load` and `infer` is run."""

    def __init__(self, model: Any, args: Dict[str, str]) -> None:
        self._model = model
        self._args = args
        config = json.loads(args["model_config"])
        self._outputs = [row["name"] for row in config["output"]]
        if not hasattr(model, "initialize"):
            self.load = None  # type: ignore[assignment]

    def load(self, folder: Any, parameters: Any) -> Any:
        """Let it initialize itself, with what Triton gives it."""
        return self._model.initialize(dict(self._args))

    async def infer(self, inputs: Arrays) -> Arrays:
        """Run one batch as one request.  Raises what the model raises or says."""
        tensors = [Tensor(name, array) for name, array in inputs.items()]
        name, version = self._args["model_name"], int(self._args["model_version"])
        responses = self._model.execute([InferenceRequest(tensors, self._outputs, name, version)])
        if hasattr(responses, "__await__"):
            responses = await responses
        if not isinstance(responses, (list, tuple)) or len(responses) != 1 or responses[0] is None:
            raise TritonModelException(
                "execute must return a list with a response for each request"
            )
        error = responses[0].error()
        if error is not None:
            raise TritonModelException(error.message())
        return {tensor.name(): tensor.as_numpy() for tensor in responses[0].output_tensors()}
