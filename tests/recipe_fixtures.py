"""What tests of recipes share: the stages of a recipe on real data, and its small form run, killed and run again."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

from data_tools.pipeline_recipe import read_recipe
from data_tools.pipeline_stages import Step, check

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"


def steps_of(recipe: Path, settings: Mapping[str, object]) -> list[Step]:
    """All stages of a recipe with their placeholders filled in and its files looked for. Raises UserError."""
    return check(read_recipe(recipe, [f"{key}={value}" for key, value in settings.items()]))


def table(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


class Run:
    """A recipe in its small form, run by the command that its README names."""

    def __init__(self, recipe: Path, settings: Mapping[str, object], work: Path) -> None:
        self.work = work
        sets = [text for key, value in {**settings, "work": work}.items() for text in ("--set", f"{key}={value}")]
        self.command = [sys.executable, "-m", "data_tools.pipeline", str(recipe), *sets]

    def start(self, *options: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*self.command, *options], cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *options: str) -> str:
        process = self.start(*options)
        out, _ = process.communicate()
        assert process.returncode == 0, out
        return out

    def killed_once_there_is(self, path: Path) -> None:
        """Start, and kill -9 the pipeline as soon as a sampling stage has written a first row."""
        process = self.start()
        while not (path.is_file() and path.stat().st_size):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()


def stages_run(out: str) -> list[str]:
    """Names of the stages that a pipeline's output says were run."""
    return re.findall(r"^(.+?): done in ", out, re.MULTILINE)
