"""Programs that attack the sandbox of unit tests, and right ones that leave something behind.

Every program is asked for f(2) == 4 and f(3) == 9. An attack would pass if it worked. `{mark}` is filled with a word
that is looked for among the machine's processes, `{outside}` with a file in /tmp that must not come to be, `{readable}`
with a file that the user nobody may read. One table of programs, longer than 400 lines because it is data.
"""

# name: (program, a part of what the verdict says)
ATTACKS = {
    "fork bomb": (
        """
import os
def f(x):
    while True:
        try: os.fork()
        except OSError: pass
""",
        "limit: wall clock",
    ),
    "endless loop": (
        """
def f(x):
    while True: pass
""",
        "limit: wall clock",
    ),
    "endless loop while loading": ("while True: pass", "limit: wall clock"),
    "sleep": (
        """
import time
def f(x): time.sleep(60)
""",
        "limit: wall clock",
    ),
    "stops itself": (
        """
import os, signal
def f(x): os.kill(os.getpid(), signal.SIGSTOP)
""",
        "limit: wall clock",
    ),
    "10 GB": ("def f(x): return len(bytearray(10 << 30)) and x * x", "MemoryError"),
    "10 GB in parts": (
        """
import os, time
def f(x):
    for _ in range(4): os.fork()
    kept = b'x' * (200 << 20)
    time.sleep(9)
""",
        "limit: memory of all its processes",
    ),
    "writes to /tmp": (
        """
def f(x):
    open('{outside}', 'w').write('x')
    return x * x
""",
        "Error",
    ),
    "writes beside its folder": (
        """
def f(x):
    open('../escaped', 'w').write('x')
    return x * x
""",
        "Error",
    ),
    "writes to the library": (
        """
import os
def f(x):
    open(os.path.dirname(os.__file__) + '/escaped.py', 'w')
    return x * x
""",
        "Error",
    ),
    "link out of the folder": (
        """
import os
def f(x):
    os.symlink('/tmp', 'out')
    open('out/{outside_name}', 'w')
    return x * x
""",
        "Error",
    ),
    "reads a secret file": (
        """
def f(x):
    open('{readable}').read()
    return x * x
""",
        "Error",
    ),
    "kills its parent": (
        """
import os
def f(x):
    os.kill(os.getppid(), 9)
    return x * x
""",
        "PermissionError",
    ),
    "kills everybody": (
        """
import os
def f(x):
    os.kill(-1, 9)
    return x * x
""",
        "PermissionError",
    ),
    "kills its group": (
        """
import os
def f(x):
    os.killpg(0, 9)
    return x * x
""",
        "PermissionError",
    ),
    "becomes root": (
        """
import os
def f(x):
    os.setuid(0)
    return x * x
""",
        "PermissionError",
    ),
    "too much output": (
        """
def f(x):
    while True: print('x' * 10000)
""",
        "limit: output",
    ),
    "reads stdin": ("def f(x): return int(input()) and x * x", "EOFError"),
    "a file too large": (
        """
def f(x):
    open('big', 'wb').write(bytes(100 << 20))
    return x * x
""",
        "OSError",
    ),
    "opens a socket": (
        """
import socket
def f(x):
    socket.socket()
    return x * x
""",
        "PermissionError",
    ),
    "asks for a name": (
        """
import socket
def f(x):
    socket.create_connection(('example.com', 80))
""",
        "rror",
    ),
    "os._exit while loading": (
        """
import os
os._exit(0)
""",
        "process ended",
    ),
    "os._exit in a test": (
        """
import os
def f(x): os._exit(0)
""",
        "exit code 0",
    ),
    "sys.exit while loading": (
        """
import sys
sys.exit(0)
""",
        "SystemExit",
    ),
    "sys.exit in a test": (
        """
import sys
def f(x): sys.exit(0)
""",
        "SystemExit",
    ),
    "exec of another program": (
        """
import os
def f(x): os.execv('/bin/true', ['true'])
""",
        "Error",
    ),
    "replaces built-ins": (
        """
import builtins, sys
class Quiet(Exception):
    def __init__(self, *a): sys.exit(0)
builtins.AssertionError = Quiet
builtins.len = lambda x: 4
builtins.isinstance = lambda *a: True
sys.exit = lambda *a: None
def f(x): return 0
""",
        "",
    ),
    "equals everything": (
        """
class Yes(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def f(x): return Yes(0)
""",
        "AssertionError",
    ),
    "an object that equals everything": (
        """
class Yes:
    def __eq__(self, other): return True
    def __bool__(self): return True
def f(x): return Yes()
""",
        "AssertionError",
    ),
    "a class that equals everything": (
        """
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class Yes(metaclass=Meta): pass
def f(x): return Yes
""",
        "AssertionError",
    ),
    "shadows what tests use": (
        """
def f(x): return 0
def abs(x): return 4
def AssertionError(x): return 4
""",
        "AssertionError",
    ),
    "forges the answer": (
        r"""
import os, json
line = json.dumps({'ok': True, 'token': 'x', 'value': 4, 'names': ['f']}) + '\n'
for fd in range(3, 256):
    try: os.write(fd, line.encode() * 9)
    except OSError: pass
def f(x): return 0
""",
        "",
    ),
    "searches for the tests": (
        """
import gc, sys
found = [o for o in gc.get_objects() if isinstance(o, dict) and 'tests' in o and 'token' in o]
frame = sys._getframe()
while frame:
    found += [v for v in frame.f_locals.values() if 'assert f' + '(2)' in str(v)]
    frame = frame.f_back
def f(x): return x * x if found else 0
""",
        "AssertionError",
    ),
    "writes into other processes": (
        """
import os
def f(x):
    for pid in range(1, 40000):
        try: open(f'/proc/{pid}/mem', 'r+b')
        except OSError: continue
        if pid != os.getpid(): return x * x
    return 0
""",
        "AssertionError",
    ),
    "endless recursion": ("def f(x): return f(x)", "RecursionError"),
    "recursion without a limit": (
        """
import sys
sys.setrecursionlimit(1 << 30)
def f(x): return [f(x), f(x)]
""",
        "",
    ),
    "an answer without end": (
        """
import itertools
def f(x): return itertools.count()
""",
        "ValueError",
    ),
    "an answer within itself": (
        """
def f(x):
    a = []
    a.append(a)
    return a
""",
        "RecursionError",
    ),
    "threads without end": (
        """
import threading, time
def f(x):
    for _ in range(100): threading.Thread(target=time.sleep, args=(9,)).start()
    return x * x
""",
        "can't start new thread",
    ),
    "new namespaces": (
        """
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x10000000) == 0, os.strerror(ctypes.get_errno())
    return x * x
""",
        "not permitted",
    ),
    "environment": (
        """
import os
def f(x): return x * x if os.environ.get('VERIFY_SECRET') else 0
""",
        "AssertionError",
    ),
    "descriptors": (
        """
import os
def f(x):
    n = 0
    for fd in range(5, 1024):
        try: os.fstat(fd); n += 1
        except OSError: pass
    return x * x if n else 0
""",
        "AssertionError",
    ),
    "syntax error": ("def f(x) return x", "SyntaxError"),
    "no such function": ("def g(x): return x", "NameError"),
}

