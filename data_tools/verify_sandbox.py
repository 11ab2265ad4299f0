"""The sandbox that unit tests run in: one supervisor process, which starts two others, watches them and leaves none.

    supervisor     outside, reads a job (JSON) from stdin, writes a report (JSON) to stdout
      stage        enters new namespaces and builds a root of read-only system folders and one folder to write in
        judge      first process of the new process namespace, as `nobody` when started by root; runs the tests
          worker   a fresh Python with the tested program, under rlimits and a seccomp filter

When the judge ends, the kernel kills whatever is left in its process namespace. Where namespaces are not allowed, the
same is done with less: Landlock for files, seccomp for the network and for signals, and the supervisor kills its
descendants, which cannot leave it (it is their subreaper). The report says which layer does what, and what is open.
Started by `verify_code` as a plain script: standard library only.
"""

import json
import os
import select
import signal
import sys
import time
from typing import Any

from data_tools import verify_sandbox_kernel as kernel
from data_tools.verify_sandbox_stage import NOBODY, Stage, in_child

POLL_S = 0.05
OUTPUT_KEPT = 2000  # bytes of the program's output that the report quotes
FINAL = {"ok", "setup", "again"}  # keys of a line of the result that ends an attempt


def main() -> None:
    """One job from stdin to stdout."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    job = json.loads(sys.stdin.buffer.read())
    print(json.dumps(Supervisor(job).run()), flush=True)


class Supervisor:
    """Starts the stage, collects output and result under the limits, kills everything at the end."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job, self._limits = job, job["limits"]
        self._sandbox: dict[str, str] = {}
        self._output = b""
        self._output_bytes = 0

    def run(self) -> dict[str, Any]:
        """The report; where namespaces are promised and then do not work, all is done once more without them."""
        report = self._attempt()
        if "again" in report:
            self._job["layers"] = [layer for layer in self._job["layers"] if layer != "namespaces"]
            self._job["no_namespaces"] = report["again"]
            report = self._attempt()
        return report

    def _attempt(self) -> dict[str, Any]:
        output, output_end = os.pipe()
        result, result_end = os.pipe()
        ready, ready_end = os.pipe()
        mapped, mapped_end = os.pipe()
        stage = os.fork()
        if stage == 0:
            in_child(lambda: Stage(self._job, output_end, result_end, ready_end, mapped).run(), result_end)
        for descriptor in (output_end, result_end, ready_end, mapped):
            os.close(descriptor)
        if os.read(ready, 1) == b"m":
            try:
                _write_maps(stage)
                os.write(mapped_end, b"g")
            except OSError as error:
                os.write(mapped_end, f"users: {error}".encode())
        report = self._watch(stage, output, result)
        self._kill_all()
        while select.select([output], [], [], 0)[0] and (data := os.read(output, 65536)):
            self._take(data)
        for descriptor in (output, result, ready, mapped_end):
            os.close(descriptor)
        return {**report, "output": self._output.decode(errors="replace"), "output_bytes": self._output_bytes}

    def _watch(self, stage: int, output: int, result: int) -> dict[str, Any]:
        """Until there is a result, the stage is gone or a limit is passed."""
        lines = b""
        started = time.monotonic()
        open_pipes = [output, result]
        while True:
            readable, _, _ = select.select(open_pipes, [], [], POLL_S)
            for pipe in readable:
                data = os.read(pipe, 65536)
                if not data:
                    open_pipes.remove(pipe)
                elif pipe == result:
                    lines += data
                else:
                    self._take(data)
            said = [json.loads(line) for line in lines.split(b"\n")[:-1]]
            for last in said:
                if FINAL & last.keys():
                    return last
            last = said[-1] if said else {}
            over = self._over(started)
            if over or result not in open_pipes:
                why = f"limit: {over}" if over else "the tests' process ended without a result"
                return {**last, "ok": False, "why": why, "limit": over}

    def _take(self, data: bytes) -> None:
        self._output_bytes += len(data)
        self._output += data[: max(0, OUTPUT_KEPT - len(self._output))]

    def _over(self, started: float) -> str | None:
        """The limit that is passed, in words."""
        if time.monotonic() - started > self._limits["wall_s"]:
            return f"wall clock {self._limits['wall_s']} s"
        if self._output_bytes > self._limits["output_bytes"]:
            return f"output {self._limits['output_bytes']} bytes"
        if kernel.resident_bytes(kernel.descendants(os.getpid())) > self._limits["total_memory_bytes"]:
            return f"memory of all its processes {self._limits['total_memory_bytes']} bytes"
        return None

    def _kill_all(self) -> None:
        """Kill what is below this process until nothing is; orphans come back to us, so the tree has an end."""
        while True:
            for pid in kernel.descendants(os.getpid()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.001)


def _write_maps(pid: int) -> None:
    """Who the stage's user namespace knows: root and nobody when we are root, ourselves when we are not."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        maps = [("uid_map", f"0 0 1\n{NOBODY} {NOBODY} 1"), ("gid_map", f"0 0 1\n{NOBODY} {NOBODY} 1")]
    else:
        maps = [("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")]
    for name, text in maps:
        with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
            file.write(text)


if __name__ == "__main__":
    main()
