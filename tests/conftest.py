"""Models that are built on the spot: tiny, real, and different from each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MakeBert = Callable[[Path, int], None]


@pytest.fixture(scope="session")
def make_bert() -> MakeBert:
    """Return a function that writes a tiny BERT encoder with seeded weights to a folder."""
    import torch
    from transformers import BertConfig, BertModel

    def make(folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=200,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)

    return make


@pytest.fixture(scope="session")
def bert_reference() -> Callable[[Path, list[list[int]]], Any]:
    """Return a function that computes `last_hidden_state` with transformers alone."""
    import torch
    from transformers import BertModel

    def reference(folder: Path, ids: list[list[int]]) -> Any:
        model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
        tokens = torch.tensor(ids)
        with torch.inference_mode():
            output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        return output.last_hidden_state.numpy()

    return reference


@pytest.fixture(scope="session")
def bert_repository(tmp_path_factory: pytest.TempPathFactory, make_bert: MakeBert) -> Path:
    """A repository with twelve distinct tiny encoders, `bert-00` to `bert-11`."""
    root = tmp_path_factory.mktemp("repository")
    for number in range(12):
        make_bert(root / f"bert-{number:02}", number)
    return root


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that tests share, so that each model is packed once."""
    return tmp_path_factory.mktemp("cache")
