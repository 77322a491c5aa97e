"""What a hijacked decoding child can reach, and which of its answers its parent accepts."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from encoder.errors import VideoError
from encoder.video import confine, replies, sandbox
from encoder.video.containers import Header
from encoder.video.limits import Rules
from encoder.video.protocol import Request
from encoder.video.reader import Limits, probe, read_clip
from encoder.video.sandbox import WorkerPool
from tests import ROOT
from tests.encoder.video import video_files as vf
from tests.encoder.video.hijack import hijacked
from tests.patience import PATIENCE_S, ended, until

pytestmark = pytest.mark.skipif(
    not confine.report().contained, reason="this machine cannot confine a decoder"
)

# What the hijacked child tries: each expression is true where the attempt succeeds.
ATTEMPTS = {
    "read a file": "open(FOLDER + '/private').read()",
    "list a directory": "os.listdir(FOLDER)",
    "learn whether a file exists": "os.stat(FOLDER + '/private')",
    "its parent's environment": "b'SECRET' in open(f'/proc/{PARENT}/environ', 'rb').read()",
    "its parent's command line": "open(f'/proc/{PARENT}/cmdline', 'rb').read()",
    "make a file": "os.open(FOLDER + '/made', os.O_CREAT | os.O_WRONLY)",
    "remove a file": "os.unlink(FOLDER + '/removed') is None",
    "rename a file": "os.rename(FOLDER + '/moved', FOLDER + '/away') is None",
    "link a file": "os.symlink(FOLDER + '/private', FOLDER + '/link') is None",
    "make a directory": "os.mkdir(FOLDER + '/room') is None",
    "change rights by name": "os.chmod(FOLDER + '/private', 0o777) is None",
    "change rights by descriptor": "os.fchmod(FILE, 0o600) is None",
    "change times by descriptor": "os.utime(FILE, (1, 1)) is None",
    "open the handed file for writing": "os.open(f'/proc/self/fd/{FILE}', os.O_WRONLY)",
    "lock the handed file": "fcntl.flock(FILE, fcntl.LOCK_EX) is None",
    "change the directory": "os.chdir('/') is None",
    "tcp": "socket.create_connection(('127.0.0.1', PORT), 2)",
    "tcp server": "socket.create_server(('127.0.0.1', 0))",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "unix socket": "socket.socket(socket.AF_UNIX).connect(FOLDER + '/socket') is None",
    "abstract socket": "socket.socket(socket.AF_UNIX).connect(ABSTRACT) is None",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "socket pair": "socket.socketpair()",
    "fork": "forks(os.fork)",
    "raw clone": "forks(lambda: libc.syscall(CLONE, signal.SIGCHLD, 0, 0, 0, 0))",
    "spawn": "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)[1] == 0",
    "run a program": "subprocess.run(['/bin/true']).returncode == 0",
    "signal its parent": "os.kill(PARENT, 0) is None",
    "signal its parent's thread": "libc.syscall(TGKILL, PARENT, PARENT, 0) == 0",
    "signal others": "os.kill(OTHER, 0) is None",
    "send signals by a descriptor": "fcntl.fcntl(FILE, fcntl.F_SETOWN, PARENT) == 0",
    "a handle of its parent": "os.pidfd_open(PARENT) > 0",
    "its parent's priority": "os.setpriority(os.PRIO_PROCESS, PARENT, os.getpriority(0, PARENT)) is None",
    "its parent's cores": "os.sched_setaffinity(PARENT, os.sched_getaffinity(PARENT)) is None",
    "its parent's limits": "resource.prlimit(PARENT, resource.RLIMIT_NOFILE)",
    "limits of its own": "raises_limit()",
    "the clock that ends it": "signal.setitimer(signal.ITIMER_REAL, 0) is not None",
    "outliving its parent": "libc.prctl(1, 0, 0, 0, 0) == 0",
    "no longer private memory": "libc.prctl(4, 1, 0, 0, 0) == 0",
    "a file in memory": "os.memfd_create('x') > 0",
    "shared memory": "libc.shmget(0, 4096, 0o1600) >= 0",
    "message queues": "libc.msgget(0, 0o1600) >= 0",
    "a personality": "libc.personality(0x0040000) != -1",
    "watching files": "libc.inotify_init() >= 0",
}
ATTEMPT_CODE = """
import ctypes, fcntl, json, os, resource, signal, socket, subprocess, threading
libc = ctypes.CDLL(None)
CLONE, TGKILL = {"x86_64": (56, 234), "aarch64": (220, 131)}[os.uname().machine]
def forks(how):
    child = how()
    if child == 0:
        os._exit(0)
    return child > 0 and os.waitpid(child, 0)[1] == 0
