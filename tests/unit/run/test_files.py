"""Folders and files are finished or absent."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from regrow.errors import RunError, UserError
from regrow.files import (
    disk_errors,
    publish_folder,
    read_json,
    require_new_folder,
    sha256_file,
    sha256_json,
    write_json,
)


def test_folder_appears_only_when_whole(tmp_path):
    with publish_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "a"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_failed_block_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), publish_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_killed_process_leaves_no_result(tmp_path):
    code = (
        "import sys, time; from regrow.files import publish_folder\n"
        "with publish_folder(sys.argv[1]) as p:\n"
        "    (p / 'config.json').write_text('{}'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.01)
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
    with publish_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
    assert (tmp_path / "out" / "a").exists()


def test_existing_results_are_never_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "broken"):
        with pytest.raises(UserError):
            require_new_folder(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert require_new_folder(tmp_path / "empty") == tmp_path / "empty"


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [(errno.ENOSPC, RunError, "disk is full"), (errno.EROFS, UserError, "cannot be written")],
)
def test_disk_errors_are_one_sentence(tmp_path, code, kind, words):
    with pytest.raises(kind, match=words), disk_errors(tmp_path / "out"):
        raise OSError(code, os.strerror(code))


def test_full_disk_is_named_and_other_errors_of_a_block_pass_through(tmp_path):
    with pytest.raises(RunError, match="disk is full"), publish_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "no space")
    with pytest.raises(FileNotFoundError), publish_folder(tmp_path / "out"):
        (tmp_path / "missing input").read_text()
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_hold_a_result(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), publish_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(UserError, match="folder does not exist"):
        write_json(tmp_path / "nowhere" / "x.json", {})


def test_json_round_trip_and_refusals(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"ä": [1, 2.5, None]})
    assert read_json(path) == {"ä": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"ä": [1, 2.5, None]}
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="not readable JSON"):
            read_json(path)
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_hashes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == known
    assert sha256_json({"b": 1, "a": [2]}) == sha256_json({"a": [2], "b": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": "1"})
