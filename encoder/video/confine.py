"""Confinement of the decoding process by the kernel: landlock, seccomp, dropped capabilities.

    applied = confine(untrusted=True)     # in the child, after its imports, before a byte of the file is read
    print(report())                       # "landlock (ABI 7), seccomp" on this machine

Two layers that do not need each other. Seccomp is a list of allowed system calls for an untrusted file
(memory, threads, clocks, reads and writes on what is open already): nothing can be opened, named, started
or signalled, and no socket made. An allow-list because what a decoder needs is short once its imports are
done, while what a kernel offers grows; unknown calls fail with an error number, so that libraries fall
back. For the caller's own files, whose decoders open files and load libraries, it is a list of refused
calls: no network, no programs, no writing. Landlock says the same once more for files, TCP, abstract
sockets and signals.

Both are a few kernel calls, made here by ctypes, because neither glibc nor Python offers them and the
packages that do are not maintained. Linux on x86-64 and aarch64; elsewhere `confine` does nothing and says
so.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_NAME = 1, 4, 38, 15
_PROBE_S = 20.0  # a child that only confines itself takes some 50 ms


@dataclass(frozen=True)
class Confinement:
    """What is in force in a process. landlock: its version (ABI), 0 without; seccomp: calls are filtered."""

    landlock: int = 0
    seccomp: bool = False

    @property
    def contained(self) -> bool:
        """Whether a hijacked decoder of an untrusted file reaches nothing but that file and its pipe."""
        return self.seccomp

    def __str__(self) -> str:
        layers = [f"landlock (ABI {self.landlock})"] * bool(self.landlock) + ["seccomp"] * self.seccomp
        if self.contained:
            return ", ".join(layers)
        return (
            f"{', '.join(layers) or 'memory and time limits'} only: a hijacked decoder is not contained here"
        )


def confine(*, untrusted: bool, last: Callable[[], None] = lambda: None) -> Confinement:
    """Confine this process for good; call it while it has one thread. Returns what is in force.

    untrusted: nothing but open descriptors, memory, threads and clocks is left, capabilities are dropped and
    the process ends with the thread that started it. Else: reading files is left, too.
    last: called when all but the call filter is in force, for limits that may not be changed afterwards.
    """
    if sys.platform != "linux":
        last()
        return Confinement()
    libc = ctypes.CDLL(None, use_errno=True)
    program = _program(_untrusted_rules() if untrusted else _trusted_rules(), _EPERM if untrusted else _ALLOW)
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    abi = _landlock(libc, read=not untrusted)
    if untrusted:
        _drop_capabilities(libc)
        _prctl(libc, _PR_SET_PDEATHSIG, int(signal.SIGKILL))
    last()
    return Confinement(abi, program is not None and install_filter(libc, program))


@lru_cache(maxsize=1)
def report() -> Confinement:
    """What this machine can do for untrusted files: asked of a child process, which tries it (once)."""
    import subprocess  # not needed in the children themselves

    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
    code = "import sys; sys.path[:] = sys.argv[1:]; from encoder.video import confine; confine.write_report()"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, root, *filter(None, sys.path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_S,
            check=True,
        )
        return Confinement(**json.loads(done.stdout))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return Confinement()


def write_report() -> None:
    """Confine this process and write what is in force to stdout, as JSON; the child of `report` runs it."""
    sys.stdout.write(json.dumps(asdict(confine(untrusted=True))))


def hide_memory() -> bool:
    """Keep other processes of this user from this one's memory and environment; whether that is in force.

    For a server that holds secrets: such a process leaves no core dump, and debuggers and profilers of the
    same user cannot attach. Never called by an import.
    """
    if sys.platform != "linux":
        return False
    return _prctl(ctypes.CDLL(None), _PR_SET_DUMPABLE, 0)


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> bool:
    rest = (ctypes.c_ulong(n) for n in (value, 0, 0, 0))  # the kernel compares whole registers with 0
    return bool(libc.prctl(option, *rest) == 0)


# -- landlock: rights on files, TCP ports, sockets and signals -----------------------------------------------

_READ_RIGHTS = 1 << 2 | 1 << 3  # of files, of directories
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many rights on files each ABI knows
_TCP, _SCOPES = 0b11, 0b11  # bind and connect, from ABI 4 on; abstract sockets and signals, from ABI 6 on


def _landlock(libc: ctypes.CDLL, *, read: bool) -> int:
    """Refuse all that landlock can refuse, but for reading where `read`; the ABI in force, 0 for none."""
    create, restrict = SYSCALL_NUMBERS["landlock_create_ruleset"], SYSCALL_NUMBERS["landlock_restrict_self"]
    abi: int = libc.syscall(create[0], None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return 0
    rights = (1 << _FILE_RIGHTS.get(abi, 16)) - 1
    attributes = struct.pack(
        "=QQQ",
        rights & ~_READ_RIGHTS if read else rights,
        _TCP if abi >= 4 else 0,
        _SCOPES if abi >= 6 else 0,
    )
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = libc.syscall(create[0], attributes, ctypes.c_size_t(size), 0)
    if rules < 0:
        return 0
    refused = libc.syscall(restrict[0], rules, 0)
    os.close(rules)
    return 0 if refused else abi


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root's child is no root: it may read, signal and mount no more than anybody."""
    libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))