# Right programs, whatever they do besides.
HARMLESS = {
    "leaves a daemon": """
import os, sys, signal
def f(x):
    if os.fork() == 0:
        os.setsid()
        signal.signal(1, signal.SIG_IGN)
        if os.fork(): os._exit(0)
        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(99)', '{mark}'])
    return x * x
""",
    "leaves threads": """
import threading, time
def f(x):
    threading.Thread(target=time.sleep, args=(99,)).start()
    return x * x
""",
    "uses its folder": """
import os, tempfile
def f(x):
    os.makedirs('a/b', exist_ok=True)
    open('a/b/c', 'w').write(str(x * x))
    tempfile.NamedTemporaryFile().write(b'x')
    os.chmod('a/b', 0o500)
    n = int(open('a/b/c').read())
    os.chmod('a/b', 0o700)
    return n
""",
    "takes its own rights": """
import os
def f(x):
    os.makedirs(f'a{x}/b')
    open(f'a{x}/b/c', 'w')
    os.chmod(f'a{x}/b', 0)
    os.chmod(f'a{x}', 0)
    return x * x
""",
    "ignores its signals": """
import signal
for s in range(1, 32):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x): return x * x
""",
    "uses libraries": """
import hashlib, zlib, ssl, sqlite3, ctypes, decimal, zoneinfo, random, multiprocessing, asyncio
async def g(x): return x * x
def f(x): return asyncio.run(g(x))
""",
}