def raises_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    return True
def evil(request, out):
    global PARENT, FILE
    PARENT, FILE = request.parent, int(request.path[3:].split(".")[0])
    reached = ""
    for code in CODES:
        try:
            reached += str(int(bool(eval(code))))
        except BaseException:
            reached += "0"
    thread = threading.Thread(target=lambda: out.write(b""))
    thread.start()
    thread.join()
    dw.write_message(out, {"error": reached})
    out.flush()
dw.answer = evil
"""


@pytest.fixture
def clip(tmp_path) -> Path:
    return vf.write(tmp_path / "v.mp4", vf.steady(5))


def reached(clip: Path, tries: dict[str, str], *, confined: bool, trusted: bool = False) -> set[str]:
    """Names of the tries that reach what they want, in one hijacked child."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("private", "removed", "moved"):
            Path(folder, name).write_text("x")
        other = subprocess.Popen(["/bin/sleep", "60"])
        abstract = f"\0hijack-{os.getpid()}"
        with (
            socket.create_server(("127.0.0.1", 0)) as tcp,
            socket.socket(socket.AF_UNIX) as unix,
            socket.socket(socket.AF_UNIX) as named,
        ):
            unix.bind(f"{folder}/socket")
            named.bind(abstract)
            unix.listen()
            named.listen()
            port = tcp.getsockname()[1]
            facts = {"FOLDER": folder, "PORT": port, "OTHER": other.pid, "ABSTRACT": abstract}
            code = "".join(f"{name} = {value!r}\n" for name, value in facts.items())
            code += f"CODES = {list(tries.values())!r}\n" + ATTEMPT_CODE
            with (
                hijacked(code, Path(folder), confined=confined, env={"SECRET": "x"}),
                pytest.raises(VideoError) as caught,
            ):
                probe(clip, trusted=trusted)
        other.kill()
        other.wait()
    digits = str(caught.value).split(": ")[-1].rstrip(".")
    assert len(digits) == len(tries), caught.value
    return {name for name, digit in zip(tries, digits, strict=True) if digit == "1"}


def test_a_hijacked_decoder_reaches_nothing(clip, monkeypatch):
    tries = {**ATTEMPTS, "its parent's environment": "open(f'/proc/{PARENT}/environ', 'rb').read()"}
    free = reached(clip, tries, confined=False)
    assert free == set(tries), f"tried in vain without confinement: {set(tries) - free}"
    assert reached(clip, tries, confined=True) == set()


def test_a_hijacked_decoder_of_a_trusted_file_can_only_read(clip):
    """The kept child for trusted files can open files, as its decoders do; no more."""
    tries = dict(ATTEMPTS)
    may = {
        *("read a file", "list a directory", "learn whether a file exists", "its parent's command line"),
        *("its parent's environment", "change the directory", "lock the handed file"),
        *("send signals by a descriptor", "its parent's priority", "its parent's cores"),
        *("its parent's limits", "limits of its own", "the clock that ends it", "outliving its parent"),
        *("no longer private memory", "watching files"),
    }
    assert reached(clip, tries, confined=True, trusted=True) <= may


