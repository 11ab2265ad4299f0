"""What the Linux kernel can shut, called through ctypes: namespaces, a root of its own, Landlock, seccomp.

Each function does one thing and raises OSError where the kernel will not; which layers are in force, and what is said
when one is missing, is the business of `verify_sandbox`. Only the standard library: this runs without site packages.
Sources: the man pages unshare(2), mount_setattr(2), pivot_root(2), landlock(7), seccomp(2), prctl(2), capabilities(7),
and the syscall tables of x86-64 and arm64.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Iterable, Sequence

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
PR_GET_SECCOMP, SECCOMP_MODE_FILTER = 21, 2
SIGKILL = 9

# name: (x86-64, arm64). New calls have one number on both.
SYSCALLS = {
    "pivot_root": (155, 41), "mount_setattr": (442, 442), "capset": (126, 91),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
}  # fmt: skip
# Calls that a tested program has no use for. socket: no network; the SysV and memfd ones: memory that no limit sees.
DENIED = {
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "fsopen": (430, 430), "fsmount": (432, 432), "open_tree": (428, 428), "fspick": (433, 433),
    "move_mount": (429, 429), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "personality": (135, 92), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "reboot": (169, 142), "swapon": (167, 224),
    "fanotify_init": (300, 262), "acct": (163, 89), "quotactl": (179, 60),
}  # fmt: skip
# A process may signal itself, nothing else.
SIGNALS = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
CLONE, CLONE3 = (56, 220), (435, 435)
NEW_NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | 0x02000000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32_BIT = 0x40000000
EPERM, ENOSYS = 1, 38

LANDLOCK_ACCESS_FS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # Landlock ABI: how many kinds of access it can refuse
LANDLOCK_READ = 1 << 0 | 1 << 2 | 1 << 3  # run a file, read a file, list a folder
LANDLOCK_WRITE_FILE = 1 << 1
LANDLOCK_FILE_ACCESS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # what a rule for a file, not a folder, may hold
LANDLOCK_NET_TCP = 3
LANDLOCK_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 3

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _number(pair: tuple[int, int]) -> int:
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(ENOSYS, f"system calls of {machine} are not known here")
    return pair[MACHINES[machine][0]]


def _syscall(name: str, *arguments: object) -> int:
    return _checked(_libc.syscall(ctypes.c_long(_number(SYSCALLS[name])), *arguments), name)


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def unshare(flags: int) -> None:
    """Leave the namespaces named by CLONE_NEW* flags for new ones."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    texts = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    _checked(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def bind_read_only(source: str, target: str) -> None:
    """Show `source`, with all that is mounted in it, at `target`, where nothing of it can be written."""
    mount(source, target, None, MS_BIND | MS_REC)
    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    argument = ctypes.create_string_buffer(struct.pack("=4Q", attributes, 0, 0, 0), 32)
    path = ctypes.c_char_p(target.encode())
    _syscall("mount_setattr", AT_FDCWD, path, AT_RECURSIVE, argument, ctypes.c_size_t(32))


def enter_root(folder: str) -> None:
    """Make `folder`, a mount, the root and let go of the old one."""
    os.chdir(folder)
    _syscall("pivot_root", ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))
    _checked(_libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def drop_capabilities() -> None:
    """Give up every capability of this thread."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    _syscall("capset", header, ctypes.create_string_buffer(24))


def restrict_files(readable: Iterable[str], writable: Iterable[str], devices: Iterable[str]) -> int:
    """Landlock: read below `readable`, write below `writable` and to `devices` only; no TCP; no signals and no abstract
    sockets to outside. Returns the kernel's Landlock ABI; raises OSError where it has none."""
    create = _number(SYSCALLS["landlock_create_ruleset"])
    abi = _checked(_libc.syscall(ctypes.c_long(create), None, ctypes.c_size_t(0), 1), "landlock")
    everything = (1 << LANDLOCK_ACCESS_FS.get(abi, 16)) - 1
    attributes = struct.pack("=Q", everything)
    if abi >= 4:
        attributes += struct.pack("=Q", LANDLOCK_NET_TCP)
    if abi >= 6:
        attributes += struct.pack("=Q", LANDLOCK_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = _syscall("landlock_create_ruleset", buffer, ctypes.c_size_t(len(attributes)), 0)
    rules = [(path, LANDLOCK_READ) for path in readable] + [(path, everything) for path in writable]
    rules += [(path, LANDLOCK_READ | LANDLOCK_WRITE_FILE) for path in devices]
    for path, access in rules:
        _allow(ruleset, path, access & everything)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)
    return abi


def _allow(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            access &= LANDLOCK_FILE_ACCESS
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, descriptor), 12)
        _syscall("landlock_add_rule", ruleset, 1, rule, 0)
    finally:
        os.close(descriptor)


def _op(code: int, yes: int, no: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value & 0xFFFFFFFF)


LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16


def filter_program(own_pid: int) -> bytes:
    """The seccomp filter as classic BPF: DENIED fails with EPERM, signals go to `own_pid` only, no new namespaces."""
    index, architecture = MACHINES[platform.machine()]
    no = _op(RETURN, 0, 0, REFUSE | EPERM)
    program = [_op(LOAD, 0, 0, ARCHITECTURE_AT), _op(EQUAL, 1, 0, architecture), no, _op(LOAD, 0, 0, NUMBER_AT)]
    if index == 0:
        program += [_op(AT_LEAST, 0, 1, X32_BIT), no]
    for pair in DENIED.values():
        program += [_op(EQUAL, 0, 1, pair[index]), no]
    program += [_op(EQUAL, 0, 1, CLONE3[index]), _op(RETURN, 0, 0, REFUSE | ENOSYS)]  # libc then takes clone
    first = _op(LOAD, 0, 0, FIRST_ARGUMENT_AT)
    yes = _op(RETURN, 0, 0, ALLOW)
    for pair in SIGNALS.values():
        program += [_op(EQUAL, 0, 4, pair[index]), first, _op(EQUAL, 0, 1, own_pid), yes, no]
    program += [_op(EQUAL, 0, 3, CLONE[index]), first, _op(ANY_BIT, 0, 1, NEW_NAMESPACES), no, yes]
    return b"".join(program)


def check_filter() -> None:
    """Raises OSError where `filter_calls` cannot work: another machine, a kernel without seccomp."""
    _number(CLONE)
    _checked(_libc.prctl(PR_GET_SECCOMP, 0, 0, 0, 0), "seccomp")


def filter_calls(own_pid: int) -> None:
    """Install `filter_program` for this process and what it becomes; raises OSError where that cannot be."""
    program = filter_program(own_pid)
    code = ctypes.create_string_buffer(program, len(program))
    holder = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)), 16)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _checked(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, holder, 0, 0), "seccomp")


def descendants(pid: int) -> Sequence[int]:
    """All living processes below `pid`, nearest first."""
    listed = os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # not in every kernel
    parents = {} if listed else _children_by_parent()
    found: list[int] = []
    waiting = [pid]
    while waiting:
        parent = waiting.pop(0)
        children = _children(parent) if listed else parents.get(parent, [])
        found += children
        waiting += children
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    except OSError:  # it ended meanwhile
        pass
    return found


def _children_by_parent() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        found.setdefault(parent, []).append(int(name))
    return found


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory that processes hold, added up (shared pages count for each)."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm", encoding="ascii") as file:
                total += int(file.read().split()[1])
        except (OSError, IndexError, ValueError):
            continue
    return total * os.sysconf("SC_PAGE_SIZE")
