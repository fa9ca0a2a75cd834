"""One function in several processes at once, through torchrun's own launcher.

`run_in_processes` starts a launcher (`torch.distributed.run`), which starts the processes. Each calls the
function; what the first one returns, or what went wrong, comes back as a file. All of them hold the reading
end of a pipe whose other end is the caller's: when the caller is gone, however it ended, so are they.
"""

import gc
import importlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from regrow.errors import RegrowError, RunError, UserError
from regrow.files import disk_errors, read_json, write_json
from regrow.progress import say

# Of the environment, where the user says nothing else: DDP's warnings would come once per process.
_DEFAULTS = {"TORCH_CPP_LOG_LEVEL": "ERROR"}


def run_in_processes(
    function: str, arguments: dict[str, Any], *, processes: int, folder: Path, what: str
) -> Any:
    """Call a function in several processes and return what the first one returns.

    Args:
        function: `module:name`; called under torchrun's environment (`RANK`, `WORLD_SIZE` ...).
        arguments: its keyword arguments, JSON.
        processes: how many.
        folder: for the files that go to and fro; emptied first.
        what: the work's name in messages.

    Raises:
        UserError, RunError: what the function raised in one of the processes, or one of them died.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with disk_errors(folder):
        folder.mkdir(parents=True)
    write_json(folder / "call.json", {"function": function, "arguments": arguments})
    _free_gpu()
    cores = os.cpu_count() or 1
    launcher = subprocess.Popen(
        [sys.executable, "-m", "regrow.launch", "start", str(processes), str(folder)],
        env=_DEFAULTS | {"OMP_NUM_THREADS": str(max(1, cores // processes))} | os.environ,
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C comes to the caller alone, which ends the others
    )
    assert launcher.stdin is not None
    try:
        code = launcher.wait()
    finally:
        launcher.stdin.close()
        launcher.wait()
    if code != 0:
        _raise_failure(folder, code, what)
    return read_json(folder / "result.json")


def _free_gpu() -> None:
    """Give back what earlier work of this process left in torch's cache: the others need the memory."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _raise_failure(folder: Path, code: int, what: str) -> None:
    """Raise what the processes left behind; the first explanation counts, the others follow from it."""
    paths = sorted(folder.glob("failure-*.json"), key=lambda path: path.stat().st_mtime_ns)
    failures = [read_json(path) for path in paths]
    for failure in failures:
        if "message" in failure:
            kind = UserError if failure["exit_code"] == UserError.exit_code else RunError
            raise kind(failure["message"])
    killed = -code if code < 0 else code - 128
    if failures and killed <= 0:
        say(failures[0]["traceback"].rstrip())
        raise RunError(f"{what}: one of its processes failed with the error above, a bug; please report it.")
    died = f"was killed by signal {killed}" if killed > 0 else f"ended with exit code {code}"
    raise RunError(
        f"{what}: one of its processes {died}; if memory ran out, use fewer processes or smaller batches, "
        "and run the same command again: it goes on from the last checkpoint."
    )


def _start(processes: str, folder: str) -> None:
    """The launcher: start the processes, wait for them, and leave with the exit code of the worst."""
    _end_with_caller()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # its tables of exit codes: the caller says it in a sentence
    try:
        run.main(
            [
                "--standalone",
                "--local-addr=localhost",
                f"--nproc-per-node={processes}",
                f"--log-dir={folder}",
                "--module",
                "regrow.launch",
                "call",
                folder,
            ]
        )
    except ChildFailedError as error:
        # A killed process has a negative code. Others fail because it is gone, or got SIGTERM from here.
        codes = {failure.exitcode for failure in error.failures.values()}
        code = min(codes - {-signal.SIGTERM} or codes)
        sys.exit(code if code > 0 else 128 - code)


def _call(folder: Path) -> None:
    """One of the processes: call the function; the first one keeps what it returns and is the one heard."""
    _end_with_caller()
    rank = int(os.environ["RANK"])
    if rank != 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    call = read_json(folder / "call.json")
    module, _, name = call["function"].partition(":")
    try:
        with disk_errors(folder, only_full=True):
            result = getattr(importlib.import_module(module), name)(**call["arguments"])
            if rank == 0:
                write_json(folder / "result.json", result)
    except Exception as error:
        failure = (
            {"message": str(error), "exit_code": error.exit_code}
            if isinstance(error, RegrowError)
            else {"traceback": traceback.format_exc()}
        )
        write_json(folder / f"failure-{rank}.json", failure)
        os._exit(1)  # at once: an orderly end may wait for the other processes, which wait for this one
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _end_with_caller() -> None:
    """End this process when the caller closes its end of standard input or dies."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: it returns at the pipe's end
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1] == "start":
        _start(*sys.argv[2:])
    else:
        _call(Path(sys.argv[2]))
