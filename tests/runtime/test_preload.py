"""Preloading: one thread, CUDA untouched, and an honest self-check."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest

from overcommit.runtime import preload


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fresh_process_has_one_thread_and_no_cuda_after_preloading() -> None:
    assert (
        run(
            """
        import gc, os, sys
        from overcommit.runtime import preload
        preload.preload(("json", "no_such_module_at_all"))
        assert "torch" in sys.modules
        assert all(os.environ[k] == v for k, v in preload.PRELOAD_THREAD_ENV.items())
        assert gc.get_freeze_count() > 10_000
        print(preload.self_check())
        """
        )
        == "None\n"
    )


def test_a_child_of_a_preloaded_process_computes() -> None:
    assert (
        run(
            """
        import os
        from overcommit.runtime import preload
        preload.preload(())
        child = os.fork()
        if child == 0:
            import torch
            from overcommit.runtime import engines
            engines.set_up(2)
            os._exit(0 if float((torch.ones(300, 300) @ torch.ones(300, 300))[0, 0]) == 300 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
        )
        == "0\n"
    )


def test_a_second_thread_fails_the_self_check() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        reason = preload.self_check()
    finally:
        stop.set()
        thread.join()
    assert reason is not None
    assert "threads" in reason


def test_an_initialised_cuda_fails_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("os.listdir", lambda path: ["1"])
    assert preload.self_check() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    reason = preload.self_check()
    assert reason is not None
    assert "CUDA" in reason


def test_only_modules_of_transformers_are_imported_on_an_images_word() -> None:
    bert = "transformers.models.bert.modeling_bert"
    assert preload.modules_of({"kind": "hugging_face", "module": bert}) == (bert,)
    outputs = "transformers.modeling_outputs"
    assert preload.modules_of({"kind": "export", "modules": outputs}) == (outputs,)
    assert preload.modules_of({"kind": "export", "modules": ""}) == ()
    assert preload.modules_of({"kind": "hugging_face", "module": "antigravity"}) == ()
    assert preload.modules_of({"kind": "user", "module": bert}) == ()
