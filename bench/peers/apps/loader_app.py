"""Time a loader: `loader_app.py LOADER FILE cold|warm REPEATS`; prints the seconds as a JSON list.

From the first byte until every page of every tensor has been touched.  `cold`: the file is not in the
page cache; `warm`: it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time

import torch

PAGE = 4096


@contextlib.contextmanager
def torch_load(path, *, mmap):
    """A state dict written by torch.save."""
    yield torch.load(path, mmap=mmap, weights_only=True).values()


@contextlib.contextmanager
def safetensors_load(path):
    """What most programs do: maps the file, and makes tensors of it."""
    from safetensors.torch import load_file

    yield load_file(path).values()


@contextlib.contextmanager
def fastsafetensors_load(path):
    """Without GPUDirect, which needs a GPU."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [path]})
    files = loader.copy_files_to_device()
    yield (files.get_tensor(name) for name in loader.get_keys())
    files.close()
    loader.close()


@contextlib.contextmanager
def runai_load(path):
    """Tensors come as they are read, each until the next."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        yield (tensor for _, tensor in streamer.get_tensors())


LOADERS = {
    "torch.load": lambda path: torch_load(path, mmap=False),
    "torch.load, mmap": lambda path: torch_load(path, mmap=True),
    "safetensors": safetensors_load,
    "fastsafetensors": fastsafetensors_load,
    "runai-model-streamer": runai_load,
}


def drop(path):
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def keep(path):
    """Bring a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def main():
    """Time it."""
    name, path, state, repeats = sys.argv[1:5]
    load = LOADERS[name]
    seconds = []
    for _ in range(int(repeats)):
        (drop if state == "cold" else keep)(path)
        began = time.perf_counter()
        with load(path) as tensors:
            touched = sum(int(t.reshape(-1).view(torch.uint8)[::PAGE].sum()) for t in tensors)
            seconds.append(time.perf_counter() - began)
        assert touched > 0
        del tensors  # what is mapped does not leave the page cache
    print(json.dumps(seconds))


main()
