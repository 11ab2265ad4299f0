"""The process of the tested program: loads it, calls its functions when the tests ask, answers with plain data.

Started as `python -I -S -c SOURCE` inside the sandbox, with requests on descriptor 3 and answers on 4, a JSON object a
line. It holds no test, no expected value and no secret, so there is nothing for the program to find; whatever the
program does to this process, it can only give wrong answers or none. Not imported by anything.
"""

import json
import resource
import sys
import types
from typing import Any

from data_tools.verify_wire import decode, encode


class Worker:
    """The program's module and the objects that the tests hold references to."""

    def __init__(self, requests: Any, answers: Any) -> None:
        self._requests, self._answers = requests, answers
        self._objects: list[Any] = []
        self._places: dict[int, int] = {}
        self._module = types.ModuleType("solution")
        sys.modules["solution"] = self._module

    def refer(self, value: Any) -> list[Any]:
        if id(value) not in self._places:  # the list keeps the object, so that its id stays its own
            self._places[id(value)] = len(self._objects)
            self._objects.append(value)
        return ["o", self._places[id(value)]]

    def resolve(self, data: list[Any]) -> Any:
        if data[0] == "o":
            return self._objects[data[1]]
        if data[0] == "g":
            return self._function_of_tests(data[1])
        raise ValueError("not a value")

    def _function_of_tests(self, number: int) -> Any:
        def call(*arguments: Any) -> Any:
            self._send({"callback": number, "arguments": encode(list(arguments), self.refer)})
            return decode(json.loads(self._requests.readline())["result"], self.resolve)

        return call

    def _send(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def serve(self) -> None:
        while line := self._requests.readline():
            request = json.loads(line)
            try:
                answer = getattr(self, "do_" + request.pop("do"))(**request)
            except BaseException as error:  # a program's SystemExit is an answer too: not the one that was asked for
                answer = {"error": type(error).__name__, "message": str(error)[:500]}
            self._send(answer)

    def do_load(self, source: str) -> dict[str, Any]:
        exec(compile(source, "solution.py", "exec"), self._module.__dict__)  # noqa: S102: what this process is for
        return {"names": [name for name in self._module.__dict__ if isinstance(name, str)]}

    def do_name(self, name: str) -> dict[str, Any]:
        return {"value": encode(self._module.__dict__[name], self.refer)}

    def do_call(self, target: list[Any], arguments: Any, named: Any) -> dict[str, Any]:
        values = decode(arguments, self.resolve)
        result = encode(self.resolve(target)(*values, **decode(named, self.resolve)), self.refer)
        # Lists and the like that the program changed in place are changed for the tests too.
        return {"value": result, "arguments": encode(values, self.refer)}

    def do_get(self, target: list[Any], name: str) -> dict[str, Any]:
        return {"value": encode(getattr(self.resolve(target), name), self.refer)}

    def do_set(self, target: list[Any], name: str, value: Any) -> dict[str, Any]:
        setattr(self.resolve(target), name, decode(value, self.resolve))
        return {"value": None}


if __name__ == "__main__":
    # Only now, since starting a process counts against it.
    resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[1]), int(sys.argv[1])))
    Worker(open(3, encoding="utf-8"), open(4, "w", encoding="utf-8")).serve()
