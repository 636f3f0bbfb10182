"""Jobs in several processes: all are done once, and nothing goes on that should have ended."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mindjax.train.loop import Interrupted, stop_signals
from mindjax.workers import side_by_side

JOBS = [(kind, number) for number in range(3) for kind in ("a", "b")]


def write(folder, job):
    kind, number = job
    if kind == "fails":
        raise ValueError("no such luck")
    if kind == "dies":
        os._exit(3)
    (folder / f"pid-{os.getpid()}").touch()
    wait_for(lambda: len(list(folder.glob("pid-*"))) == 2)  # no worker is through before the other has begun
    with (folder / f"{kind}-{number}").open("a") as file:
        file.write(f"{os.getpid()} {','.join(map(str, sorted(os.sched_getaffinity(0))))}\n")


def wait(folder, job):
    """Until a signal comes, which is written down as a run saves its state."""
    with stop_signals() as stop:
        (folder / f"begun-{job[1]}").write_text(str(os.getpid()))
        while not stop.wait(0.05):
            pass
    time.sleep(0.2)
    (folder / f"saved-{job[1]}").touch()
    raise Interrupted("saved")


def start(do, folder):
    return partial(do, Path(folder))


def wait_for(condition, seconds=120.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_every_job_is_done_once_and_a_worker_stays_with_its_kind_on_its_core(tmp_path):
    done = list(side_by_side(JOBS, partial(start, write, tmp_path), 2))
    assert sorted(done) == sorted(JOBS)
    lines = {path.name: path.read_text().splitlines() for path in tmp_path.glob("[ab]-*")}
    assert all(len(line) == 1 for line in lines.values()) and len(lines) == len(JOBS)
    pid, cores = zip(*(line[0].split() for line in lines.values()), strict=True)
    assert len(set(pid)) == 2 and str(os.getpid()) not in pid
    assert all("," not in core for core in cores)
    first = {kind: lines[f"{kind}-0"][0].split()[0] for kind in "ab"}
    assert len(set(first.values())) == 2, "the second worker took up the first one's kind"


@pytest.mark.parametrize(("kind", "message"), [("fails", "no such luck"), ("dies", "process of .* died")])
def test_a_failure_ends_all_and_says_what_it_was(tmp_path, kind, message):
    with pytest.raises(RuntimeError, match=message):
        list(side_by_side([(kind, 0)], partial(start, write, tmp_path), 2))


def test_a_signal_lets_every_worker_save_first(tmp_path):
    jobs = iter(side_by_side([("w", 0), ("w", 1)], partial(start, wait, tmp_path), 2))
    program = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "while len(list(Path(sys.argv[1]).glob('begun-*'))) < 2: time.sleep(0.05)\n"
        "os.kill(int(sys.argv[2]), signal.SIGTERM)"
    )
    with (
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(os.getpid())]),
        pytest.raises(Interrupted),
    ):
        next(jobs)
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\nfrom functools import partial\nimport test_workers as t\n"
        "if __name__ == '__main__': "
        "list(t.side_by_side([('w', 0), ('w', 1)], partial(t.start, t.wait, sys.argv[1]), 2))"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    with subprocess.Popen([sys.executable, str(script), str(tmp_path), str(Path(__file__).parent)]) as parent:
        wait_for(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
        parent.kill()
    workers = [int(path.read_text()) for path in tmp_path.glob("begun-*") if path.read_text()]
    assert len(workers) == 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)
    assert not list(tmp_path.glob("saved-*"))
