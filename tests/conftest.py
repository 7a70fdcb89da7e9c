"""Models that are built on the spot: tiny, real, and different from each other."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MakeBert = Callable[[Path, int], None]
KeptFolder = Callable[[str], Path]

TESTS = Path(__file__).parent
LONGEST_FIRST = ("conformance", "chaos", "server", "bench")
# One process runs these, one after the other.  Some share a server, some make files in /dev/shm, and
# some look there for files that were left behind.
TOGETHER = ("conformance", "server/test_regions", "bench/test_scenarios", "bench/test_processes")

KEPT = "s-"  # how names of folders begin that outlive the file of tests that made them


def pytest_report_header() -> str:
    """Say what is free: on a full disk hundreds of tests fail, each for a reason that looks like another."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return f"free in {tempfile.gettempdir()}: {free / 1e9:.1f} GB (the whole suite takes up to 2)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders that take longest: who gets a long file last keeps the others waiting."""

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(TESTS).parts[0]
        return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share tests out by files, with those together that must not run beside each other."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER[0] if file.removeprefix("tests/").startswith(TOGETHER) else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def kept_folder(tmp_path_factory: pytest.TempPathFactory) -> KeptFolder:
    """Return a function that makes folders for fixtures of the session."""
    return lambda name: tmp_path_factory.mktemp(KEPT + name)


@pytest.fixture(scope="session", autouse=True)
def _temporary_files_of_our_own(kept_folder: KeptFolder) -> Iterator[None]:
    """What tests and their servers put into TMPDIR is gone with it, and no neighbour sees it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(kept_folder("t")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_folders_left(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Remove the folders of a file's tests behind the last one of them, unless one failed.

    All of them together are many gigabytes of models and images.
    """
    base, failed = tmp_path_factory.getbasetemp(), request.session.testsfailed
    before = set(base.iterdir())
    yield
    if request.session.testsfailed == failed:
        for folder in set(base.iterdir()) - before:
            if not folder.name.startswith(KEPT):
                shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _little_garbage_to_look_through() -> None:
    """Take what lives on out of the collector's sight: PyTorch and the tests are a million objects.

    A test that collects garbage a hundred times took a minute for it, not a second.
    """
    gc.collect()
    gc.freeze()


def _bert_maker(words: int, width: int) -> MakeBert:
    import torch
    from transformers import BertConfig, BertModel

    def make(folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=64,
        )
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)

    return make


@pytest.fixture(scope="session")
def make_bert() -> MakeBert:
    """Return a function that writes a tiny BERT encoder with seeded weights to a folder."""
    return _bert_maker(200, 32)


@pytest.fixture(scope="session")
def make_long_bert() -> MakeBert:
    """The same with weights that take two chunks."""
    return _bert_maker(4000, 128)


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
def bert_repository(kept_folder: KeptFolder, make_bert: MakeBert) -> Path:
    """A repository with twelve distinct tiny encoders, `bert-00` to `bert-11`."""
    root = kept_folder("repository")
    for number in range(12):
        make_bert(root / f"bert-{number:02}", number)
    return root


@pytest.fixture(scope="session")
def image_cache(kept_folder: KeptFolder) -> Path:
    """A cache folder that tests share, so that each model is packed once."""
    return kept_folder("cache")
