"""Headers of images that a test writes by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.image import (
    FORMAT_VERSION,
    ImageHeader,
    TensorFacts,
    lay_out,
    layout_hash,
)


def header_of(
    facts: Sequence[TensorFacts],
    config: ModelConfig | None = None,
    program: Mapping[str, str] | None = None,
) -> ImageHeader:
    """Lay these tensors out, and describe the image."""
    entries, nbytes = lay_out(facts)
    return ImageHeader(
        format_version=FORMAT_VERSION,
        engine="torch",
        program_key="abc",
        program=dict(program or {}),
        layout_hash=layout_hash(entries),
        nbytes=nbytes,
        tensors=entries,
        config=config or ModelConfig(),
    )
