"""Processes that run nothing but their work, leave Ctrl-C to this one, and can be ended at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tisdpo_cli.data.spawning import Spawning

pytestmark = pytest.mark.slow

# Without a main guard.
SCRIPT = """\
import os
from pathlib import Path
Path(f"{os.getpid()}.started").touch()
from concurrent.futures import ProcessPoolExecutor
from tisdpo_cli.data.spawning import Spawning
pool = ProcessPoolExecutor(1, Spawning())
assert pool.submit(os.getpid).result() != os.getpid()
pool.shutdown()
assert Path(__file__).name == "script.py"
"""


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, timeout=60)
    assert len(list(tmp_path.glob("*.started"))) == 1


def blocked_signals(_: object) -> set[int]:
    return set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))


def test_a_new_process_is_not_interrupted_and_this_one_can_be() -> None:
    before = blocked_signals(None)
    main = sys.modules["__main__"]
    known = main.__spec__, getattr(main, "__file__", None)
    with ProcessPoolExecutor(1, Spawning()) as pool:
        assert signal.SIGINT in pool.submit(blocked_signals, None).result()
        assert blocked_signals(None) == before
    assert (main.__spec__, getattr(main, "__file__", None)) == known


def test_what_is_under_way_is_ended() -> None:
    spawning = Spawning()
    spawning.terminate()
    pool = ProcessPoolExecutor(1, spawning)
    assert pool.submit(os.getpid).result() in {child.pid for child in multiprocessing.active_children()}
    sleeping = pool.submit(time.sleep, 10**6)
    spawning.terminate()
    assert sleeping.exception(60) is not None
    pool.shutdown()
