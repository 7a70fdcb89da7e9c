"""Checkpoints: which files, which names, which types; and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from overcommit.runtime import checkpoint, checkpoint_files
from overcommit.runtime.errors import RepositoryError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("table", torch.arange(2.0), persistent=False)
        self.register_buffer("kept", torch.zeros(2))


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.rand_like(value.float()) for name, value in Net().state_dict().items()} | {
        "norm.num_batches_tracked": torch.tensor(3)
    }


def test_everything_is_filled_and_extra_keys_are_left_out() -> None:
    module, given = Net(), tensors()
    checkpoint.fill(module, {**given, "embeddings.position_ids": torch.arange(3)}, "m")
    for name, value in module.state_dict().items():
        assert torch.equal(value, given[name])
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(module.table, torch.arange(2.0))


@pytest.mark.parametrize("name", ["first.weight", "norm.running_mean", "kept"])
def test_what_is_missing_is_named(name: str) -> None:
    given = tensors()
    del given[name]
    with pytest.raises(RepositoryError, match=name):
        checkpoint.fill(Net(), given, "m")


def test_a_counter_that_old_checkpoints_lack_is_not_missed() -> None:
    given = tensors()
    del given["norm.num_batches_tracked"]
    checkpoint.fill(Net(), given, "m")


def test_another_shape_is_refused_and_another_float_is_cast() -> None:
    with pytest.raises(RepositoryError, match=r"first.bias.*\(3,\)"):
        checkpoint.fill(Net(), {**tensors(), "first.bias": torch.zeros(3)}, "m")
    with pytest.raises(RepositoryError, match=r"torch\.int64 in the checkpoint"):
        checkpoint.fill(Net(), {**tensors(), "first.bias": torch.zeros(2, dtype=torch.int64)}, "m")
    module = Net()
    checkpoint.fill(module, {**tensors(), "first.bias": torch.ones(2).half()}, "m")
    assert module.first.bias.dtype is torch.float32


def test_old_names_of_a_norm_are_known() -> None:
    given = tensors()
    given["norm.gamma"], given["norm.beta"] = given.pop("norm.weight"), given.pop("norm.bias")
    module = Net()
    checkpoint.fill(module, given, "m")
    assert torch.equal(module.norm.weight, given["norm.gamma"])


def test_a_prefix_is_added_or_cut_when_no_name_fits() -> None:
    module, given = Net(), tensors()
    module.base_model_prefix = "base"  # type: ignore[assignment]
    checkpoint.fill(module, {f"base.{name}": value for name, value in given.items()}, "m")
    assert torch.equal(module.first.weight, given["first.weight"])


def test_tied_weights_need_one_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 2)
            self.head = nn.Linear(2, 3, bias=False)

        def tie_weights(self) -> None:
            self.head.weight = self.embed.weight

    module = Tied()
    checkpoint.fill(module, {"embed.weight": torch.ones(3, 2)}, "m")
    assert module.head.weight is module.embed.weight
    with pytest.raises(RepositoryError, match="lacks"):
        checkpoint.fill(Tied(), {}, "m")


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    for name in ("a", "b", "adapter"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    names = {path.name for path in checkpoint_files.files_in(tmp_path)}
    assert names == {"a.safetensors", "b.safetensors", "adapter.safetensors"}
    index = tmp_path / checkpoint_files.INDEX_FILE
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    assert [path.name for path in checkpoint_files.files_in(tmp_path)] == [
        "a.safetensors",
        "b.safetensors",
    ]


def test_the_whole_file_wins_over_its_neighbours(tmp_path: Path) -> None:
    for name in ("adapter", "model"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    assert [path.name for path in checkpoint_files.files_in(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "gone.safetensors"}}',
    ],
)
def test_a_wrong_index_is_refused_and_never_leaves_the_folder(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (folder / checkpoint_files.INDEX_FILE).write_text(content)
    with pytest.raises(RepositoryError, match=r"index|names"):
        checkpoint_files.files_in(folder)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(RepositoryError, match="cannot be read as safetensors"):
        checkpoint.read([path])
