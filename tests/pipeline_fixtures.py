"""A small recipe of real commands for tests of the pipeline, and ways to run it, kill it and look at what it left.

The commands are slow on purpose and write as Logratio's own do: whole files by rename, or rows appended in two pieces
(so that a kill tears some), cut and gone on with by the next start. Two at once on one file would be noticed.
"""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = '''
import fcntl, json, os, sys, time
from pathlib import Path

def whole(path, text):
    part = Path(path + ".part")
    part.write_text(text)
    os.replace(part, path)

def questions(out, count):
    time.sleep(0.1)
    rows = [{"id": f"q{i}", "prompt": f"{i} + {i} = ?", "gold": 2 * i} for i in range(int(count))]
    whole(out, "".join(json.dumps(row) + "\\n" for row in rows))

def draw(asked, out, model, delay):
    """Every question answered; those of odd number are wrong but in `good` models."""
    file = open(out, "ab+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Path(out).with_name("CLASH").write_text("two at once")
        sys.exit(5)
    file.seek(0)
    content = file.read()
    whole_rows = content[: content.rfind(b"\\n") + 1]
    file.truncate(len(whole_rows))
    ids = [json.loads(line)["id"] for line in Path(asked).read_text().splitlines()]
    for number in range(whole_rows.count(b"\\n"), len(ids)):
        value = 2 * number + (number % 2 and "good" not in model)
        row = {"id": ids[number], "sample": 0, "text": f"It is {value}.", "finish_reason": "stop", "model": model,
               "settings_digest": "s1", "prompt_digest": "p", "prompt_tokens": 7, "completion_tokens": 5}
        data = (json.dumps(row) + "\\n").encode()
        for piece in (data[:30], data[30:]):
            os.write(file.fileno(), piece)
            time.sleep(float(delay))
    print(f"{len(ids)} answered")

def decide(verdicts, out, stop_at, turn):
    right = Path(verdicts).read_text().count('"correct"')
    whole(out, ("stop" if int(turn) >= int(stop_at) else "go on") + f" {right} right\\n")

def pool(out, *files):
    time.sleep(0.1)
    whole(out, "".join(Path(file).read_text() for file in files))

globals()[sys.argv[1]](*sys.argv[2:])
'''
RECIPE = """
name = "tiny"
work = "work"

[settings]
count = 4
delay = 0.02
stop_at = 2
model = "first"

[loops.round]
times = 4
stop_when = "{work}/round{round}/state"
[loops.round.carry.policy]
first = "{model}"
then = "good-{previous}"

[[stage]]
name = "questions"
command = ["{python}", "{recipe}/programs.py", "questions", "{work}/questions.jsonl", "{count}"]
inputs = ["{recipe}/programs.py"]
outputs = ["{work}/questions.jsonl"]

[[stage]]
name = "draw"
about = "Every question is answered once."
each = "round"
command = ["{python}", "{recipe}/programs.py", "draw", "{work}/questions.jsonl", "{work}/round{round}/samples.jsonl",
           "{policy}", "{delay}"]
inputs = ["{recipe}/programs.py", "{work}/questions.jsonl"]
outputs = ["{work}/round{round}/samples.jsonl"]
appends = true
calls = { prompts = "{work}/questions.jsonl", max_tokens = 10, model = "{policy}" }

[[stage]]
name = "verify"
each = "round"
command = ["{python}", "-m", "data_tools.verify", "--kind", "number", "--tasks", "{work}/questions.jsonl",
           "--samples", "{work}/round{round}/samples.jsonl", "--out", "{work}/round{round}/verdicts.jsonl"]
inputs = ["{work}/questions.jsonl", "{work}/round{round}/samples.jsonl"]
outputs = ["{work}/round{round}/verdicts.jsonl"]

[[stage]]
name = "decide"
each = "round"
command = ["{python}", "{recipe}/programs.py", "decide", "{work}/round{round}/verdicts.jsonl",
           "{work}/round{round}/state", "{stop_at}", "{round}"]
inputs = ["{recipe}/programs.py", "{work}/round{round}/verdicts.jsonl"]
outputs = ["{work}/round{round}/state"]

[[stage]]
name = "pool"
command = ["{python}", "{recipe}/programs.py", "pool", "{work}/pool.jsonl", "{work}/round{each_round}/samples.jsonl"]
inputs = ["{recipe}/programs.py", "{work}/round{each_round}/samples.jsonl"]
outputs = ["{work}/pool.jsonl"]
"""


class Tiny:
    """The recipe in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        (folder / "recipe").mkdir(parents=True)
        self.recipe = folder / "recipe" / "tiny.toml"
        self.programs = folder / "recipe" / "programs.py"
        self.recipe.write_text(RECIPE)
        self.programs.write_text(PROGRAMS)

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "data_tools.pipeline", "recipe/tiny.toml", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *options: str, code: int = 0) -> tuple[str, str]:
        """Its stdout and stderr."""
        process = self.start(*options)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        return out, err

    def edit(self, old: str, new: str) -> None:
        text = self.recipe.read_text()
        assert old in text
        self.recipe.write_text(text.replace(old, new))

    def files(self) -> dict[str, str]:
        """Every file of the work folder but the pipeline's own: name to sha256."""
        own = ("pipeline/", "logs/", "provenance.")
        found = {str(path.relative_to(self.work)): path for path in self.work.rglob("*") if path.is_file()}
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in found.items()
            if not name.startswith(own)
        }


def stages_run(out: str) -> list[str]:
    """The stages that a run's output says were done."""
    return [line.partition(": done in")[0] for line in out.splitlines() if ": done in" in line]


def lives(pid: int) -> bool:
    """Is there such a process (one that ended and was not waited for is none)?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
