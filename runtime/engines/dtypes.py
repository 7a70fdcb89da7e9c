"""Names of element types: V2, torch, NumPy."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from overcommit.runtime.errors import ModelError

# V2 -> (torch, NumPy).  BF16 has no NumPy type and travels as uint16.
_TYPES: Final[dict[str, tuple[torch.dtype, str]]] = {
    "BOOL": (torch.bool, "bool"),
    "UINT8": (torch.uint8, "uint8"),
    "UINT16": (torch.uint16, "uint16"),
    "UINT32": (torch.uint32, "uint32"),
    "UINT64": (torch.uint64, "uint64"),
    "INT8": (torch.int8, "int8"),
    "INT16": (torch.int16, "int16"),
    "INT32": (torch.int32, "int32"),
    "INT64": (torch.int64, "int64"),
    "FP16": (torch.float16, "float16"),
    "BF16": (torch.bfloat16, "uint16"),
    "FP32": (torch.float32, "float32"),
    "FP64": (torch.float64, "float64"),
}
_V2_OF_TORCH: Final = {torch_type: name for name, (torch_type, _) in _TYPES.items()}
_V2_OF_NUMPY: Final = {kind: name for name, (_, kind) in _TYPES.items() if name != "BF16"}


def torch_dtype(datatype: str) -> torch.dtype:
    """V2 name -> torch type."""
    return _TYPES[datatype][0]


def v2_of_torch(dtype: torch.dtype) -> str:
    """Torch type -> V2 name.  Raises ModelError for types that V2 lacks."""
    name = _V2_OF_TORCH.get(dtype)
    if name is None:
        raise ModelError(f"a tensor of type {dtype} has no V2 datatype; convert it in the model")
    return name


def v2_of_numpy(array: np.ndarray) -> str:
    """Type of a host array -> V2 name; objects and texts are BYTES.  Raises ModelError."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    name = _V2_OF_NUMPY.get(array.dtype.name)
    if name is None:
        raise ModelError(f"an array of type {array.dtype} has no V2 datatype; convert it")
    return name


def to_tensor(array: np.ndarray, datatype: str) -> torch.Tensor:
    """Wrap a batch array, without a copy."""
    if not array.flags.writeable:
        array = array.copy()  # torch warns about, and does not support, read-only arrays
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if datatype == "BF16" else tensor


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values as a C-contiguous host array; bfloat16 as uint16."""
    is_plain = tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
    if is_plain and not (tensor.requires_grad or tensor.is_neg()):
        return tensor.numpy()  # nearly all of them; the checks below take a microsecond
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def host_array(value: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return a model's output as a C-contiguous host array; texts as objects."""
    if isinstance(value, torch.Tensor):
        return to_array(value)
    array = value.astype(object) if value.dtype.kind in "SU" else value
    return np.ascontiguousarray(array) if array.ndim else array