# -- seccomp: which system calls are answered ----------------------------------------------------------------

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, the kernel's name
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = _ERROR | errno.EPERM, _ERROR | errno.ENOSYS
_YOUNG = 435  # calls from this number on are so new that libraries do without them where they are missing
_UNKNOWN = 453  # calls from this number on are not in the table
_X32 = 0x40000000  # numbers of x86-64's second set of calls, which would pass by other numbers

# name:x86-64:aarch64, "-" where an architecture has no such call
_TABLE = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 preadv:295:69 lseek:8:62 close:3:57 fcntl:72:25
mmap:9:222 munmap:11:215 mprotect:10:226 mremap:25:216 madvise:28:233 brk:12:214 membarrier:324:283
futex:202:98 futex_waitv:449:449 clone:56:220 clone3:435:435 set_robust_list:273:99 rseq:334:293
exit:60:93 exit_group:231:94 rt_sigprocmask:14:135 rt_sigaction:13:134 rt_sigreturn:15:139 sigaltstack:131:132
restart_syscall:219:128 tgkill:234:131 gettid:186:178 getpid:39:172 getppid:110:173 getuid:102:174
geteuid:107:175 getgid:104:176 getegid:108:177 sched_yield:24:124 sched_getaffinity:204:123 getcpu:309:168
sched_getparam:143:121 sched_getscheduler:145:120 clock_gettime:228:113 clock_getres:229:114 nanosleep:35:101
clock_nanosleep:230:115 gettimeofday:96:169 time:201:- times:100:153 getrusage:98:165 getrlimit:97:163
getrandom:318:278 sysinfo:99:179 uname:63:160 prlimit64:302:261 prctl:157:167
ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 pidfd_getfd:438:438 execve:59:221
execveat:322:281 bpf:321:280 perf_event_open:298:241 userfaultfd:323:282 keyctl:250:219 add_key:248:217
request_key:249:218 io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427 mount:165:40
umount2:166:39 pivot_root:155:41 chroot:161:51 setns:308:268 unshare:272:97 init_module:175:105
finit_module:313:273 kexec_load:246:104 kexec_file_load:320:294 reboot:169:142 open_by_handle_at:304:265
socket:41:198 socketpair:53:199 connect:42:203 bind:49:200 listen:50:201 accept:43:202 accept4:288:242
fork:57:- vfork:58:- kill:62:129 tkill:200:130 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240
pidfd_open:434:434 pidfd_send_signal:424:424 process_madvise:440:440 process_mrelease:448:448 kcmp:312:272
personality:135:92 memfd_create:319:279 memfd_secret:447:447 fanotify_init:300:262 syslog:103:116
open_tree:428:428 move_mount:429:429 fsopen:430:430 fsconfig:431:431 fsmount:432:432 fspick:433:433
mount_setattr:442:442 shmget:29:194 shmat:30:196 msgget:68:186 semget:64:190 mq_open:240:180
open:2:- creat:85:- openat:257:56 openat2:437:437 truncate:76:45 ftruncate:77:46 fallocate:285:47
rename:82:- renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36
unlink:87:- unlinkat:263:35 mkdir:83:- mkdirat:258:34 rmdir:84:- mknod:133:- mknodat:259:33 chmod:90:-
fchmod:91:52 fchmodat:268:53 fchmodat2:452:452 chown:92:- lchown:94:- fchown:93:55 fchownat:260:54
setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14 lremovexattr:198:15 fremovexattr:199:16
utime:132:- utimes:235:- futimesat:261:- utimensat:280:88
landlock_create_ruleset:444:444 landlock_add_rule:445:445 landlock_restrict_self:446:446 seccomp:317:277
"""
SYSCALL_NUMBERS: dict[str, tuple[int, int]] = {
    name: (-1 if x86 == "-" else int(x86), -1 if arm == "-" else int(arm))
    for name, x86, arm in (entry.split(":") for entry in _TABLE.split())
}


def _words(text: str) -> list[str]:
    return text.split()


# Calls that a decoder has no reason ever to make: making one ends the process.
_WORST = _words("""
ptrace process_vm_readv process_vm_writev pidfd_getfd execve execveat bpf perf_event_open userfaultfd keyctl
add_key request_key io_uring_setup io_uring_enter io_uring_register mount umount2 pivot_root chroot setns
unshare init_module finit_module kexec_load kexec_file_load reboot open_by_handle_at
""")

_NEEDED = _words("""
read write readv writev pread64 preadv lseek close mmap munmap mprotect mremap madvise brk membarrier futex
futex_waitv set_robust_list rseq exit exit_group rt_sigprocmask rt_sigaction rt_sigreturn sigaltstack
restart_syscall gettid getpid getppid getuid geteuid getgid getegid sched_yield sched_getaffinity getcpu
sched_getparam sched_getscheduler clock_gettime clock_getres nanosleep clock_nanosleep gettimeofday time
times getrusage getrlimit getrandom sysinfo uname
""")

_REFUSED = _words("""
socket socketpair connect bind listen accept accept4 fork vfork clone kill tkill tgkill rt_sigqueueinfo
rt_tgsigqueueinfo pidfd_open pidfd_send_signal process_madvise process_mrelease kcmp personality
memfd_create memfd_secret fanotify_init syslog open_tree move_mount fsopen fsconfig fsmount fspick
mount_setattr shmget shmat msgget semget mq_open open creat openat truncate ftruncate fallocate rename
renameat renameat2 link linkat symlink symlinkat unlink unlinkat mkdir mkdirat rmdir mknod mknodat chmod
fchmod fchmodat fchmodat2 chown lchown fchown fchownat setxattr lsetxattr fsetxattr removexattr lremovexattr
fremovexattr utime utimes futimesat utimensat
""")


@dataclass(frozen=True)
class Rule:
    """The action for one system call, where all tests hold.

    tests: (word, mask, value): word i of the arguments & mask == value; argument n is words 2n (low), 2n + 1.
    """

    call: str
    action: int
    tests: tuple[tuple[int, int, int], ...] = ()


_THREAD = 0x00010000  # CLONE_THREAD
_THREAD_FLAGS = 0x007D0F00  # all that glibc and musl set for a thread; no new process, no namespace
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _threads_and_own_signals() -> list[Rule]:
    """Threads but no processes; signals to the own threads only, which is how abort() works."""
    return [
        *(Rule(call, _KILL) for call in _WORST),
        Rule("clone", _ALLOW, ((0, 0xFFFFFFFF & ~_THREAD_FLAGS, 0), (0, _THREAD, _THREAD))),
        Rule("clone3", _ENOSYS),  # its flags lie in memory, out of a filter's sight; libc then uses clone
        Rule("tgkill", _ALLOW, ((0, 0xFFFFFFFF, os.getpid()),)),
    ]


def _untrusted_rules() -> list[Rule]:
    """What the decoder of an untrusted file may call; everything else is refused."""
    read_flags = ((2, 0xFFFFFFFF, 1), (2, 0xFFFFFFFF, 3))  # F_GETFD, F_GETFL
    own_limits = ((0, 0xFFFFFFFF, 0), (4, 0xFFFFFFFF, 0), (5, 0xFFFFFFFF, 0))  # of itself, without new ones
    return [
        *(Rule(call, _ALLOW) for call in _NEEDED),
        *_threads_and_own_signals(),
        *(Rule("fcntl", _ALLOW, (test,)) for test in read_flags),
        Rule("prlimit64", _ALLOW, own_limits),
        Rule("prctl", _ALLOW, ((0, 0xFFFFFFFF, _PR_SET_NAME),)),
    ]


def _trusted_rules() -> list[Rule]:
    """What a decoder of the caller's own files may not call; everything else is answered."""
    return [
        *_threads_and_own_signals(),
        Rule("openat2", _ENOSYS),  # its flags lie in memory; libc then uses openat
        Rule("openat", _ALLOW, ((4, _WRITING, 0),)),
        Rule("open", _ALLOW, ((2, _WRITING, 0),)),
        *(Rule(call, _EPERM) for call in _REFUSED),
    ]


