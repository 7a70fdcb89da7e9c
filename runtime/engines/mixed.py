"""One program over several versions at once: a mixed batch.

Small models spend their time on everything but arithmetic: a call of a 64-wide MLP is 40 us of
dispatch for 3 us of work.  So requests of several versions of one program run as one batched call: the
weights of each are copied side by side into a staging buffer, and the program that `torch.vmap` makes
of the module runs over all of them (64 requests: 64 us to copy, 60 us to run, where they took 1,180 us
one after the other).  What `vmap` does is recorded once for each size and shape, simplified, and
replayed without it: the recording of an MLP is one `baddbmm` and one activation for each layer.

    trace (0.5 ms a size; 1 s for the first one, which imports)  ->  Trace.run(addresses, inputs)

Invariants
 1. A recording holds only what a call does with tensors.  A module that looks at values while it runs
    (data-dependent control flow, random numbers) is refused by `vmap`: MixingError.
 2. Every tensor of the manifest comes from the staging buffer; a recording never reads the weights of
    the version that it was made with.
 3. `run` answers for each request what its own version would; whoever uses it first compares the two,
    because the order of a sum may differ.
 4. The staging buffer belongs to the program, not to a trace: one run at a time.  A recording may be
    made meanwhile: it only reads it.

Source of the batching rules: `torch.vmap` (functorch).  Called by `mixing.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from overcommit.runtime import _shm
from overcommit.runtime.config import KIB, MIB, ModelConfig
from overcommit.runtime.engines.bound_module import Arguments, BoundModule
from overcommit.runtime.engines.dtypes import to_array, torch_dtype
from overcommit.runtime.errors import OvercommitError
from overcommit.runtime.image import ImageHeader, TensorEntry

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # input -> datatype, one request's shape

# Copying the weights costs what the batch saves at about 256 wide, 0.5 MB (bench/LOG.md).
IMAGE_BYTES_MAX: Final = 256 * KIB
SIZES: Final = (4, 8, 16, 32, 64)  # requests; a batch is filled up to the next one
STAGING_BYTES_MAX: Final = 4 * MIB  # beyond the processor's cache it costs more than it saves
STEPS_MAX: Final = 512  # of a recording: a program that long gains nothing
_ops = torch.ops.aten
# What a call from Python costs is half as much without the search for an overload.
_DIRECT: Final[dict[Any, Any]] = {
    _ops.add.Tensor: torch.add,
    _ops.baddbmm.default: torch.baddbmm,
    _ops.bmm.default: torch.bmm,
    _ops.div.Tensor: torch.div,
    _ops.mul.Tensor: torch.mul,
    _ops.relu.default: torch.relu,
    _ops.sigmoid.default: torch.sigmoid,
    _ops.sub.Tensor: torch.sub,
    _ops.tanh.default: torch.tanh,
}
_SAME_WHEN_SAME_SHAPE: Final = {
    _ops.view.default,
    _ops._unsafe_view.default,
    _ops.expand.default,
    _ops.reshape.default,
}


class MixingError(OvercommitError):
    """This program cannot run over several versions at once."""

    code = "cannot_mix"


Bind = Callable[[ModelConfig, dict[str, torch.Tensor]], BoundModule]


class MixedProgram:
    """A program whose versions may share a batch.

    `bind` joins tensors with the program, as `bind_tensors` of the engines does.  All versions have
    the manifest of `header`, offsets included.
    """

    def __init__(self, bind: Bind, header: ImageHeader) -> None:
        self._bind = bind
        self._config = header.config
        self._entries = header.tensors
        self._nbytes = max((e.offset + e.nbytes for e in header.tensors), default=0)
        self._stride = max(1, -(-self._nbytes // 64)) * 64
        self._sizes = [size for size in SIZES if size * self._stride <= STAGING_BYTES_MAX]
        self._staging = torch.zeros(self._sizes[-1] * self._stride, dtype=torch.uint8)
        self._into: Any = self._staging.numpy()

    def trace(self, shapes: Shapes) -> list[Trace]:
        """Record the program for requests of these shapes, for each size.

        Slow; may run in another thread than `Trace.run`.  Raises MixingError.
        """
        return [Trace(self, size, shapes) for size in self._sizes]

    # --- for Trace ------------------------------------------------------------------------------
    def weights(self, size: int) -> dict[str, torch.Tensor]:
        """Make one view of the staging buffer for each tensor: `[size, *shape]`."""
        made: dict[str, torch.Tensor] = {}
        for entry in self._entries:
            if entry.alias_of is not None:
                made[entry.name] = made[entry.alias_of]
                continue
            made[entry.name] = self._view(entry, size)
        return made

    def _view(self, entry: TensorEntry, size: int) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if not math.prod(entry.shape):
            return torch.empty((size, *entry.shape), dtype=dtype)
        whole = self._staging.view(dtype)
        step = self._stride // dtype.itemsize
        return whole.as_strided(
            (size, *entry.shape), (step, *entry.stride), entry.offset // dtype.itemsize
        )

    def call(
        self, weights: Mapping[str, torch.Tensor], inputs: Arguments
    ) -> dict[str, torch.Tensor]:
        """Run the module on one version's tensors.  Raises MixingError for what is no tensor."""
        outputs = self._bind(self._config, dict(weights)).compute(inputs)
        for name, value in outputs.items():
            if not isinstance(value, torch.Tensor):
                raise MixingError(f"output '{name}' is not a tensor")
        return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    def copy_in(self, addresses: Sequence[int]) -> None:
        """Copy the weights at these addresses into the staging buffer, one after the other."""
        _shm.copy_pieces(self._into, self._stride, self._nbytes, addresses)


