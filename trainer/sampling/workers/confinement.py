"""Take rights away from the running process, for good: files, network, other processes, memory.

`confine` uses what Linux offers to every user:

- Landlock: only the Python installation can be read, only the scratch folder can be written.
- seccomp: system calls outside a short list fail with EPERM. The list has no sockets, no processes, threads, programs
  or signals to others, no mounts, and nothing that changes owners or modes.
- Resource limits: memory, size of files, number of files, no core dumps.
- The process dies with its parent.

`missing` names the protections that a system lacks. Both interfaces are called through ctypes: the package for Landlock
on PyPI is a development release, and those for seccomp need a C library that many machines lack.
"""

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

FILE_BYTES = 16 << 20
"""Largest file in the scratch folder."""
OPEN_FILES = 64

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_DUMPABLE = 1, 38, 22, 4
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 14  # write, remove and make files and folders, truncate

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# System calls that computing in Python needs: read and write, open and stat, memory, clocks, waiting, signal handlers
# of its own, limits of its own. Numbers of <asm/unistd_64.h> and <asm-generic/unistd.h>.
_ALLOWED = {
    "x86_64": "0-15 17-21 22-28 32-33 35-40 60 63 73-80 82-84 87 89 95-100 102 104 107-108 110-111 121 124 127 131 "
    "137-138 140 143 145 158 160 186 201-202 204 217-219 221 228-233 257-258 262-264 267 269-271 273-274 281 290-293 "
    "295 309 316 318 326 332 334 439",
    "aarch64": "17 19-24 32 34-35 38 43-46 48-50 56-57 59 61-69 71-73 78-80 82-83 93-94 96 98-103 113-115 120-121 "
    "123-124 128 132 134-136 139 141 153 155-156 160 163-166 168-169 172-179 214-216 222-223 226-227 232-233 276 278 "
    "283 285 291 293 439",
}
# Calls that are allowed for these values of one argument: (call, argument, values).
_ALLOWED_WITH = {
    # fcntl without F_SETOWN, which sends signals; ioctl only to ask for a terminal; limits of this process alone
    "x86_64": ((72, 1, (0, 1, 2, 3, 1030)), (16, 1, (0x5401, 0x5450, 0x5451)), (302, 0, (0,))),
    "aarch64": ((25, 1, (0, 1, 2, 3, 1030)), (29, 1, (0x5401, 0x5450, 0x5451)), (261, 0, (0,))),
}
_EPERM, _KILL, _ALLOW = 0x00050001, 0x80000000, 0x7FFF0000


def missing() -> list[str]:
    """The protections that this system does not offer, in words; empty where all of them work."""
    lacks = []
    if _landlock_version() < 1:
        lacks.append("rules for files (Landlock): a grader can read and write the user's files")
    if not _has_seccomp():
        lacks.append("a filter of system calls (seccomp): a grader has a network and can start processes")
    if sys.platform != "linux":
        lacks.append("a limit on memory")
    return lacks


def confine(scratch: str, readable: Iterable[str], memory: int) -> None:
    """Close the doors of this process. What the system does not offer (`missing`) is left out.

    scratch: folder that stays writable. readable: files and folders that stay readable. memory: bytes that the process
    may take in addition to what it has.
    """
    _limit(memory)
    if sys.platform != "linux":
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    if _landlock_version() >= 1:
        _close_files(scratch, readable)
    if _has_seccomp():
        _close_calls()


def readable_paths(packages: Sequence[str] = ()) -> list[str]:
    """What Python reads after the start: its installation, the system's libraries, and these imported packages."""
    installed = [
        path for scheme in ("stdlib", "platstdlib", "purelib", "platlib") if (path := sysconfig.get_path(scheme))
    ]
    installed += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    loaded = [file for name in packages if (file := getattr(sys.modules.get(name), "__file__", None))]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    devices = ["/dev/null", "/dev/zero", "/dev/urandom"]
    return [*dict.fromkeys([*installed, *(str(Path(file).parent) for file in loaded), *system, *devices])]


def limit_time(seconds: float) -> None:
    """End this process by SIGXCPU if it computes for so long from now on, rounded up to whole seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _limit(memory: int) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    _lower(resource.RLIMIT_NPROC, 0)
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, held + memory)


def _lower(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *values: int) -> int:
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return _done(f"prctl {option}", _libc().prctl(option, *arguments))


def _done(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, *arguments: object) -> int:
    call = _libc().syscall
    call.restype = ctypes.c_long
    return call(ctypes.c_long(number), *arguments)


def _landlock_version() -> int:
    """Version of Landlock's interface; 0 or less where there is none."""
    if sys.platform != "linux":
        return 0
    return _syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def _close_files(scratch: str, readable: Iterable[str]) -> None:
    version = _landlock_version()
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = (1 << bits) - 1
    network = 0b11 if version >= 4 else 0
    scoped = 0b11 if version >= 6 else 0  # no abstract sockets of others, no signals to others
    attributes = struct.pack("<QQQ", handled, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _done(
        "landlock",
        _syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)),
    )
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | _READ_DIR)
        _allow(rules, scratch, (_READ_FILE | _READ_DIR | _WRITE) & handled)
        _done("landlock", _syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint32(0)))
    finally:
        os.close(rules)


def _allow(rules: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not on this system: nothing to allow
        return
    try:
        if not Path(path).is_dir():
            access &= ~_READ_DIR
        attributes = struct.pack("<Qi", access, place)
        _done("landlock", _syscall(_LANDLOCK_ADD, ctypes.c_int(rules), ctypes.c_int(1), attributes, ctypes.c_uint32(0)))
    finally:
        os.close(place)


def _has_seccomp() -> bool:
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
        return False
    # SECCOMP_SET_MODE_FILTER without a program fails with EFAULT where filters exist, with EINVAL where not
    return _libc().prctl(_PR_SET_SECCOMP, 2, None, 0, 0) < 0 and ctypes.get_errno() == 14


def _close_calls() -> None:
    program = _filter(platform.machine())
    buffer = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _done("seccomp", _libc().prctl(_PR_SET_SECCOMP, 2, pointer, 0, 0))


def _filter(machine: str) -> bytes:
    """The program that the kernel runs at each system call: Berkeley packet filter, eight bytes per instruction."""

    def load(offset: int) -> bytes:
        return struct.pack("HBBI", 0x20, 0, 0, offset)

    def unless_equal(value: int, skip: int) -> bytes:
        return struct.pack("HBBI", 0x15, 0, skip, value)

    def give(result: int) -> bytes:
        return struct.pack("HBBI", 0x06, 0, 0, result)

    program = load(4) + unless_equal(_ARCHITECTURES[machine], 1) + struct.pack("HBBI", 0x05, 0, 0, 1) + give(_KILL)
    program += load(0)
    for call, argument, values in _ALLOWED_WITH[machine]:
        tests = load(16 + 8 * argument) + b"".join(unless_equal(value, 1) + give(_ALLOW) for value in values)
        tests += give(_EPERM)
        program += unless_equal(call, len(tests) // 8) + tests
    for part in _ALLOWED[machine].split():
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            program += unless_equal(number, 1) + give(_ALLOW)
    return program + give(_EPERM)
