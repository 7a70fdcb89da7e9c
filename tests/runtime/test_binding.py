"""Binding: every registered tensor comes from the mapping, and what does not fit is refused."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overcommit.runtime.engines import binding, manifest
from overcommit.runtime.errors import ImageError
from overcommit.runtime.image import TensorEntry, lay_out


class Odd(nn.Module):
    """Tied weights, a non-persistent buffer, a scalar, a bfloat16, a child used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.twice = nn.Linear(4, 4)
        self.again = self.twice
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.narrow = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("position", torch.arange(5), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.again(self.twice(self.embed(ids))) * self.scale + self.position[1]
        return self.head(x) + self.narrow.float().sum() + self.mask.sum()


def place(module: nn.Module) -> tuple[tuple[TensorEntry, ...], mmap.mmap]:
    """Write a module's image into fresh anonymous memory."""
    facts, tensors = manifest.scan(module)
    entries, nbytes = lay_out(facts)
    memory = mmap.mmap(-1, nbytes)
    for entry in entries:
        if entry.alias_of is None:
            data = manifest.tensor_bytes(tensors[entry.name])
            memory[entry.offset : entry.offset + entry.nbytes] = bytes(data)
    return entries, memory


def skeleton(cls: type[nn.Module] = Odd) -> nn.Module:
    with torch.device("meta"):
        return cls().eval()


def address_of(memory: mmap.mmap) -> int:
    return torch.frombuffer(memoryview(memory), dtype=torch.uint8).data_ptr()


def test_a_bound_module_answers_as_the_real_one_and_lies_inside_the_mapping() -> None:
    torch.manual_seed(0)
    real = Odd().eval()
    entries, memory = place(real)
    bound = binding.Skeleton(skeleton()).bind(entries, memoryview(memory))
    ids = torch.randint(0, 10, (2, 3))
    assert torch.equal(bound(ids), real(ids))
    start = address_of(memory)
    for name, _, _, tensor in manifest.registered(bound):
        assert start <= tensor.data_ptr() < start + len(memory), name


def test_aliases_are_one_object_and_take_room_once() -> None:
    entries, memory = place(Odd())
    bound = binding.Skeleton(skeleton()).bind(entries, memoryview(memory))
    assert bound.head.weight is bound.embed.weight  # type: ignore[union-attr]
    assert bound.again is bound.twice
    assert {e.name: e.alias_of for e in entries}["head.weight"] == "embed.weight"


def test_the_manifest_lists_non_persistent_buffers() -> None:
    entries, _ = place(Odd())
    roles = {entry.name: (entry.role, entry.persistent) for entry in entries}
    assert roles["position"] == ("buffer", False)
    assert roles["mask"] == ("buffer", True)
    assert roles["scale"] == ("parameter", True)


def test_a_manifest_without_a_buffer_is_refused_where_torch_would_be_silently_wrong() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    real = BertModel(config, add_pooling_layer=False).eval()
    entries, memory = place(real)
    with torch.device("meta"):
        meta = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 50, (1, 8))
    # What the trap looks like: only the state dict is bound, nothing is raised, the answer is off.
    state = binding.views(entries, memoryview(memory))
    with torch.device("meta"):
        trapped = BertModel(config, add_pooling_layer=False).eval()
    persistent = {k: v for k, v in state.items() if k in real.state_dict()}
    trapped.load_state_dict(persistent, assign=True, strict=False)
    assert any(tensor.is_meta for _, _, _, tensor in manifest.registered(trapped))
    # And what bind does about it.
    partial = [entry for entry in entries if entry.persistent]
    with pytest.raises(ImageError, match="position_ids"):
        binding.Skeleton(meta).bind(partial, memoryview(memory))
    bound: Any = binding.Skeleton(meta).bind(entries, memoryview(memory))
    with torch.inference_mode():
        got, want = bound(input_ids=ids)[0], real(input_ids=ids)[0]
    assert torch.equal(got, want)


def test_llama_with_its_rotary_buffers_is_bit_equal() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    real = LlamaForCausalLM(config).eval()
    entries, memory = place(real)
    assert any("inv_freq" in entry.name for entry in entries)
    with torch.device("meta"):
        meta = LlamaForCausalLM(config).eval()
    bound: Any = binding.Skeleton(meta).bind(entries, memoryview(memory))
    ids = torch.randint(0, 50, (2, 6))
    with torch.inference_mode():
        assert torch.equal(bound(input_ids=ids).logits, real(input_ids=ids).logits)


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "extra"])
def test_an_image_that_is_not_this_programs_is_refused(change: str) -> None:
    entries, memory = place(Odd())
    index = next(i for i, e in enumerate(entries) if e.name == "twice.weight")
    kept = list(entries)
    old = kept[index]
    changed = {
        "name": TensorEntry("other", *list_of(old)[1:]),
        "shape": TensorEntry(*list_of(old)[:4], (2, 8), (8, 1), *list_of(old)[6:]),
        "dtype": TensorEntry(*list_of(old)[:3], "int32", *list_of(old)[4:]),
        "extra": TensorEntry("extra", *list_of(old)[1:]),
    }[change]
    if change == "extra":
        kept.append(changed)
    else:
        kept[index] = changed
    with pytest.raises(ImageError):
        binding.Skeleton(skeleton()).bind(kept, memoryview(memory))


def list_of(entry: TensorEntry) -> list[Any]:
    return [getattr(entry, name) for name in entry.__struct_fields__]


