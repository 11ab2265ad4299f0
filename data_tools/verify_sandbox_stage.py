"""Inside the sandbox's walls while they are built: the stage's process, then the judge's, then the worker's until exec.

`Stage` goes from the outermost wall to the innermost and notes for each layer what it does, or why it is open. The
supervisor around it is `verify_sandbox`. Standard library only.
"""

import json
import os
import platform
import resource
import signal
import sysconfig
import time
from collections.abc import Callable
from typing import Any

from data_tools import verify_judge
from data_tools import verify_sandbox_kernel as kernel

NOBODY = 65534
SYSTEM_FOLDERS = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/nix/store")
SYSTEM_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
SETUP_FAILED_TO = 5  # the descriptor by which a worker says that it could not be started
NPROC_PER_NAMESPACE = (5, 14)  # the kernel that counts processes for each user namespace


class Setup(Exception):
    """The sandbox could not be built; the message says why."""


def in_child(work: Callable[[], None], result: int) -> None:
    """Run `work` in a forked child, which never comes back; a failed setup becomes a line of the result."""
    try:
        work()
        os._exit(0)
    except BaseException as error:
        message = json.dumps({"setup": f"{type(error).__name__}: {error}"})
        try:
            os.write(result, message.encode() + b"\n")
        finally:
            os._exit(1)


