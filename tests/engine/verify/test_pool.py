"""Comparisons in processes that may hang, crash and be killed: what is lost, and that nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tempo_engine.errors import Halted, UserError
from tempo_engine.verify import pool as module
from tempo_engine.verify import worker
from tempo_engine.verify.pool import Pool

HANG = ("9^{9^{9^9}}", "7")
EASY = ("0.5", r"\frac{1}{2}")
STAND_IN = "import os, sys, time\n"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One worker for the whole file: it takes a while to load."""
    pool = Pool(1, seconds=1.0)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _nothing_counted(pool: Pool) -> None:
    pool.metrics()
    pool._known.clear()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """stand_in(code): this instead of the worker."""

    def use(code: str) -> Path:
        file = tmp_path / "worker.py"
        file.write_text(STAND_IN + code, encoding="utf-8")
        monkeypatch.setattr(module, "__file__", str(tmp_path / "pool.py"))
        return file

    return use


def counts(pool: Pool) -> tuple[float, ...]:
    """Compared, cached, timeouts, crashes."""
    return tuple(pool.metrics().values())


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(what: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return what()


def test_no_worker_starts_before_there_is_something_to_compare():
    pool = Pool(4)
    assert pool.compare([]) == []
    assert pool.workers == []
    assert list(pool.metrics()) == ["verify/compared", "verify/cached", "verify/timeouts", "verify/crashes"]


def test_results_come_in_order_and_each_pair_is_compared_once(pool: Pool):
    wrong = ("0.25", r"\frac{1}{2}")
    assert pool.compare([EASY, wrong, EASY, wrong]) == [1.0, 0.0, 1.0, 0.0]
    assert pool.compare([wrong, EASY]) == [0.0, 1.0]
    assert counts(pool) == (2, 4, 0, 0)
    assert counts(pool) == (0, 0, 0, 0), "they are of the time since the last call"


def test_what_is_kept_is_bounded_and_the_oldest_goes(pool: Pool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    a, b, c = (EASY, ("x + 1", "1 + x"), ("2x", "x + x"))
    assert pool.compare([a, b]) == [1.0, 1.0]
    assert pool.compare([a, c]) == [1.0, 1.0], "a was asked for again, so b is the oldest"
    assert list(pool._known) == [a, c]
    assert pool.compare([a, b, c]) == [1.0, 1.0, 1.0], "more than are kept at a time"


def test_a_hang_costs_one_process_and_nothing_else(pool: Pool):
    pool.compare([EASY])
    keeper = pool.workers[0].process
    (before,) = psutil.Process(keeper.pid).children()
    assert pool.compare([HANG, ("x + 1", "1 + x")]) == [0.0, 1.0]
    (after,) = psutil.Process(keeper.pid).children()
    assert (pool.workers[0].process, keeper.poll()) == (keeper, None)
    assert after.pid != before.pid
    assert ended(before.pid)
    assert counts(pool) == (3, 0, 1, 0)
    assert pool.compare([HANG]) == [0.0]
    assert counts(pool) == (0, 1, 0, 0), "nobody waits for it twice"


def test_a_process_killed_while_it_compares_gets_the_pair_again(stand_in: Callable[[str], Path]):
    """It dies at its first request, as if memory had run out, and a new one answers."""
    stand_in(
        "mark = sys.argv[0] + '.died'\nos.write(1, b'r\\n')\nwhile sys.stdin.readline():\n"
        "    if not os.path.exists(mark):\n        open(mark, 'w').close()\n        sys.exit(1)\n    os.write(1, b'1\\n')\n"
    )
    pool = Pool(1)
    assert pool.compare([EASY]) == [1.0]
    assert counts(pool) == (1, 0, 0, 0)
    pool.close()


def test_a_pair_that_crashes_every_process_is_worth_nothing(stand_in: Callable[[str], Path]):
    stand_in("os.write(1, b'r\\n')\nwhile 'boom' not in sys.stdin.readline():\n    os.write(1, b'1\\n')\n")
    pool = Pool(1)
    assert pool.compare([("boom", "7"), EASY]) == [0.0, 1.0]
    assert counts(pool) == (2, 0, 0, 1)
    pool.close()


def test_processes_that_end_before_they_listen_stop_the_run(stand_in: Callable[[str], Path]):
    stand_in("sys.exit(3)\n")
    pool = Pool(2)
    with pytest.raises(Halted, match="end before they begin"):
        pool.compare([EASY, HANG])
    assert pool.workers == []


def test_a_missing_library_is_named(stand_in: Callable[[str], Path]):
    stand_in("os.write(1, b'x\\n')\ntime.sleep(60)\n")
    pool = Pool(1)
    with pytest.raises(UserError, match="pip install math-verify"):
        pool.compare([EASY])
    assert pool.workers == []


def test_a_worker_killed_while_idle_is_replaced(pool: Pool):
    pool.compare([EASY])
    keeper = psutil.Process(pool.workers[0].process.pid)
    (child,) = keeper.children()
    child.kill()
    assert wait_for(lambda: any(c.pid != child.pid for c in keeper.children()))
    assert pool.compare([("x + 1", "1 + x")]) == [1.0]
    os.killpg(keeper.pid, signal.SIGKILL)
    pool.workers[0].process.wait()
    assert pool.compare([("2x", "x + x")]) == [1.0]
    assert counts(pool)[2:] == (0, 0)


def test_a_closed_pool_leaves_no_process_and_opens_again():
    pool = Pool(1)
    assert pool.compare([EASY]) == [1.0]
    keeper = psutil.Process(pool.workers[0].process.pid)
    family = [keeper.pid, *(c.pid for c in keeper.children())]
    pool.close()
    assert wait_for(lambda: all(map(ended, family)))
    assert pool.compare([("x + 1", "1 + x")]) == [1.0]
    pool.close()


def test_workers_end_when_their_parent_is_killed():
    code = (
        "import time\nfrom tempo_engine.verify.pool import Pool\npool = Pool(1)\npool.compare([('x + 1', '1 + x')])\n"
        "print(pool.workers[0].process.pid, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        keeper = psutil.Process(int(parent.stdout.readline()))
        family = [keeper.pid, *(c.pid for c in keeper.children())]
        assert len(family) == 2
        parent.kill()
    assert wait_for(lambda: all(map(ended, family)))


def test_a_hang_without_a_parent_ends_with_its_cpu_time():
    command = [sys.executable, "-P", worker.__file__, "0.1", str(2 << 30)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdin
        assert keeper.stdout
        assert keeper.stdout.readline() == b"r\n"
        keeper.stdin.write(json.dumps(HANG).encode() + b"\n")
        keeper.stdin.close()
        assert keeper.stdout.read() == b"r\n", "the next process, which finds that there is nothing more to do"
        assert keeper.wait(60) == 0


def test_memory_is_bounded(stand_in: Callable[[str], Path]):
    """With 600 MB, a comparison that wants more is wrong or crashes; the next one is right."""
    code = Path(worker.__file__).read_text(encoding="utf-8").replace(
        "compare = load()", "compare = lambda answer, gold: answer == gold and (answer != 'much' or bool(bytes(1 << 30)))"
    )  # fmt: skip
    file = stand_in("")
    file.write_text(code, encoding="utf-8")
    pool = Pool(1, memory=600 << 20)
    assert pool.compare([("much", "much"), ("7", "7")]) == [0.0, 1.0]
    assert counts(pool) == (2, 0, 0, 1)
    pool.close()
