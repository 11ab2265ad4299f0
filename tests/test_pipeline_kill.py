"""A pipeline killed at any moment goes on to the same files, and nothing that it started outlives it.

Real processes, real signals; the instants are drawn with a seed, and what runs then differs from machine to machine.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_fixtures import Tiny, kill, lives, stages_run

FINAL = (
    "questions.jsonl",
    "pool.jsonl",
    *(f"round{k}/{n}" for k in (1, 2) for n in ("samples.jsonl", "verdicts.jsonl", "state")),
)


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path / "tiny")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"30 s without {what}"
        time.sleep(0.01)


def one_stage(tiny: Tiny, program: str, more: str = "") -> None:
    """A recipe of one stage, a Python program that is given the path of its output."""
    (tiny.recipe.parent / "one.py").write_text(program)
    tiny.recipe.write_text(
        f"""
        name = "one"
        work = "work"
        [[stage]]
        name = "only"
        command = ["{{python}}", "{{recipe}}/one.py", "{{work}}/out"]
        inputs = ["{{recipe}}/one.py"]
        outputs = ["{{work}}/out"]
        {more}
        """
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kills_at_random_instants_leave_the_same_files(seed: int, tiny: Tiny, tmp_path: Path) -> None:
    whole = Tiny(tmp_path / "whole")
    whole.run()
    wanted = whole.files()
    assert sorted(wanted) == sorted(FINAL)
    instants, killed = random.Random(seed), []
    for _ in range(8):
        process = tiny.start()
        time.sleep(instants.uniform(0.05, 0.9))
        process.send_signal(signal.SIGKILL)
        process.wait()  # the next one starts at once, beside what may still run
        killed.append(process)
    tiny.run()
    for process in killed:
        process.communicate()
    assert tiny.files() == wanted
    assert not list(tiny.work.rglob("CLASH"))
    assert stages_run(tiny.run()[0]) == []
    made = {
        path for stage in json.loads((tiny.work / "provenance.json").read_text())["stages"] for path in stage["outputs"]
    }
    assert made == {f"work/{name}" for name in FINAL}


def test_a_kill_within_a_row_and_one_between_the_end_and_the_record(tiny: Tiny) -> None:
    """Chosen instants: the samples file ends in half a row; the command is done and its record says `started`."""
    process = tiny.start("--set", "delay=0.5")
    samples = tiny.work / "round1" / "samples.jsonl"
    wait_for(
        lambda: samples.exists() and samples.read_bytes().count(b"\n") == 1 and samples.read_bytes()[-1:] != b"\n",
        "half a row",
    )
    kill([process])
    wait_for(lambda: not samples.read_bytes().endswith(b"\n"), "half a row")
    record = tiny.work / "pipeline" / "draw.round1.json"
    assert json.loads(record.read_text())["state"] == "started"
    out, _ = tiny.run("--set", "delay=0.5")
    # The rows of before are still there, and no file was put aside.
    assert "draw [round 1]: was begun and not finished" in out and not list(tiny.work.rglob("*.old"))
    assert len(samples.read_text().splitlines()) == 4
    before = tiny.files()
    for name in ("draw.round1", "verify.round2"):
        path = tiny.work / "pipeline" / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "state": "started"}))
    out, _ = tiny.run("--set", "delay=0.5")
    assert stages_run(out) == ["draw [round 1]", "verify [round 2]"]
    assert tiny.files() == before


def test_what_a_command_started_in_a_session_of_its_own_dies_with_the_pipeline(tiny: Tiny) -> None:
    """As torchrun does with its workers. The next pipeline waits until it is gone."""
    one_stage(
        tiny,
        """
import os, subprocess, sys, time
if os.path.exists("again"):
    open(sys.argv[1], "w").write("done")
    sys.exit()
worker = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
for name in ("worker", "orphan"):
    process = subprocess.Popen([sys.executable, "-c", worker, name], start_new_session=True)
orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1], 'left'], start_new_session=True)"
subprocess.run([sys.executable, "-c", orphan, worker])
open("command", "w").write(str(os.getpid()))
time.sleep(600)
""",
    )
    process = tiny.start()
    names = [tiny.folder / name for name in ("worker", "orphan", "left", "command")]
    wait_for(lambda: all(path.exists() and path.read_text() for path in names), "the workers")
    pids = [int(path.read_text()) for path in names]
    assert all(map(lives, pids))
    (tiny.folder / "again").touch()
    process.send_signal(signal.SIGKILL)
    process.wait()
    out, _ = tiny.run()
    assert not any(map(lives, pids))
    assert stages_run(out) == ["only"]
    process.communicate()


def test_the_next_pipeline_waits_for_the_guard_of_a_killed_one(tiny: Tiny) -> None:
    """However slow it is: here it is stopped before the pipeline dies, so that its command lives on meanwhile."""
    program = "import os, sys, time\nopen('pids', 'a').write(f'{os.getpid()} {os.getppid()}\\n')\n"
    one_stage(tiny, program + "time.sleep(0 if os.path.exists('again') else 600)\nopen(sys.argv[1], 'w')\n")
    process = tiny.start()
    pids = tiny.folder / "pids"
    wait_for(lambda: pids.exists() and pids.read_text().endswith("\n"), "the command")
    command, guard = map(int, pids.read_text().split())
    os.kill(guard, signal.SIGSTOP)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tiny.folder / "again").touch()
    following = tiny.start()
    time.sleep(1.5)
    assert lives(command) and following.poll() is None and len(pids.read_text().splitlines()) == 1
    os.kill(guard, signal.SIGCONT)
    out, _ = following.communicate(timeout=60)
    assert not lives(command) and stages_run(out) == ["only"]
    process.communicate()


def test_a_daemon_does_not_outlive_its_stage(tiny: Tiny) -> None:
    one_stage(
        tiny,
        """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(str(process.pid))
