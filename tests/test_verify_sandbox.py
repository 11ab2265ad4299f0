"""The sandbox of unit tests: a program that attacks ends as `wrong`, or with a named limit; nothing of it is left.

Each attack is a program that would pass if the attack worked. All of them run at once, a few at a time, so that one
program's fork bomb must not fail its neighbours. The same attacks run without namespaces too, as on a machine that
forbids them; that needs a Python that the user `nobody` may run.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from attack_programs import ATTACKS, HARMLESS

from data_tools import verify_sandbox_kernel as kernel
from data_tools.errors import UserError
from data_tools.verify_code import LAYERS, CodeTask, Limits, check_program
from data_tools.verify_result import Verdict

ROOT = Path(__file__).resolve().parent.parent
SQUARE = CodeTask(id="square", tests="assert f(2) == 4\nassert f(3) == 9\n", names=("f",))
SHORT = Limits(wall_s=1.5, total_memory_bytes=300 << 20, folder_bytes=8 << 20, file_bytes=2 << 20)
MARK = f"left-over-{os.getpid()}"
OUTSIDE = Path("/tmp") / f"logratio-escaped-{os.getpid()}"
SECRET = f"secret-{os.getpid()}"


def left_over() -> list[str]:
    """Command lines with our mark, of processes anywhere on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if MARK.encode() in line and int(path.parts[2]) != os.getpid():
            found.append(line.replace(b"\0", b" ").decode())
    return found


