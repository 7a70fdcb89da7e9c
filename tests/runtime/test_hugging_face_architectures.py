"""Folders of several architectures, as `save_pretrained` writes them, answer as `from_pretrained` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack_rig import Opened, packed

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
SEEN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
HEARD = {
    **SEEN,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
# Class, configuration; the class of the configuration follows from it.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "RobertaForSequenceClassification": {**TEXT, "pad_token_id": 1},
    "DistilBertForTokenClassification": {
        "vocab_size": 100,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 64,
    },
    "DebertaV2ForSequenceClassification": {
        **TEXT,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "ModernBertModel": {
        **TEXT,
        **dict.fromkeys(("cls_token_id", "bos_token_id"), 1),
        **dict.fromkeys(("sep_token_id", "eos_token_id"), 2),
        "pad_token_id": 0,
    },
    # Their checkpoints have names that this transformers only knows how to rename.
    "ViTForImageClassification": {**SEEN, "image_size": 32, "patch_size": 8},
    "YolosForObjectDetection": {
        **SEEN,
        "image_size": [32, 32],
        "patch_size": 8,
        "num_detection_tokens": 5,
    },
    "ResNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "Wav2Vec2ForCTC": {**HEARD, "vocab_size": 20},
    "ASTForAudioClassification": {**SEEN, "max_length": 64, "num_mel_bins": 32},
}


def example(spec: Any) -> np.ndarray:
    rng = np.random.default_rng(5)
    sizes = {"batch": 2, "sequence": 3000 if spec.name == "input_values" else 9}
    axes = zip(spec.shape, spec.axes, strict=True)
    shape = [sizes[axis] if size < 0 else size for size, axis in axes]
    if spec.datatype == "FP32":
        return rng.standard_normal(shape).astype(np.float32)
    if spec.name.endswith("mask"):
        return np.ones(shape, np.int64)
    return rng.integers(3, 90, shape)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_answers_as_from_pretrained_does(architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, architecture)
    torch.manual_seed(1)
    folder = tmp_path / "model"
    cls(cls.config_class(**ARCHITECTURES[architecture])).eval().save_pretrained(folder)
    done = packed(folder, tmp_path / "cache")
    specs = [spec for spec in done.config.inputs if not spec.optional]
    feed = {spec.name: example(spec) for spec in specs}
    reference = cls.from_pretrained(folder).eval()
    with torch.inference_mode():
        wanted = reference(**{name: torch.tensor(array) for name, array in feed.items()})
    got = Opened(done).model.run(feed)
    assert got
    for name, array in got.items():
        np.testing.assert_allclose(array, wanted[name].numpy(), atol=2e-5, err_msg=name)