def system_paths(python: str) -> list[str]:
    """What a Python needs to run: its file, its standard library, and the system's libraries."""
    wanted = [python, os.path.realpath(python), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    with open("/proc/self/maps", encoding="utf-8") as file:
        mapped = [line.split(maxsplit=5)[5].strip() for line in file if line.count("/")]
    wanted += [os.path.dirname(path) for path in mapped if ".so" in os.path.basename(path)]
    paths: list[str] = []
    for path in [*SYSTEM_FOLDERS, *SYSTEM_FILES, *wanted]:
        inside = any(path == known or path.startswith(known + "/") for known in paths)
        if os.path.exists(path) and not inside and path != "/":
            paths.append(path)
    return paths


class Stage:
    """Runs in the stage's process, then in the judge's: builds the walls, from the outermost to the innermost."""

    def __init__(self, job: dict[str, Any], output: int, result: int, ready: int, mapped: int) -> None:
        self._job, self._limits, self._layers = job, job["limits"], job["layers"]
        self._output, self._result, self._ready, self._mapped = output, result, ready, mapped
        self._was_root = os.geteuid() == 0
        self._folder = job["folder"]
        self._said: dict[str, str] = {}
        self._paths = system_paths(job["python"])
        self._processes = self._limits["processes"]

    def run(self) -> None:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
        if _release() < NPROC_PER_NAMESPACE:
            self._processes += _tasks_of_user(self._user())
        namespaces = self._enter_namespaces()
        if not namespaces and _release() >= NPROC_PER_NAMESPACE:
            self._processes += _tasks_of_user(self._user())
        judge = os.fork()
        if judge == 0:
            in_child(lambda: self._judge(namespaces), self._result)
        os.close(self._result)
        os.waitpid(judge, 0)

    def _enter_namespaces(self) -> bool:
        """New user, mount, process, network and IPC namespaces with a root of our own; False where not allowed."""
        flags = kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
        flags |= kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
        try:
            if "namespaces" not in self._layers:
                raise OSError(self._job.get("no_namespaces", "switched off"))
            kernel.unshare(flags)
        except OSError as error:
            os.write(self._ready, b"n")
            self._said["namespaces"] = f"none ({error})"
            return False
        os.write(self._ready, b"m")
        try:
            answer = os.read(self._mapped, 200)
            if answer != b"g":
                raise OSError(answer.decode())
            self._build_root()
        except OSError as error:  # some systems hand out user namespaces in which nothing may be done
            os.write(self._result, json.dumps({"again": str(error)}).encode() + b"\n")
            os._exit(0)
        self._folder = "/box"
        for layer in ("files", "processes", "network"):
            self._said[layer] = "closed (namespace)"
        return True

    def _build_root(self) -> None:
        base = self._folder
        kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("tmpfs", base, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=1k,mode=0755")
        for path in self._paths:
            target = base + path
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if os.path.islink(path) and os.path.isabs(path) and os.path.isdir(path):
                os.symlink(os.readlink(path), target)
                continue
            self._show(path, target)
        os.makedirs(base + "/dev/shm")
        for path in DEVICES:
            open(base + path, "w").close()
            kernel.mount(path, base + path, None, kernel.MS_BIND)
        owner = NOBODY if self._was_root else os.geteuid()
        group = NOBODY if self._was_root else os.getegid()
        size = f"size={self._limits['folder_bytes']},nr_inodes=4k,mode=0700,uid={owner},gid={group}"
        for folder in ("/box", "/dev/shm"):
            os.makedirs(base + folder, exist_ok=True)
            kernel.mount("tmpfs", base + folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, size)
        lock = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount(None, base, None, lock)
        kernel.enter_root(base)

    @staticmethod
    def _show(path: str, target: str) -> None:
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "w").close()
        kernel.bind_read_only(os.path.realpath(path), target)

    def _judge(self, namespaces: bool) -> None:
        """In the judge's process: drop rights, close the layers, start the worker, run the tests."""
        self._drop_user(namespaces)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        os.chdir(self._folder)
        if not os.access(self._job["python"], os.X_OK):
            raise Setup(
                f"{self._job['python']} cannot be run by user {os.getuid()}; use a Python that all users may run"
            )
        self._close_files(namespaces)
        if "seccomp" in self._layers:
            try:
                kernel.check_filter()
                self._said["calls"] = "filtered (seccomp)"
            except OSError as error:
                self._said["calls"] = f"open: {error}"
        else:
            self._said["calls"] = "open: switched off"
        filtered = self._said["calls"].startswith("filtered")
        self._said.setdefault("network", "closed (seccomp)" if filtered else "open: no namespace, no seccomp")
        how = "watched (their group, subreaper, seccomp)" if filtered else "open: it may signal processes of its user"
        self._said.setdefault("processes", how)
        self._said["user"] = str(os.getuid())
        self._run()

    def _user(self) -> int:
        return NOBODY if self._was_root else os.getuid()

    def _drop_user(self, namespaces: bool) -> None:
        if self._was_root:
            if not namespaces:
                os.chown(self._folder, NOBODY, NOBODY)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.drop_capabilities()

    def _close_files(self, namespaces: bool) -> None:
        if "landlock" not in self._layers:
            self._said.setdefault("files", "open: no namespace, Landlock switched off")
            return
        shared_memory = ["/dev/shm"] if namespaces else []
        try:
            paths = [path for path in self._paths if os.path.exists(path)]
            kernel.restrict_files(paths, [self._folder, *shared_memory], DEVICES)
        except OSError as error:
            self._said.setdefault("files", f"open: no namespace, {error}")
            return
        self._said["files"] = f"{self._said['files'][:-1]}, Landlock)" if namespaces else "closed (Landlock)"

    def _run(self) -> None:
        to_worker, to_worker_end = os.pipe()
        from_worker, from_worker_end = os.pipe()
        worker = os.fork()
        if worker == 0:
            self._start_worker(to_worker, from_worker_end)
        os.close(to_worker)
        os.close(from_worker_end)
        os.write(self._result, json.dumps({"sandbox": self._said}).encode() + b"\n")
        self._limit("CPU", self._limits["cpu_s"])
        self._limit("AS", self._limits["memory_bytes"])
        report = verify_judge.run_tests(self._job, open(to_worker_end, "wb"), open(from_worker, "rb"))
        if not report["ok"]:
            self._ended(worker, report)
        report["token"] = self._job["token"] if report["ok"] else None
        os.write(self._result, json.dumps({**report, "sandbox": self._said}).encode() + b"\n")

    def _ended(self, worker: int, report: dict[str, Any]) -> None:
        """Say how the worker ended, where it has."""
        for _ in range(20):
            pid, status = os.waitpid(worker, os.WNOHANG)
            if pid:
                break
            if "process ended" not in report["why"]:
                return
            time.sleep(0.01)
        else:
            return
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            report["why"] += f" (killed by {signal.Signals(number).name})"
            if number == signal.SIGXCPU:
                report["limit"] = f"CPU {self._limits['cpu_s']} s"
            elif number == signal.SIGXFSZ:
                report["limit"] = f"file size {self._limits['file_bytes']} bytes"
        else:
            report["why"] += f" (exit code {os.waitstatus_to_exitcode(status)})"

    def _start_worker(self, requests: int, answers: int) -> None:
        """In the worker's process; never comes back."""
        try:
            self._become_worker(requests, answers)
        except BaseException as error:
            os.write(SETUP_FAILED_TO, json.dumps({"setup": f"starting the program: {error}"}).encode() + b"\n")
        finally:
            os._exit(127)

    def _become_worker(self, requests: int, answers: int) -> None:
        nothing = os.open("/dev/null", os.O_RDONLY)
        ends = (nothing, self._output, self._output, requests, answers, self._result)
        high = [os.dup2(descriptor, 100 + place) for place, descriptor in enumerate(ends)]
        for place, descriptor in enumerate(high):
            os.dup2(descriptor, place, inheritable=place != SETUP_FAILED_TO)  # that one is closed by exec
        os.closerange(SETUP_FAILED_TO + 1, 1 << 16)
        self._limit("CPU", self._limits["cpu_s"], grace=1)  # so that SIGXCPU, the named end, comes before SIGKILL
        self._limit("AS", self._limits["memory_bytes"])
        self._limit("FSIZE", self._limits["file_bytes"])
        self._limit("NOFILE", 64)
        self._limit("CORE", 0)
        self._limit("MEMLOCK", 0)
        self._limit("MSGQUEUE", 0)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
        if self._said["calls"].startswith("filtered"):
            kernel.filter_calls(os.getpid())
        home = self._folder
        environment = {"HOME": home, "TMPDIR": home, "PATH": "", "LC_ALL": "C.UTF-8"}
        python, source = self._job["python"], self._job["worker"]
        command = [python, "-I", "-S", "-B", "-u", "-X", "utf8", "-c", source, str(self._processes)]
        os.execve(python, command, environment)

    @staticmethod
    def _limit(name: str, value: int, grace: int = 0) -> None:
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        most = value + grace if hard == resource.RLIM_INFINITY else min(value + grace, hard)
        resource.setrlimit(number, (min(value, most), most))


def _release() -> tuple[int, ...]:
    """The kernel's version, its first two numbers."""
    digits = platform.release().replace("-", ".").split(".")[:2]
    return tuple(int(part) for part in digits if part.isdigit())


def _tasks_of_user(uid: int) -> int:
    """Threads that a user runs: an older kernel's RLIMIT_NPROC counts them all."""
    count = 0
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count
