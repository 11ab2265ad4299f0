"""How every command ends: one clear line and the exit code, a traceback only for our own bugs.

Importing this module ends the program when another package named `kernels` was found: what a command imports next would
fail somewhere inside that one.
"""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import kernels
from trainer.errors import TrainingStopped, UserError

ROOT = Path(__file__).resolve().parent.parent


def run_command(command: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run `command(argv)` and exit: 0 done, 2 what the user can mend, 1 anything else."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not end a run over a letter
    sys.exit(exit_code(command, argv))


def exit_code(command: Callable[[list[str]], None], argv: list[str]) -> int:
    """Like `run_command`, but returns the code."""
    try:
        command(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: interrupted; start the same command again to resume", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def check_own_kernels() -> None:
    """Another installed package imports as `kernels` too; say so instead of failing somewhere inside."""
    found = Path(kernels.__file__ or "").resolve().parent
    if found != ROOT / "kernels":
        raise UserError(
            f"{found}: this is another package named kernels, Logratio's is {ROOT / 'kernels'}; "
            "start from the checkout or remove the other one (pip uninstall kernels)"
        )


if _code := exit_code(lambda argv: check_own_kernels(), []):
    sys.exit(_code)
