"""What was meant with a repository in which nothing is."""

from __future__ import annotations

from pathlib import Path

from overcommit.runtime.hints import hint_of


def test_links_that_lead_in_circles_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "ant").symlink_to("bear")
    (tmp_path / "bear").symlink_to("ant")
    assert "holds no folder" in str(hint_of(str(tmp_path)))


def test_one_models_folder_is_told_from_a_repository(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / "ant").symlink_to("ant")
    assert "one model's folder" in str(hint_of(str(tmp_path)))