_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # words of the kernel's filter machine
_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def _program(rules: Sequence[Rule], otherwise: int) -> bytes | None:
    """The filter as the kernel reads it; None for an architecture whose numbers are not in the table."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        return None
    column, architecture = ARCHITECTURES[machine]
    code: list[_Instruction] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for rule in rules:
        number = SYSCALL_NUMBERS[rule.call][column]
        if number >= 0:
            code += _rule_code(number, rule)
    code += [
        (_AT_LEAST, 0, 1, _YOUNG if otherwise == _EPERM else _UNKNOWN),
        (_RETURN, 0, 0, _ENOSYS),
        (_RETURN, 0, 0, otherwise),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _rule_code(number: int, rule: Rule) -> list[_Instruction]:
    """The rule's action if the call has this number and all tests hold; else on to the next rule."""
    tests: list[_Instruction] = []
    for i, (word, mask, value) in enumerate(rule.tests):
        to_reload = 3 * (len(rule.tests) - 1 - i) + 1
        tests += [(_LOAD, 0, 0, 16 + 4 * word), (_AND, 0, 0, mask), (_EQUAL, 0, to_reload, value)]
    reload: list[_Instruction] = [(_LOAD, 0, 0, 0)] if tests else []
    body = [*tests, (_RETURN, 0, 0, rule.action), *reload]
    return [(_EQUAL, 0, len(body), number), *body]


def install_filter(libc: ctypes.CDLL, program: bytes) -> bool:
    """Put the filter in force for all threads of this process; whether the kernel took it."""
    set_mode_filter, all_threads = 1, 1
    memory = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(memory))
    column = ARCHITECTURES[os.uname().machine][0]
    return bool(libc.syscall(SYSCALL_NUMBERS["seccomp"][column], set_mode_filter, all_threads, header) == 0)