# Calls that end the process: each in a child of its own.
FORBIDDEN = {
    "execve": "os.execv('/bin/true', ['true'])",
    "execveat": "libc.syscall(NUMBER['execveat'], -100, b'/bin/true', None, None, 0)",
    "program in memory": "os.execve(FILE, ['true'], {})",
    "ptrace": "libc.ptrace(0, 0, 0, 0)",
    "process_vm_readv": "libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0)",
    "process_vm_writev": "libc.process_vm_writev(os.getppid(), None, 0, None, 0, 0)",
    "io_uring": "libc.syscall(NUMBER['io_uring_setup'], 1, bytes(120))",
    "bpf": "libc.syscall(NUMBER['bpf'], 0, None, 0)",
    "keyctl": "libc.syscall(NUMBER['keyctl'], 0, -3, 0)",
    "perf": "libc.syscall(NUMBER['perf_event_open'], None, 0, -1, -1, 0)",
    "userfaultfd": "libc.syscall(NUMBER['userfaultfd'], 0)",
    "namespaces": "libc.unshare(0x10000000)",
    "mount": "libc.mount(b'none', b'/nowhere', b'tmpfs', 0, None)",
    "chroot": "os.chroot('/nowhere')",
    "files by handle": "libc.syscall(NUMBER['open_by_handle_at'], -1, None, 0)",
    "calls by other numbers": "libc.syscall(0x40000000 + 39)",
}


def test_forbidden_system_calls_end_the_process():
    """None of these ends an unconfined process by SIGSYS, all of them end a confined one."""
    for confined, ending in ((False, False), (True, True)):
        running = {}
        for name, call in FORBIDDEN.items():
            code = f"""
                import ctypes, os, sys
                sys.path[:] = {sys.path!r}
                from encoder.video import confine
                libc = ctypes.CDLL(None)
                column = confine.ARCHITECTURES[os.uname().machine][0]
                NUMBER = {{name: both[column] for name, both in confine.SYSCALL_NUMBERS.items()}}
                FILE = os.open('/bin/true', os.O_RDONLY)
                if {confined}:
                    confine.confine(untrusted=True)
                try:
                    {call}
                except OSError:
                    pass
            """
            running[name] = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)],
                cwd=ROOT,
                stderr=subprocess.DEVNULL,
            )
        for name, process in running.items():
            assert (process.wait(PATIENCE_S) == -signal.SIGSYS) == ending, (name, process.returncode)


def test_a_decoder_ended_for_a_forbidden_call_is_reported(clip, tmp_path):
    code = "import os\ndef evil(request, out):\n    os.execv('/bin/true', ['true'])\ndw.answer = evil\n"
    with hijacked(code, tmp_path), pytest.raises(VideoError, match="not safe to use"):
        probe(clip, trusted=False)