""",
    )
    tiny.run()
    assert not lives(int((tiny.work / "out").read_text()))


def test_the_command_dies_when_its_guard_is_killed(tiny: Tiny) -> None:
    one_stage(
        tiny, "import os, sys, time\nopen('pids', 'w').write(f'{os.getpid()} {os.getppid()}\\n')\ntime.sleep(600)\n"
    )
    process = tiny.start()
    pids = tiny.folder / "pids"
    wait_for(lambda: pids.exists() and pids.read_text().endswith("\n"), "the command")
    command, guard = map(int, pids.read_text().split())
    os.kill(guard, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "exit code 137" in err
    wait_for(lambda: not lives(command), "the command's end")


def test_two_pipelines_do_not_share_a_work_folder(tiny: Tiny) -> None:
    first = tiny.start("--set", "delay=0.2")
    wait_for((tiny.work / "pipeline" / "draw.round1.json").exists, "the first stage")
    _, err = tiny.run(code=2)
    assert err == f"error: work: a pipeline with process id {first.pid} runs here; wait for it, or set another work\n"
    tiny.run("--plan")
    tiny.run("--set", "work=other")
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and "8 stages run" in out


STUBBORN = """
import signal, sys, time
def note(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    {then}
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
print("ready", flush=True)
time.sleep({seconds})
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize(
    ("sent", "got", "code"),
    [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGTERM", 129)],
)
def test_signals_go_to_the_command_and_the_pipeline_says_how_to_go_on(
    sent: signal.Signals, got: str, code: int, tiny: Tiny
) -> None:
    one_stage(tiny, STUBBORN.format(then="sys.exit(1)", seconds=600))
    process = tiny.start()
    log = tiny.work / "logs" / "only.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text(), "the command")
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == f"stopped: {sent.name} in stage 'only'; start the same command again to go on\n"
    assert f"got {got}" in log.read_text()


def test_a_command_that_ends_well_in_spite_of_a_signal_is_done_and_the_next_is_not_begun(tiny: Tiny) -> None:
    one_stage(tiny, STUBBORN.format(then="pass", seconds=1))
    tiny.recipe.write_text(
        tiny.recipe.read_text() + '[[stage]]\nname = "next"\ncommand = ["touch", "{work}/b"]\noutputs = ["{work}/b"]\n'
    )
    process = tiny.start()
    log = tiny.work / "logs" / "only.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text(), "the command")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and stages_run(out) == ["only"] and "before stage 'next'" in err
    assert stages_run(tiny.run()[0]) == ["next"]


def test_an_appending_command_that_a_signal_ended_is_asked_again_whatever_it_returned(tiny: Tiny) -> None:
    one_stage(
        tiny, STUBBORN.format(then="open(sys.argv[1], 'w').write('half'), sys.exit(0)", seconds=600), "appends = true"
    )
    process = tiny.start()
    log = tiny.work / "logs" / "only.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text(), "the command")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert json.loads((tiny.work / "pipeline" / "only.json").read_text())["state"] == "started"


def test_the_third_signal_kills_a_command_that_does_not_listen(tiny: Tiny) -> None:
    one_stage(tiny, STUBBORN.format(then="time.sleep(0)", seconds="600) or [time.sleep(600) for _ in range(9)] or (0"))
    process = tiny.start()
    log = tiny.work / "logs" / "only.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text(), "the command")
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: log.read_text().count("got") == 1, "a signal")
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: log.read_text().count("got") == 2, "two signals")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.parametrize(("exits", "code"), [(2, 2), (3, 1), (1, 1)])
def test_a_stage_that_fails_shows_its_last_lines_and_its_log(exits: int, code: int, tiny: Tiny) -> None:
    program = "import sys\nfor k in range(30):\n    print('line', k)\nprint('bar 1%\\rbar 99%', file=sys.stderr)\n"
    one_stage(tiny, f"{program}sys.exit({exits})\n")
    _, err = tiny.run(code=code)
    lines = err.splitlines()
    assert lines[0] == f"error: stage 'only' failed: exit code {exits}"
    assert lines[1].endswith("python recipe/one.py work/out")
    assert lines[2].startswith("  | ") and len(lines) == 2 + 20 + 1
    assert "  | bar 99%" in lines and "  | line 29" in lines and "  | line 5" not in lines
    assert lines[-1] == "  all of it: work/logs/only.log"
    assert "line 0" in (tiny.work / "logs" / "only.log").read_text()
    one_stage(tiny, "import sys; open(sys.argv[1], 'w')")
    assert stages_run(tiny.run()[0]) == ["only"]


def test_a_command_without_its_output_or_without_its_program_fails(tiny: Tiny) -> None:
    one_stage(tiny, "print('nothing made')")
    _, err = tiny.run(code=1)
    assert "it ended well, but work/out is not there" in err and "  | nothing made" in err
    tiny.edit('"{python}", "{recipe}/one.py"', '"no-such-program"')
    _, err = tiny.run(code=1)
    assert "exit code 127" in err and "no-such-program: cannot be started" in err


def test_output_that_nobody_reads_ends_the_pipeline_quietly(tiny: Tiny) -> None:
    command = f"{sys.executable} -m data_tools.pipeline recipe/tiny.toml | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(
        command, shell=True, cwd=tiny.folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("questions: first time") and done.stderr == ""
