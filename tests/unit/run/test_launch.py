"""Several processes for one function: what comes back, what goes wrong, who ends with whom."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regrow.errors import RunError, UserError
from regrow.launch import run_in_processes

WORK = '''
import os, signal, sys, time
from pathlib import Path
from regrow.errors import RunError, UserError

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def tell(word):
    print(f"rank {RANK} says {word}", file=sys.stderr)
    return {"word": word, "rank": RANK, "world": WORLD}


def fail(how):
    """The second process fails; the first one waits for it, as in a collective operation."""
    if RANK == 1:
        if how == "user":
            raise UserError("The corpus is empty; name another.")
        if how == "run":
            raise RunError("The loss is not finite; lower the learning rate.")
        if how == "bug":
            return {}["key"]
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)


def all_fail():
    raise UserError("Every process saw it; mend it.")


def linger(folder):
    Path(folder, f"pid-{os.getpid()}").touch()
    time.sleep(600)
'''
CALLER = """
import json, sys
from pathlib import Path
from regrow.launch import run_in_processes
folder = sys.argv[1]
run_in_processes("work:linger", {"folder": folder}, processes=2, folder=Path(folder, "f"), what="linger")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def launch(folder: Path, function: str, **arguments):
    return run_in_processes(
        f"work:{function}", arguments, processes=2, folder=folder / "processes", what="work"
    )


def test_returns_what_the_first_process_returns_and_only_that_one_is_heard(folder, capfd):
    assert launch(folder, "tell", word="héllo") == {"word": "héllo", "rank": 0, "world": 2}
    assert capfd.readouterr().err == "rank 0 says héllo\n"


@pytest.mark.parametrize(
    ("how", "kind", "sentence"),
    [
        ("user", UserError, "The corpus is empty; name another."),
        ("run", RunError, "The loss is not finite; lower the learning rate."),
        (
            "kill",
            RunError,
            "work: one of its processes was killed by signal 9; .* run the same command again",
        ),
    ],
)
def test_a_failure_of_one_process_is_one_sentence(folder, capfd, how, kind, sentence):
    with pytest.raises(kind, match=sentence):
        launch(folder, "fail", how=how)
    assert capfd.readouterr().err == ""


def test_a_failure_of_all_is_said_once_and_leaves_nothing_for_the_next_call(folder, capfd):
    with pytest.raises(UserError, match=r"^Every process saw it; mend it\.$"):
        launch(folder, "all_fail")
    assert capfd.readouterr().err == ""
    assert launch(folder, "tell", word="again")["word"] == "again"


def test_a_bug_keeps_its_traceback(folder, capfd):
    with pytest.raises(RunError, match="a bug; please report it"):
        launch(folder, "fail", how="bug")
    printed = capfd.readouterr().err
    assert printed.count("Traceback") == 1
    assert printed.endswith("KeyError: 'key'\n")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nobody_outlives_the_caller(folder, how):
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(folder)], stderr=subprocess.DEVNULL)
    pids = _eventually(lambda: len(found := list(folder.glob("pid-*"))) == 2 and found)
    pids = [int(path.name.removeprefix("pid-")) for path in pids]
    assert all(map(_runs, pids))
    caller.send_signal(how)
    caller.wait()
    assert _eventually(lambda: not any(map(_runs, pids)))
    assert json.loads((folder / "f" / "call.json").read_text())["function"] == "work:linger"


def _eventually(true, seconds: float = 240):
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found
    return found


def _runs(pid: int) -> bool:
    """Whether a process does; one that ended and that nobody waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