class Trace:
    """A program recorded for `size` requests of one shape."""

    def __init__(self, program: MixedProgram, size: int, shapes: Shapes) -> None:
        self.size = size
        self._program = program
        self._inputs = {
            name: torch.zeros((size, *shape), dtype=torch_dtype(datatype))
            for name, (datatype, shape) in shapes.items()
        }
        self._arrays = {name: to_array(tensor) for name, tensor in self._inputs.items()}
        weights = program.weights(size)
        self.names, self._module = _record(program.call, weights, self._inputs)
        self._arguments = tuple(self._inputs.values())

    @property
    def graph(self) -> fx.Graph:
        """What is replayed."""
        return self._module.graph

    def run(self, addresses: Sequence[int], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run requests of versions whose weights lie at `addresses`, at most `size` of them.

        `inputs[name]` holds the rows of all requests behind each other, as do the outputs.
        """
        count = len(addresses)
        for name, array in self._arrays.items():
            array[:count] = inputs[name].reshape((count, *array.shape[1:]))
        self._program.copy_in(addresses)
        with torch.inference_mode():
            outputs = self._module.forward(*self._arguments)  # it has no hooks to look for
            return {
                name: _rows(to_array(output), count)
                for name, output in zip(self.names, outputs, strict=True)
            }


def _rows(array: Array, count: int) -> Array:
    """Give `[size, rows, ...]` as the rows of the first `count`."""
    size, rows, *rest = array.shape
    whole: Array = array.reshape((size * rows, *rest))
    return whole[: count * rows]


# --- recording ----------------------------------------------------------------------------------
class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every operation on plain tensors, after vmap has batched it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and keep it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, result))
        return result


def _record(
    call: Callable[..., dict[str, torch.Tensor]],
    weights: dict[str, torch.Tensor],
    inputs: dict[str, torch.Tensor],
) -> tuple[list[str], fx.GraphModule]:
    """Record `call` batched over its first axis; return the names of its outputs and the program.

    Raises MixingError.
    """
    recorder = _Recorder()
    try:
        with torch.no_grad(), recorder:
            outputs = torch.vmap(call)(weights, inputs)
    except MixingError:
        raise
    except Exception as error:  # whatever vmap or the model's code raises
        raise MixingError(f"{type(error).__name__}: {error}"[:500]) from error
    if len(recorder.steps) > STEPS_MAX:
        raise MixingError(f"{len(recorder.steps)} operations are too many to gain by mixing")
    for name, output in outputs.items():
        if output.dim() < 2:
            raise MixingError(f"output '{name}' has no rows")
    return list(outputs), _Builder(weights, inputs).build(recorder.steps, list(outputs.values()))


class _Builder:
    """Makes a graph of a recording; what depends on nothing but where the weights lie is made once."""

    def __init__(
        self, weights: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> None:
        self._graph = fx.Graph()
        self._root = torch.nn.Module()
        # Every tensor of the recording, by identity: a node, or itself if it is a view of weights.
        self._nodes: dict[int, fx.Node] = {}
        self._fixed: dict[int, torch.Tensor] = {id(tensor): tensor for tensor in weights.values()}
        self._storages = {t.untyped_storage().data_ptr() for t in weights.values() if t.numel()}
        self._products: dict[int, tuple[Any, Any, torch.Tensor]] = {}  # results of bmm
        self._alive: list[object] = []
        for index, tensor in enumerate(inputs.values()):
            self._nodes[id(tensor)] = self._graph.placeholder(f"input{index}")

    def build(
        self, steps: Sequence[tuple[Any, Any, Any, Any]], outputs: Sequence[torch.Tensor]
    ) -> fx.GraphModule:
        """Return the program: inputs in, a tuple of outputs out."""
        self._alive.append(steps)
        for step in steps:
            self._add(*step)
        self._graph.output(tuple(self._argument(output) for output in outputs))
        self._graph.eliminate_dead_code()
        module = fx.GraphModule(self._root, self._graph)
        # What a module keeps in its tables is found by a search.
        vars(module).update(module._buffers)
        return module

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        first = args[0] if args else None
        if isinstance(result, torch.Tensor) and isinstance(first, torch.Tensor):
            if self._is_nothing(func, args, result):
                self._alias(first, result)
                return
            if id(first) in self._fixed and self._fix(func, args, kwargs, result):
                return
            if func is _ops.add.Tensor and not kwargs and self._add_bias(args, result):
                return
        node = self._graph.call_function(
            _DIRECT.get(func, func),
            fx.node.map_aggregate(args, self._argument),
            fx.node.map_aggregate(kwargs, self._argument),
        )
        if isinstance(result, torch.Tensor):
            self._nodes[id(result)] = node
            if func is _ops.bmm.default:
                self._products[id(result)] = (*args, result)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self._nodes[id(item)] = self._graph.call_function(_item, (node, index))

    def _is_nothing(self, func: Any, args: tuple[Any, ...], result: torch.Tensor) -> bool:
        first = args[0]
        if func in _SAME_WHEN_SAME_SHAPE:
            return bool(first.shape == result.shape and first.stride() == result.stride())
        if func is _ops.mul.Scalar and id(first) in self._fixed:
            return bool(args[1] == 1 and first.dtype == result.dtype)
        return False

    def _fix(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor
    ) -> bool:
        """Make a view of the weights once and for all; False if it is none."""
        if func._schema.is_mutable or any(torch.is_tensor(each) for each in args[1:]):
            return False
        view = func(self._fixed[id(args[0])], *args[1:], **kwargs)
        if not view.numel() or view.untyped_storage().data_ptr() not in self._storages:
            return False
        self._fixed[id(result)] = view
        return True

    def _alias(self, old: torch.Tensor, new: torch.Tensor) -> None:
        # A product by one is another tensor: what stands for it must be what it was made from.
        if id(old) in self._fixed:
            self._fixed[id(new)] = self._fixed[id(old)]
        elif id(old) in self._nodes:
            self._nodes[id(new)] = self._nodes[id(old)]
        if id(old) in self._products:
            self._products[id(new)] = self._products[id(old)]

    def _add_bias(self, args: tuple[Any, ...], result: torch.Tensor) -> bool:
        """Make one `baddbmm` of a product and what is added to it."""
        for bias, product in (args, args[::-1]):
            found = self._products.get(id(product))
            if found is None or id(bias) not in self._fixed:
                continue
            left, right, whole = found
            if result.shape == whole.shape and bias.dim() == 3 and bias.dtype == whole.dtype:
                self._nodes[id(result)] = self._graph.call_function(
                    torch.baddbmm, tuple(map(self._argument, (bias, left, right)))
                )
                return True
        return False

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        node = self._nodes.get(id(value))
        if node is None:
            # A view of the staging buffer, or a constant of the program.
            tensor = self._fixed.get(id(value), value)
            name = f"_tensor{len(self._alive)}"
            self._alive.append(tensor)
            self._root.register_buffer(name, tensor, persistent=False)
            node = self._nodes[id(value)] = self._graph.get_attr(name)
        return node


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]


class MixedPrograms:
    """The mixed programs of one program, one for each layout and signature of its versions."""

    def __init__(self, bind: Bind) -> None:
        self._bind = bind
        self._by_layout: dict[object, MixedProgram] = {}

    def of(self, header: ImageHeader) -> MixedProgram | None:
        """Return what this version can share batches through; None for one that gains nothing."""
        config = header.config
        end = max((entry.offset + entry.nbytes for entry in header.tensors), default=0)
        if (
            not 0 < end <= IMAGE_BYTES_MAX
            or config.batching.max_batch_size < 2
            or not config.batching.across_versions
            or any(spec.datatype == "BYTES" for spec in (*config.inputs, *config.outputs))
        ):
            return None
        layout = (header.tensors, config.inputs, config.outputs)
        program = self._by_layout.get(layout)
        if program is None:
            program = self._by_layout[layout] = MixedProgram(self._bind, header)
        return program
