"""The two ways in which a regrow command fails on purpose.

Every message is one sentence that names the thing at fault and the remedy; the command line prints it
without a traceback.
"""


class RegrowError(Exception):
    """A failure that is explained; the command exits with `exit_code`."""

    exit_code = 1


class UserError(RegrowError):
    """Something the user gave cannot be used (exit 2): an argument, a recipe, a corpus, a checkpoint."""

    exit_code = 2


class RunError(RegrowError):
    """Something went wrong while running (exit 1): NaN loss, full disk, a process that died."""
