"""Runs the unit tests, in a process that never runs a line of the tested program.

The program lives in the worker's process (`verify_worker`). Names of the program that the tests use are stand-ins here:
a call crosses a pipe and comes back as plain data (`verify_wire`). So a program that ends its process, replaces
built-ins, reads the tests or returns a value that equals everything changes nothing in the tests' own process.
"""

import builtins
import json
import types
from typing import Any, BinaryIO

from data_tools.verify_wire import decode, encode

MAX_ANSWER = 32 << 20  # bytes of one answer of the program
CONTAINERS = (list, dict, set)


class ProgramError(Exception):
    """An exception of the program that is no ordinary built-in one, or the end of its process."""


class ProgramGone(ProgramError):
    """The program's process has ended."""


class ProgramObject:
    """Stands for an object of the program: it can be called, asked for attributes and given some, and equals itself."""

    __slots__ = ("_judge", "_reference")

    def __init__(self, judge: "Judge", reference: list[Any]) -> None:
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_reference", reference)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._judge.call(self._reference, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._judge.ask({"do": "get", "target": self._reference, "name": name})["value"]

    def __setattr__(self, name: str, value: Any) -> None:
        self._judge.ask({"do": "set", "target": self._reference, "name": name, "value": self._judge.encode(value)})


class Judge:
    """One conversation with one worker."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests, self._answers = requests, answers
        self._objects: dict[int, ProgramObject] = {}
        self._functions: list[Any] = []

    def encode(self, value: Any) -> Any:
        return encode(value, self._refer)

    def _refer(self, value: Any) -> list[Any]:
        if isinstance(value, ProgramObject):
            return value._reference
        if callable(value):
            self._functions.append(value)
            return ["g", len(self._functions) - 1]
        raise TypeError(f"tests can hand the program plain data and functions, not {type(value).__name__}")

    def _decode(self, data: Any) -> Any:
        try:
            return decode(data, self._resolve)
        except Exception as error:  # the program may write anything at all
            raise ProgramError(f"an answer that is no value ({type(error).__name__})") from None

    def _resolve(self, data: list[Any]) -> Any:
        if data[0] == "g":
            return self._functions[data[1]]
        if data[0] != "o" or not isinstance(data[1], int):
            raise ValueError("not a value")
        return self._objects.setdefault(data[1], ProgramObject(self, ["o", data[1]]))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer, `value` decoded; raises what the program raised."""
        self._write(request)
        while True:
            answer = self._read()
            if "callback" not in answer:
                break
            function = self._functions[answer["callback"]]
            self._write({"result": self.encode(function(*self._decode(answer["arguments"])))})
        if "error" in answer:
            kind = getattr(builtins, str(answer["error"]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = ProgramError
            try:
                raised = kind(str(answer.get("message")))
            except TypeError:  # UnicodeDecodeError and the like want more
                raised = ProgramError(f"{answer['error']}: {answer.get('message')}")
            raised.__dict__["of_program"] = str(answer["error"])
            raise raised
        return {**answer, "value": self._decode(answer.get("value"))}

    def call(self, reference: list[Any], arguments: list[Any], named: dict[str, Any]) -> Any:
        """Call a function of the program; lists, dicts and sets that it changed are changed here too."""
        request = {"do": "call", "target": reference, "arguments": self.encode(arguments), "named": self.encode(named)}
        answer = self.ask(request)
        after = self._decode(answer.get("arguments"))
        if isinstance(after, list):
            for mine, theirs in zip(arguments, after, strict=False):
                if type(mine) in CONTAINERS and type(theirs) is type(mine) and mine != theirs:
                    mine.clear()
                    mine.extend(theirs) if isinstance(mine, list) else mine.update(theirs)
        return answer["value"]

    def _write(self, message: dict[str, Any]) -> None:
        try:
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()
        except OSError:
            raise ProgramGone("the program's process ended") from None

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline(MAX_ANSWER)
        if not line:
            raise ProgramGone("the program's process ended before the tests did")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise ProgramError("an answer that is no JSON, or longer than is allowed") from None
        if not isinstance(answer, dict):
            raise ProgramError("an answer that is no answer")
        return answer


def run_tests(job: dict[str, Any], requests: BinaryIO, answers: BinaryIO) -> dict[str, Any]:
    """Load job["program"], run job["preamble"] and job["tests"] with the program's job["names"]; {"ok", "why"}.

    ok only if every line of the tests ran and none failed.
    """
    judge = Judge(requests, answers)
    tests = types.ModuleType("tests")
    try:
        exec(compile(job["preamble"], "preamble.py", "exec"), tests.__dict__)  # noqa: S102
        code = compile(job["tests"], "tests.py", "exec")
    except BaseException as error:
        return {"ok": False, "why": f"the tests themselves do not run: {_said(error)}", "tests_broken": True}
    try:
        given = judge.ask({"do": "load", "source": job["program"]}).get("names")
        for name in job["names"]:
            if isinstance(given, list) and name in given:
                tests.__dict__[name] = judge.ask({"do": "name", "name": name})["value"]
    except Exception as error:
        return {"ok": False, "why": f"loading the program: {_said(error)}"}
    try:
        exec(code, tests.__dict__)  # noqa: S102
    except BaseException as error:
        return {"ok": False, "why": f"{_place(error, job['tests'])}{_said(error)}"}
    return {"ok": True, "why": "all tests passed"}


def _said(error: BaseException) -> str:
    name = getattr(error, "of_program", None) or type(error).__name__
    return " ".join(f"{name}: {error}"[:300].split()).rstrip(": ") if str(error) else name


def _place(error: BaseException, source: str) -> str:
    """ "test line 3: assert f(2) == 4: " """
    number = None
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = source.splitlines()
    if number is None or number > len(lines):
        return ""
    return f"test line {number}: {lines[number - 1].strip()[:120]}: "
