"""Pictures to planes: the float64 result, rounded once, on every path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_rig import aligned, aligned_copy, needs_gcc, on_host

from overcommit.kernels import cuda, image
from overcommit.kernels.image import IMAGENET_MEAN, IMAGENET_STD, normalise, normalise_reference

SHAPES = ((0, 4, 4, 3), (1, 0, 4, 3), (1, 1, 1, 3), (2, 17, 13, 3), (1, 5, 300, 3))


def pictures(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("datatype", ["FP32", "FP16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_planes_are_the_reference_rounded_once(shape: tuple[int, ...], datatype: str) -> None:
    pixels = pictures(shape)
    planes = normalise(pixels, datatype=datatype)
    assert planes.dtype == (np.float32 if datatype == "FP32" else np.float16)
    expected = normalise_reference(pixels, IMAGENET_MEAN, IMAGENET_STD)
    assert np.array_equal(planes, expected.astype(planes.dtype))


@needs_gcc
@pytest.mark.parametrize("is_backwards", [False, True])
@pytest.mark.parametrize("datatype", ["FP32", "FP16"])
def test_the_cuda_source_gives_the_same_bits(datatype: str, is_backwards: bool) -> None:
    pixels = pictures((2, 17, 40, 3))
    expected = normalise(pixels, datatype=datatype)
    table = aligned_copy(image.tables(IMAGENET_MEAN, IMAGENET_STD, datatype))
    out = aligned(expected.nbytes)
    kernel = on_host(image.source(3, datatype), "normalise")
    kernel(
        (2, 2), image.THREADS, aligned_copy(pixels), table, out, 17 * 40, is_backwards=is_backwards
    )
    assert out.tobytes() == expected.tobytes()


def test_pictures_need_not_be_contiguous() -> None:
    pixels = pictures((2, 20, 20, 3))
    for view in (pixels[:, ::2, 3:9], pixels[..., ::-1], pixels.transpose(0, 2, 1, 3)):
        assert np.array_equal(normalise(view), normalise(view.copy()))


def test_one_channel_has_its_own_numbers() -> None:
    planes = normalise(np.full((1, 1, 1, 1), 255, np.uint8), (0.5,), (0.25,))
    assert planes.tolist() == [[[[2.0]]]]


@pytest.mark.parametrize(
    ("pixels", "keywords", "message"),
    [
        (np.zeros((1, 2, 2, 3), np.float32), {}, "must be uint8"),
        (np.zeros((2, 2, 3), np.uint8), {}, "must be uint8"),
        (np.zeros((1, 2, 2, 4), np.uint8), {}, "must be uint8"),
        (np.zeros((1, 2, 2, 3), np.uint8), {"std": (1.0, 0.0, 1.0)}, "zero"),
        (np.zeros((1, 2, 2, 3), np.uint8), {"std": (1.0,)}, "channels"),
        (np.zeros((1, 2, 2, 3), np.uint8), {"datatype": "INT8"}, "not INT8"),
    ],
)
def test_what_is_no_picture_is_refused(pixels: Any, keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalise(pixels, **keywords)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.has_gpu(), reason="no GPU, or no cupy")
@pytest.mark.parametrize("datatype", ["FP32", "FP16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpu_gives_the_same_bits(shape: tuple[int, ...], datatype: str) -> None:
    cupy, pixels = cuda.cupy(), pictures(shape)
    found = cupy.asnumpy(image.normalise_cuda(cupy.asarray(pixels), datatype=datatype))
    assert found.tobytes() == normalise(pixels, datatype=datatype).tobytes()
