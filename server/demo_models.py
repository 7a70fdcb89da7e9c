"""The demo's models, made from the files of their packages.

`make_variant` needs NumPy alone; the others import torch when they run.  Pickled weights are read
with `weights_only=True`.  Each function writes into a folder that the caller made and owns.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from overcommit.runtime.errors import ModelError

if TYPE_CHECKING:
    import torch

NOISE: Final = 0.05  # relative change of every weight: other answers, same range of values
TOLERANCE: Final = 1e-4
EXAMPLE_ROWS: Final = 2  # an example of 1 would make torch.export take the batch for a constant


def make_variant(base: Path, folder: Path, seed: int) -> None:
    """Write the model in `base` with every weight changed a little; the same for the same seed."""
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file

    generator = np.random.Generator(np.random.Philox(seed))
    tensors = {}
    with safe_open(base / "model.safetensors", "numpy") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            if tensor.dtype == np.float32:
                noise = generator.random(tensor.shape, dtype=np.float32)
                noise -= 0.5
                noise *= 2 * NOISE
                noise += 1
                tensor *= noise
            tensors[name] = tensor
        metadata = file.metadata()
    save_file(tensors, folder / "model.safetensors", metadata)
    # safetensors writes for the owner alone, but a server may run as somebody else.
    (folder / "model.safetensors").chmod(0o644)
    shutil.copyfile(base / "config.json", folder / "config.json")


def make_crepe(weights: Path, folder: Path) -> None:
    """Export CREPE tiny: frames FP32 [n, 1024] -> pitch FP32 [n, 360].

    A frame is 64 ms at 16 kHz with mean 0 and deviation 1; an output bin is 20 cents wide.
    Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation", 2018.
    """
    import torch

    state: dict[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(".")
        if layer == "classifier":
            renamed[name] = tensor
            continue
        number = int(layer.removeprefix("conv").removesuffix("_BN")) - 1
        part = "norm" if layer.endswith("_BN") else "conv"
        # The weights are those of 2-D convolutions over a single column.
        is_kernel = part == "conv" and rest == "weight"
        renamed[f"layers.{number}.{part}.{rest}"] = tensor[..., 0] if is_kernel else tensor
    model = _crepe()
    model.load_state_dict(renamed)
    _export(model, {"frames": torch.randn(EXAMPLE_ROWS, 1024)}, folder)


def _crepe() -> torch.nn.Module:
    import torch
    from torch import nn
    from torch.nn import functional

    class Layer(nn.Module):
        def __init__(self, channels: tuple[int, int], kernel: int, stride: int, pad: Any) -> None:
            super().__init__()
            self.pad = pad
            self.conv = nn.Conv1d(*channels, kernel, stride)
            self.norm = nn.BatchNorm1d(channels[1], eps=0.001)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(functional.relu(self.conv(functional.pad(x, self.pad))))
            return functional.max_pool1d(x, 2)

    class CrepeTiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = (128, 16, 16, 16, 32, 64)
            layers = [Layer((1, channels[0]), 512, 4, (254, 254))]
            layers += [
                Layer((before, after), 64, 1, (31, 32))
                for before, after in itertools.pairwise(channels)
            ]
            self.layers = nn.ModuleList(layers)
            self.classifier = nn.Linear(256, 360)

        def forward(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
            x = frames.unsqueeze(1)
            for layer in self.layers:
                x = layer(x)
            return {"pitch": torch.sigmoid(self.classifier(x.transpose(1, 2).flatten(1)))}

    return CrepeTiny()


def make_efficientnet(code: Path, weights: Path, folder: Path) -> None:
    """Export EfficientNet-Lite0: image FP32 [n, 3, 224, 224] -> logits FP32 [n, 1000].

    `code` is the folder of the package that defines the network.  Pixels are (value - 127) / 128.
    """
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.network(image)}

    with _package("efficientnet_lite_pytorch", code) as package:
        network: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
        _export(Classifier(network), {"image": torch.randn(EXAMPLE_ROWS, 3, 224, 224)}, folder)


def _export(model: torch.nn.Module, example: dict[str, torch.Tensor], folder: Path) -> None:
    """Write model.pt2 with a batch axis that varies, and see that it computes what `model` does."""
    import torch

    model.eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(
                model,
                tuple(example.values()),
                dynamic_shapes={name: {0: batch} for name in example},
            )
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"torch {torch.__version__} cannot export it: {error}") from error
        three = {name: torch.cat([rows, rows[:1]]) for name, rows in example.items()}
        for rows in (three, {name: tensor[:1] for name, tensor in three.items()}):
            expected, got = model(**rows), program.module()(*rows.values())
            for name, tensor in expected.items():
                if not torch.allclose(tensor, got[name], atol=TOLERANCE, rtol=TOLERANCE):
                    raise ModelError("the exported program computes something else than its model")
        torch.export.save(program, folder / "model.pt2")


@contextmanager
def _package(name: str, folder: Path) -> Iterator[Any]:
    """Import a package from its folder, for the duration of the block."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    before = set(sys.modules)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for other in set(sys.modules) - before:
            if other == name or other.startswith(f"{name}."):
                del sys.modules[other]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's remarks on its own workings out of a progress bar."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
