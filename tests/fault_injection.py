"""Kill a run at random instants, again and again, and see that it ends as one that nothing disturbed.

    python tests/fault_injection.py --kills 50 --ranks 2 --seed 1

The run saves in the background after every step. SIGKILL comes while it starts, computes or saves, and takes the
workers too, which torchrun starts in sessions of their own: they are found by their parent. With several ranks it takes
at times one worker, which torchrun --max-restarts replaces, and at times torchrun alone, whose workers have to end.
Every start must go on from the newest whole checkpoint. At the end the rows of metrics (all but time and perf/*), the
last checkpoints and the export are compared with those of an undisturbed run, bit for bit.

Not a test itself: test_fault_injection.py runs a short form.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import write_tiny_model  # noqa: E402
from run_fixtures import HELD_OUT, arguments, contents, rows, tensors  # noqa: E402

from trainer.run_folder import find_checkpoints  # noqa: E402

STEPS_A_KILL = 7
"""A kill waits for at most so many steps."""
SPARE_STEPS = 9
"""So many more for each kill, so that the run does not end before the last one."""
STARTING = 0.25
"""Share of the kills that come within the time of a start."""
PATIENCE_S = 180


@dataclass
class Injection:
    """A run that is killed. `process` is torchrun, or the only rank itself."""

    folder: Path
    argv: list[str]
    ranks: int
    random: random.Random
    start_s: float = 0.0
    """What a start takes to its first row."""
    process: subprocess.Popen[bytes] | None = None
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    again: int = 0
    """Steps that had to be computed again."""
    _expected: str | None = None

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}_{self.starts}.log")

    def start(self) -> None:
        """Start the same command once more."""
        found = find_checkpoints(self.folder, warn=lambda text: None)
        self._expected = f"resuming from {found[0]} at step" if found else None
        self.again += last_step(self.folder) - (int(found[0].name[5:]) if found else 0)
        self.starts += 1
        with open(self.log, "wb") as log:
            self.process = launch(self.argv, self.ranks, log)

    def kill(self) -> None:
        """Wait for an instant and kill something there; returns when nothing of a killed command is left."""
        before = last_step(self.folder)
        if self.random.random() < STARTING:
            self._wait(before + STEPS_A_KILL, self.random.uniform(0, self.start_s))
        else:
            self._wait(before + self.random.randint(1, STEPS_A_KILL))
            time.sleep(self.random.uniform(0, 0.05))
        assert self.process is not None
        workers = children(self.process.pid) if self.ranks > 1 else []
        kind = self.random.choice(["all", "all", "one worker", "torchrun"]) if len(workers) == self.ranks else "all"
        victims = {"all": [self.process.pid, *workers], "one worker": workers[:], "torchrun": [self.process.pid]}[kind]
        self.random.shuffle(victims)
        for pid in victims[:1] if kind == "one worker" else victims:
            os.kill(pid, signal.SIGKILL)
        self.kills[kind] += 1
        if kind == "one worker":  # torchrun starts all of them anew
            return
        self.process.wait()
        deadline = time.monotonic() + PATIENCE_S
        while any(is_running(pid) for pid in workers):
            assert time.monotonic() < deadline, f"workers {workers} outlive torchrun"
            time.sleep(0.01)
        self._check_where_it_began()
        self.start()

    def finish(self) -> None:
        """Let it end."""
        assert self.process is not None
        code = self.process.wait(timeout=PATIENCE_S)
        assert code == 0, f"exit code {code}: {self.log.read_text()[-3000:]}"
        self._check_where_it_began()

    def _wait(self, step: int, seconds: float = PATIENCE_S) -> None:
        """Until the run has done so many steps, or for so long."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while last_step(self.folder) < step and time.monotonic() < deadline:
            assert self.process.poll() is None, f"ended by itself: {self.log.read_text()[-3000:]}"
            time.sleep(0.002)

    def _check_where_it_began(self) -> None:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        said = next((line for line in text.splitlines() if line.startswith("resuming from")), None)
        # None: it was killed before, or began with nothing, from where torchrun may have started it again
        if said is not None and self._expected is not None:
            assert said.startswith(self._expected), (said, self._expected)
        assert "passed over" not in text and "differs" not in text, text


def inject(folder: Path, *, kills: int, ranks: int, seed: int) -> str:
    """Kill a run so often and compare its end; returns a line that says what was done. Raises AssertionError."""
    model = folder / "model"
    model.mkdir(parents=True)
    write_tiny_model(model)
    steps = (STEPS_A_KILL + SPARE_STEPS) * kills + 2
    settings = (f"train.max_steps={steps}", "train.epochs=100000", *HELD_OUT, "eval.every=7")
    whole, killed = (arguments(folder / name, model, *settings) for name in ("whole", "killed"))
    began = time.monotonic()
    with open(folder / "whole.log", "wb") as log:
        undisturbed = launch(whole, ranks, log)
    while undisturbed.poll() is None and last_step(folder / "whole") == 0:
        time.sleep(0.01)
    run = Injection(folder / "killed", killed, ranks, random.Random(seed), start_s=time.monotonic() - began)
    run.start()
    try:
        for _ in range(kills):
            run.kill()
        run.finish()
        assert undisturbed.wait(timeout=PATIENCE_S) == 0, (folder / "whole.log").read_text()[-3000:]
    finally:
        for process in (undisturbed, run.process):
            for pid in [process.pid, *children(process.pid)] if process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
    compare(folder / "killed", folder / "whole", steps)
    kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(run.kills.items()))
    return (
        f"{ranks} ranks, {steps} steps, seed {seed}: {kills} kills ({kinds}), {run.starts} starts, {run.again} steps "
        f"computed again, {time.monotonic() - began:.0f} s; rows, last checkpoint and export as undisturbed"
    )


def compare(killed: Path, whole: Path, steps: int) -> None:
    """Bit for bit, and nothing left over."""
    assert [json.loads(row)["step"] for row in rows(whole)] == list(range(1, steps + 1))
    assert rows(killed) == rows(whole)
    assert contents(killed / "export") == contents(whole / "export")
    for name in (f"step_{steps - 1}", f"step_{steps}"):
        assert tensors(killed / "checkpoints" / name) == tensors(whole / "checkpoints" / name)
    for part in ("", "checkpoints"):
        assert sorted(path.name for path in (killed / part).iterdir()) == sorted(
            path.name for path in (whole / part).iterdir()
        )


def launch(argv: list[str], ranks: int, log) -> subprocess.Popen[bytes]:  # noqa: ANN001
    """The command of a run, as a user would start it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1000"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "trainer/main.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)


def last_step(folder: Path) -> int:
    """Of the last whole row; 0 where there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith(b"\n")), 0)


def children(pid: int) -> list[int]:
    """Process ids whose parent is `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return found


def is_running(pid: int) -> bool:
    """There is such a process, and it is no zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        print(inject(Path(place) / "runs", kills=options.kills, ranks=options.ranks, seed=options.seed))