def python_for_all() -> str | None:
    """A Python that the user nobody may run: this one, or the system's."""
    for path in (getattr(sys, "_base_executable", sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"):
        real = Path(os.path.realpath(path))
        open_to_all = all(folder.stat().st_mode & 0o001 for folder in real.parents) if real.exists() else False
        if (
            open_to_all
            and subprocess.run([path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode == 0
        ):
            return path
    return None


Verdicts = dict[str, Verdict]


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that every user may read; those of pytest are for one user only."""
    folder = Path(tempfile.mkdtemp(prefix="logratio-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["all layers", "no namespaces"])
def verdicts(request: pytest.FixtureRequest, open_folder: Path) -> Iterator[Verdicts]:
    """Every attack and every harmless program, run four at a time."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VERIFY_SECRET", SECRET)
    readable = open_folder / "readable.txt"
    readable.write_text(SECRET)
    readable.chmod(0o644)
    boxes = open_folder / "boxes"
    boxes.mkdir()
    boxes.chmod(0o755)
    patch.setattr(tempfile, "tempdir", str(boxes))
    descriptor = os.open(readable, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    layers = LAYERS
    if request.param == "no namespaces":
        python = python_for_all()
        if python is None:
            pytest.skip("no Python here that the user nobody may run")
        patch.setattr(sys, "_base_executable", python)
        layers = ("landlock", "seccomp")
    programs = {name: program for name, (program, _) in ATTACKS.items()} | HARMLESS

    def run(program: str) -> Verdict:
        filled = program.replace("{mark}", MARK).replace("{readable}", str(readable))
        filled = filled.replace("{outside}", str(OUTSIDE)).replace("{outside_name}", OUTSIDE.name)
        return check_program(filled, SQUARE, SHORT, layers=layers)

    with ThreadPoolExecutor(4) as pool:
        yield dict(zip(programs, pool.map(run, programs.values()), strict=True))
    os.close(descriptor)
    patch.undo()
    assert left_over() == []
    assert not OUTSIDE.exists() and not Path("/escaped").exists() and not Path("/tmp/escaped").exists()
    assert list(boxes.iterdir()) == []
    boxes.rmdir()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(verdicts: Verdicts, name: str) -> None:
    verdict = verdicts[name]
    assert verdict.verdict == "wrong", verdict
    assert ATTACKS[name][1] in verdict.why, verdict


@pytest.mark.parametrize("name", HARMLESS)
def test_a_right_program_passes_and_leaves_nothing(verdicts: Verdicts, name: str) -> None:
    assert verdicts[name].verdict == "correct", verdicts[name]
    assert left_over() == []


def test_every_layer_says_what_it_does(verdicts: Verdicts) -> None:
    said = verdicts["syntax error"].details["sandbox"]
    assert isinstance(said, dict)
    assert {"files", "network", "processes", "calls", "user"} <= set(said)
    assert said["files"].startswith("closed") and said["network"].startswith("closed")
    assert said["user"] == str(65534 if os.geteuid() == 0 else os.getuid())


def test_an_open_sandbox_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    python = python_for_all()
    if python is None:
        pytest.skip("no Python here that the user nobody may run")
    monkeypatch.setattr(sys, "_base_executable", python)
    verdict = check_program("def f(x): return x * x", SQUARE, layers=())
    assert verdict.verdict == "correct"
    said = verdict.details["sandbox"]
    assert isinstance(said, dict)
    assert all(said[name].startswith("open: ") for name in ("files", "network", "processes", "calls"))


def test_a_killed_caller_takes_its_sandbox_along(tmp_path: Path) -> None:
    """The caller is killed in the middle of a run: the program's processes end with it."""
    program = (
        "import os, sys\ndef f(x):\n"
        f"    os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(99)', {MARK!r}])"
    )
    script = f"""
        from data_tools.verify_code import CodeTask, Limits, check_program
        check_program({program!r}, CodeTask(id="x", tests="f(1)", names=("f",)), Limits(wall_s=60))
    """
    caller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, env={"TMPDIR": str(tmp_path)})
    wait_until(lambda: len(left_over()) >= 2)  # the caller's own command line, and the program's
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    wait_until(lambda: left_over() == [])


def wait_until(done: object, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def test_an_ordinary_user_has_the_same_sandbox(open_folder: Path) -> None:
    """Root drops to nobody; here nobody is the caller."""
    python = python_for_all()
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, to become an ordinary user, and a Python that all users may run")
    shutil.copytree(ROOT / "data_tools", open_folder / "data_tools")
    for path in [open_folder / "data_tools", *(open_folder / "data_tools").rglob("*")]:
        path.chmod(0o755)
    script = """
        from data_tools.verify_code import CodeTask, Limits, check_program
        task = CodeTask(id="x", tests="assert f(2) == 4", names=("f",))
        for program in ("def f(x): return x * x", "def f(x): return 5", "import os\\ndef f(x): os.kill(-1, 9)",
                        "def f(x): open('/tmp/' + 'escaped', 'w')"):
            for layers in (("namespaces", "landlock", "seccomp"), ("landlock", "seccomp")):
                verdict = check_program(program, task, layers=layers)
                print(verdict.verdict, verdict.details["sandbox"]["files"][:6], verdict.details["sandbox"]["user"])
    """
    done = subprocess.run(
        [python, "-c", textwrap.dedent(script)], cwd=open_folder, user=65534, group=65534, extra_groups=[], env={},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["correct closed 65534"] * 2 + ["wrong closed 65534"] * 6, done.stderr


@pytest.mark.parametrize("refused", ["unshare", "mount", "mount_setattr"])
def test_a_system_that_refuses_namespaces(open_folder: Path, refused: str) -> None:
    """As in many containers: a filter around everything refuses a call. The rest of the sandbox does without."""
    python = python_for_all()
    if python is None:
        pytest.skip("no Python here that the user nobody may run")
    script = f"""
        import os, sys
        from data_tools import verify_sandbox_kernel as kernel
        from data_tools.verify_code import CodeTask, check_program
        kernel.DENIED, kernel.SIGNALS = {{{refused!r}: kernel.DENIED[{refused!r}]}}, {{}}
        kernel.filter_calls(os.getpid())
        verdict = check_program("def f(x): return x", CodeTask(id="x", tests="assert f(2) == 2", names=("f",)))
        said = verdict.details["sandbox"]
        print(verdict.verdict, said["namespaces"], said["files"], said["network"], sep="|")
    """
    done = subprocess.run(
        [python, "-c", textwrap.dedent(script)], cwd=ROOT, env={}, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("correct|none ("), done.stderr
    assert done.stdout.endswith("|closed (Landlock)|closed (seccomp)\n"), done.stdout


def test_processes_are_found_without_the_kernels_list(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["sleep", "30"])
    by_list = list(kernel.descendants(os.getpid()))
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert child.pid in by_list and child.pid in kernel.descendants(os.getpid())
    child.kill()
    child.wait()


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(a): a.append(1)", "a = []\nf(a)\nassert a == [1]"),
        ("def f(d, *, k): d[k] = {1, 2}", "d = {}\nf(d, k='x')\nassert d == {'x': {1, 2}}"),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2]\nassert sum(f(3)) == 3"),
        ("def f(g, x): return g(x) + 1", "assert f(lambda x: x * 2, 3) == 7"),
        ("def f(kind): return isinstance(3, kind)", "assert f(int) is True and f(str) is False"),
        ("def f(): return 2 ** 20000, -5, 1.5, float('inf'), 3 + 4j",
         "assert f() == (2 ** 20000, -5, 1.5, float('inf'), 3 + 4j)"),
        ("def f(): return float('nan')", "x = f()\nassert x != x"),
        ("def f(): return ['\\ud800', 'سلام', b'\\x00', None, True]",
         "assert f() == ['\\ud800', 'سلام', b'\\x00', None, True]"),
        ("def f(x):\n    raise KeyError(x)", "try:\n    f('k')\nexcept KeyError:\n    pass\nelse:\n    assert False"),
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("class Node:\n    def __init__(self, v): self.v, self.next = v, None\ndef f(n): return n.v + n.next.v",
         "a = Node(1)\na.next = Node(2)\nassert f(a) == 3 and a.next.v == 2 and a.next is a.next"),
        ("def f():\n    def g(x): return x + 1\n    return g", "assert f()(1) == 2"),
        ("from fractions import Fraction\nfrom decimal import Decimal\ndef f(): return Fraction(1, 3), Decimal('0.1')",
         "from fractions import Fraction\nfrom decimal import Decimal\nassert f() == (Fraction(1, 3), Decimal('0.1'))"),
        ("import datetime\ndef f(): return datetime.date(2020, 2, 29), range(3), frozenset({1})",
         "import datetime\nassert f() == (datetime.date(2020, 2, 29), range(3), frozenset({1}))"),
        ("limit = 7\ndef f(): return {(1, 2): [3]}.items()", "assert limit == 7 and f() == [((1, 2), [3])]"),
    ],
)  # fmt: skip
def test_values_cross_as_they_are(program: str, tests: str) -> None:
    names = ("f", "Node", "limit")
    verdict = check_program(program, CodeTask(id="x", tests=tests, names=names))
    assert verdict.verdict == "correct", verdict
    assert (
        check_program("def f(*a, **k): return 'wrong'", CodeTask(id="x", tests=tests, names=names)).verdict == "wrong"
    )


def test_tests_that_do_not_run_are_the_users_error() -> None:
    with pytest.raises(UserError, match="task x: the tests themselves do not run: SyntaxError"):
        check_program("f = 1", CodeTask(id="x", tests="assert (", names=("f",)))


def test_cpu_time_is_a_limit_of_its_own() -> None:
    verdict = check_program("def f(x):\n    while True: pass", SQUARE, Limits(cpu_s=1, wall_s=60))
    assert (verdict.verdict, verdict.details["limit"]) == ("wrong", "CPU 1 s"), verdict


def test_a_limit_must_be_positive() -> None:
    with pytest.raises(UserError, match="wall_s = 0: must be > 0"):
        Limits(wall_s=0)