def test_the_child_starts_with_no_environment_and_no_other_descriptor(clip, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXCHAT_API_KEY", "sk-secret")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    (tmp_path / "secret").write_text("secret")
    code = """
import os
def evil(request, out):
    files = [n for n in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{n}")]
    kinds = sorted(os.readlink(f"/proc/self/fd/{n}").split(":")[0].rsplit("/", 1)[-1] for n in files)
    dw.write_message(out, {"error": f"{len(open('/proc/self/environ').read())} {' '.join(kinds)}"})
    out.flush()
dw.answer = evil
"""
    with open(tmp_path / "secret") as secret:
        os.set_inheritable(secret.fileno(), True)
        with hijacked(code, tmp_path, confined=False), pytest.raises(VideoError) as caught:
            probe(clip, trusted=False)
    assert str(caught.value) == "Cannot read 'v.mp4': 0 null null null pipe v.mp4."


@pytest.mark.parametrize("trusted", [True, False])
def test_a_confined_child_has_its_limits(clip, tmp_path, trusted):
    code = """
import resource
def evil(request, out):
    names = ("AS", "FSIZE", "CORE", "CPU", "NOFILE")
    found = {name: resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in names}
    dw.write_message(out, {"error": repr(found).replace("-", "minus ")})
    out.flush()
dw.answer = evil
"""
    with hijacked(code, tmp_path), pytest.raises(VideoError) as caught:
        probe(clip, trusted=trusted, limits=Limits(memory_mib=1000, seconds=10.0))
    words = str(caught.value)
    assert "'FSIZE': (0, 0), 'CORE': (0, 0)" in words
    assert f"'AS': ({1000 * 2**20}, {1000 * 2**20})" in words or trusted
    assert "'NOFILE': (64, 64)" in words or trusted


def test_threads_and_children_of_a_decoder_end_with_it(clip, tmp_path):
    """Threads end with it, and its group is ended as a whole where a process could be made."""
    code = """
import os, time
def evil(request, out):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    dw.write_message(out, {"error": f"child {child}"})
    out.flush()
    time.sleep(60)
dw.answer = evil
"""
    with hijacked(code, tmp_path, confined=False), pytest.raises(VideoError, match="child") as caught:
        probe(clip, trusted=False)
    pid = int(str(caught.value).split()[-1].rstrip("."))
    until(lambda: ended(pid))


@pytest.mark.parametrize(
    "output",
    [
        "b'x' * (1 << 20)",  # gigabytes without an end of line
        "b'{\"header\": ' + b'[' * 50000 + b'\\n'",  # deeper than a parser goes
        "b'[]\\n' * 100000",
        "b'{}\\n' * 100000",
        "b'\\xff\\xfe\\n'",
        'b\'{"error": {"a": 1}}\\n\'',
        "b'{\"error\": null}\\n'",
    ],
)
@pytest.mark.quick(3)
def test_endless_or_malformed_output_of_a_child_is_one_sentence(clip, tmp_path, output):
    code = f"""
def evil(request, out):
    for _ in range(1 << 12):
        out.write({output})
    out.flush()
dw.answer = evil
"""
    with hijacked(code, tmp_path), pytest.raises(VideoError, match=r"impossible answer.*\.$"):
        read_clip(clip, 2, trusted=False)


RULES = Rules(trusted=True, codecs=None, max_pixels=10**6, max_duration_s=None, threads=1)
REQUEST = Request("v.mp4", RULES, frames=4, max_side=64, memory_mib=1)


def honest() -> dict:
    header = vars(
        Header(128, 96, turns=0, duration_s=1.0, claimed_s=1.0, frames=5, codec="h264", container="mp4")
    )
    return {"header": dict(header), "count": 4, "width": 64, "height": 48}


def test_a_valid_reply_is_accepted():
    reply = replies.read_reply(honest(), REQUEST)
    assert (reply.count, reply.height, reply.width, reply.header.codec) == (4, 48, 64, "h264")


@pytest.mark.parametrize(
    "change",
    [
        {"count": 5},
        {"count": -1},
        {"count": True},
        {"count": 1.0},
        {"count": "4"},
        {"count": 10**40},
        {"width": 65, "height": 1},
        {"width": 0},
        {"height": None},
        {"header": None},
        {"header": {}},
        {"header": {"width": 10**6}},
        {"header": {"turns": 4}},
        {"header": {"duration_s": -1.0}},
        {"header": {"duration_s": "1"}},
        {"header": {"duration_s": float("inf")}},
        {"header": {"frames": -3}},
        {"header": {"codec": "h264\x1b[31m"}},
        {"header": {"codec": "x" * 65}},
        {"header": {"container": ["mp4"]}},
        {"header": {"kind": "folder"}},
        {"header": {"extra": 1}},
    ],
)
def test_an_impossible_reply_is_refused(change):
    message = honest()
    header = change.pop("header", ...)
    message.update(change)
    if isinstance(header, dict) and header:
        message["header"].update(header)
    elif header is not ...:
        message["header"] = header
    with pytest.raises(replies.ProtocolError):
        replies.read_reply(message, REQUEST)


@pytest.mark.parametrize("time_s", ["NaN", "Infinity", "1e999", "-1", '"1"', "null", "true"])
def test_times_are_finite_and_not_negative(time_s):
    with pytest.raises(replies.ProtocolError):
        replies.read_time(replies.parse(b'{"time": %s}' % time_s.encode()))


def test_a_rotation_is_quarter_turns_and_a_mirror():
    assert replies.read_rotation({"turns": 3}) == (3, False)
    for message in ({}, {"turns": 4}, {"turns": -1}, {"turns": 1, "mirror": 1}):
        with pytest.raises(replies.ProtocolError):
            replies.read_rotation(message)


def test_error_texts_are_one_clean_line_without_paths():
    assert (
        replies.clean("no frame at 2 s; 24/1 per second, h264/aac")
        == "no frame at 2 s; 24/1 per second, h264/aac"
    )
    dirty = "a\r\nb\x1b[2J\u202e '/srv/secret dir/x.mp4' at /home/me/v.mp4, C:\\Users\\me and fd:7"
    cleaned = replies.clean(dirty)
    assert cleaned.isprintable()
    for part in ("srv", "home", "me/", "Users", "\x1b", "\u202e"):
        assert part not in cleaned
    assert len(replies.clean("x" * 10**6)) <= replies.MAX_TEXT
    assert replies.clean(" \n ") == "its decoder gave no reason"


def test_one_bad_file_leaves_the_other_idle_children(clip, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing" * 100)
    crash = "import os\ndw.answer = lambda request, out: os._exit(1)\n"
    pool = WorkerPool()
    idle = [pool.acquire(), pool.acquire()]
    for worker in idle:
        pool.release(worker)
    request = Request("v.mp4", RULES, decoder="pyav")
    with open(bad, "rb") as file, pytest.raises(VideoError):
        pool.decode(request, file.fileno(), keep=True)
    with open(clip, "rb") as file:
        pool.decode(request, file.fileno(), keep=True)
        untrusted = replace(request, rules=replace(RULES, trusted=False))
        with hijacked(crash, tmp_path), pytest.raises(VideoError):
            pool.decode(untrusted, file.fileno(), keep=False)
    assert idle[0].alive()
    pool.close()
    assert not any(worker.alive() for worker in idle)


def test_a_known_error_keeps_the_child_and_an_unexpected_one_ends_it(clip, tmp_path):
    code = """
real = dw.answer
def answer(request, out):
    if request.frames == 7:
        dw.inspect = lambda path, rules: 1 / 0
    real(request, out)
dw.answer = answer
"""
    pool = WorkerPool()
    with hijacked(code, tmp_path), open(clip, "rb") as file:
        request = Request("v.mp4", RULES, frames=1, decoder="pyav")
        first = pool.acquire()
        pool.release(first)
        for change, alive in (({}, True), ({"at_s": (99.0,)}, True), ({"frames": 7}, False)):
            assert pool.idle == [first]
            with pytest.raises(VideoError) if change else contextlib.nullcontext():
                pool.decode(replace(request, **change), file.fileno(), keep=True)
            assert first.alive() == alive
    pool.close()


def test_idle_children_are_few_and_not_kept_past_their_time(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_IDLE", 2)
    pool = WorkerPool()
    workers = [pool.acquire() for _ in range(3)]
    for worker in workers:
        pool.release(worker)
    assert [worker.alive() for worker in workers] == [True, True, False]
    monkeypatch.setattr(sandbox, "IDLE_S", 0.0)
    fresh = pool.acquire()
    assert fresh not in workers
    assert not any(worker.alive() for worker in workers)
    fresh.end()


class ForkingWorker:
    """Forks when the pool looks whether it is alive, which it does while it is locked."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.exit_code: int | None = None

    def alive(self) -> bool:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            self.pool.close()
            os._exit(7)
        self.exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return True

    def forget(self) -> None:
        pass


def test_a_fork_while_the_pool_is_locked_does_not_hang():
    pool = WorkerPool()
    worker = ForkingWorker(pool)
    pool.release(worker)
    assert worker.exit_code == 7


def test_an_unconfined_decoder_is_refused_only_with_contained_limits(clip, tmp_path):
    code = "dw.confine = lambda untrusted, last: (last(), dw.Confinement())[1]\n"
    with hijacked(code, tmp_path):
        assert probe(clip, trusted=False).codec == "h264"
        with pytest.raises(VideoError, match="cannot confine"):
            probe(clip, trusted=False, limits=Limits(contained=True))
    assert probe(clip, trusted=False, limits=Limits(contained=True)).codec == "h264"


def test_the_report_says_what_is_in_force_in_words():
    assert "seccomp" in str(confine.report())
    assert str(confine.Confinement()).startswith("memory and time limits only")
    assert str(confine.Confinement(7, True)) == "landlock (ABI 7), seccomp"
    assert not confine.Confinement(7, False).contained


def test_landlock_alone_denies_files_and_tcp():
    """The second layer holds without the first."""
    if not confine.report().landlock:
        pytest.skip("no landlock here")
    code = f"""
        import socket, sys
        sys.path[:] = {sys.path!r}
        from encoder.video import confine
        confine.install_filter = lambda *_: False
        applied = confine.confine(untrusted=True)
        for call in (lambda: open("/etc/passwd"), lambda: socket.create_server(("127.0.0.1", 0))):
            try:
                call()
            except PermissionError:
                continue
            if call.__code__.co_names[0] == "open" or applied.landlock >= 4:
                sys.exit(1)
        sys.exit(applied.seccomp)
    """
    done = subprocess.run([sys.executable, "-I", "-S", "-c", textwrap.dedent(code)], cwd=ROOT)
    assert done.returncode == 0


def test_call_numbers_are_those_of_libseccomp():
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("no libseccomp here")
    library = ctypes.CDLL(name)
    for column, architecture in confine.ARCHITECTURES.values():
        for call, numbers in confine.SYSCALL_NUMBERS.items():
            known = library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(architecture), call.encode())
            if known == -1:  # younger than this libseccomp
                continue
            assert max(known, -1) == numbers[column], call


@pytest.mark.slow
def test_hidden_memory_is_no_side_effect_of_imports():
    code = """
        import encoder.video.reader, ctypes
        from encoder.video.confine import hide_memory
        get_dumpable = 3
        libc = ctypes.CDLL(None)
        print(libc.prctl(get_dumpable), hide_memory(), libc.prctl(get_dumpable))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "True", "0"], done.stderr


def test_untrusted_files_decode_from_many_threads(clip):
    found: list[int] = []

    def work() -> None:
        found.append(vf.number_in(read_clip(clip, at_s=[0.13], trusted=False).frames[0].numpy()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3] * 4


def test_a_library_not_loaded_is_imported_by_a_second_child(clip, tmp_path):
    code = """
real = dw.answer
def answer(request, out):
    def inspect(path, rules):
        import numpy
        return found(path, rules)
    found, dw.inspect = dw.inspect, inspect
    real(request, out)
dw.answer = answer
"""
    with hijacked(code, tmp_path):
        assert probe(clip, trusted=False).codec == "h264"


def test_requests_of_any_length_arrive(clip):
    moments = [i / 9_000 for i in range(9_000)]
    assert len(read_clip(clip, moments=moments, max_side=2).times_s) == len(moments)
    assert len(json.dumps(moments)) > 1 << 17


def test_a_child_quicker_than_its_parent_is_no_failure(clip, monkeypatch):
    send_fds = socket.send_fds

    def slow(channel, buffers, fds, *rest):
        sent = send_fds(channel, buffers, fds, *rest)
        assert channel.recv(1, socket.MSG_PEEK) == b""  # it has the whole request and has closed its end
        return sent

    monkeypatch.setattr("encoder.video.sandbox.socket.send_fds", slow)
    assert len(read_clip(clip, 3, trusted=False).frames) == 3