def test_two_variants_share_a_skeleton_and_nothing_else() -> None:
    torch.manual_seed(1)
    one, two = Odd().eval(), Odd().eval()
    shared = skeleton()
    placed = [place(module) for module in (one, two)]
    bound = [
        binding.Skeleton(shared).bind(entries, memoryview(memory)) for entries, memory in placed
    ]
    ids = torch.randint(0, 10, (2, 3))
    assert torch.equal(bound[0](ids), one(ids))
    assert torch.equal(bound[1](ids), two(ids))
    assert not torch.equal(one(ids), two(ids))
    assert all(tensor.is_meta for _, _, _, tensor in manifest.registered(shared))


def test_other_bytes_at_the_same_address_are_the_other_models_answer() -> None:
    torch.manual_seed(2)
    one, two = Odd().eval(), Odd().eval()
    entries, memory = place(one)
    _, other = place(two)
    bound = binding.Skeleton(skeleton()).bind(entries, memoryview(memory))
    ids = torch.randint(0, 10, (2, 3))
    assert torch.equal(bound(ids), one(ids))
    memory[:] = other[:]
    assert torch.equal(bound(ids), two(ids))


def test_a_mapping_cannot_be_closed_under_its_tensors() -> None:
    entries, memory = place(Odd())
    bound = binding.Skeleton(skeleton()).bind(entries, memoryview(memory))
    with pytest.raises(BufferError):
        memory.close()
    assert bound is not None


def test_a_tensor_outside_the_image_is_refused() -> None:
    entries, memory = place(Odd())
    with pytest.raises(ImageError, match="does not fit"):
        binding.views(entries, memoryview(memory)[:64])


def test_a_plain_tensor_attribute_is_warned_about_and_bound_all_the_same() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loose = torch.arange(3.0)

    with pytest.warns(UserWarning, match="loose"):
        entries, memory = place(Loose())
    bound = binding.Skeleton(skeleton(Loose)).bind(entries, memoryview(memory))
    assert torch.equal(bound.loose, torch.arange(3.0))  # type: ignore[arg-type]


def test_a_tensor_in_a_container_is_warned_about_and_never_left_on_meta() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = {"a": [torch.ones(2)]}

    with pytest.warns(UserWarning, match="tables"):
        entries, memory = place(Hidden())
    with pytest.raises(ImageError, match="tables"):
        binding.Skeleton(skeleton(Hidden)).bind(entries, memoryview(memory))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(12.0).reshape(3, 4)[:, 1:3],
        torch.arange(3.0).expand(4, 3),
        torch.tensor(5.0),
        torch.empty(0, 3),
    ],
    ids=["channels-last", "transposed", "slice", "expanded", "scalar", "empty"],
)
def test_every_layout_is_bound_with_its_values(tensor: torch.Tensor) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", tensor)

    real = Held()
    entries, memory = place(real)
    shared = Held()
    held = binding.Skeleton(shared, entries).bind(entries, memoryview(memory)).held
    assert shared.held.is_meta  # type: ignore[union-attr]
    assert torch.equal(held, tensor)  # type: ignore[arg-type]
    if manifest.fills_its_bytes(tensor.shape, tensor.stride()):
        assert held.stride() == tensor.stride()  # type: ignore[operator, union-attr]


def test_strides_that_differ_from_the_programs_are_refused() -> None:
    entries, memory = place(Odd())
    kept = [
        TensorEntry(*list_of(e)[:5], (1, 4), *list_of(e)[6:]) if e.name == "twice.weight" else e
        for e in entries
    ]
    with pytest.raises(ImageError, match="stride"):
        binding.Skeleton(skeleton()).bind(kept, memoryview(memory))


def test_strides_that_reach_beyond_the_entry_are_refused() -> None:
    entries, memory = place(Odd())
    kept = [
        TensorEntry(*list_of(e)[:5], (9, 1), *list_of(e)[6:]) if e.name == "twice.weight" else e
        for e in entries
    ]
    with pytest.raises(ImageError, match="does not fit"):
        binding.views(kept, memoryview(memory))


def test_a_write_to_mapped_weights_kills_the_writer(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import mmap, os, torch
        fd = os.memfd_create("weights"); os.ftruncate(fd, 4096)
        memory = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)
        tensor = torch.frombuffer(memoryview(memory), dtype=torch.float32)
        print("writing", flush=True)
        tensor += 1
        print("survived", flush=True)
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.stdout == b"writing\n"
    assert done.returncode == -signal.SIGSEGV


def test_modules_that_only_a_list_holds_are_refused_on_meta() -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(2, 2)]

    with pytest.warns(UserWarning, match="layers"):
        entries, memory = place(Hides())
    with pytest.raises(ImageError, match="layers"):
        binding.Skeleton(skeleton(Hides)).bind(entries, memoryview(memory))


def test_a_bound_module_is_not_changed_by_its_sibling() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.seen: list[int] = []
            self.by_key: dict[str, list[int]] = {"a": []}

    entries, memory = place(Remembers())
    shared = binding.Skeleton(skeleton(Remembers), entries)
    one, two = (shared.bind(entries, memoryview(memory)) for _ in range(2))
    one.seen.append(1)  # type: ignore[operator, union-attr]
    one.by_key["a"].append(1)  # type: ignore[index, operator, union-attr]
    one.extra = nn.Linear(1, 1)
    assert two.seen == []
    assert two.by_key == {"a": []}
    assert not hasattr(two, "extra")
    assert not hasattr(shared.module, "extra")
