"""The video files that a person means, and what each is known by.

find_videos(["~/Videos", "clips/*.mp4", "list.txt"])     # absolute paths, sorted, each once
FileIdentity.of("a.mp4")                                 # size, time of change, hash of its ends
"""

from __future__ import annotations

import codecs
import errno
import glob
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from encoder.errors import ConfigError, FluxChatError, VideoError
from encoder.video.sources import reason

# What is taken of a folder; a file that is named itself may be called anything.
VIDEO_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts"),
    *(".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp", ".gif"),
}
LIST_SUFFIX = ".txt"
LONGEST_LIST = 2**30  # bytes
END_BYTES = 2**20  # of a file's head and tail that are hashed
# Opening must not wait for a pipe's other end.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class FileIdentity:
    """size: bytes. mtime_ns: when its content was last changed. ends: hash of its first and last MiB."""

    size: int
    mtime_ns: int
    ends: str

    @staticmethod
    def of(path: str) -> FileIdentity:
        """Raises OSError, also for what is no regular file."""
        with open(_opened(path), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", path)
            digest = hashlib.sha256(file.read(END_BYTES))
            file.seek(max(file.tell(), status.st_size - END_BYTES))
            digest.update(file.read(END_BYTES))
        return FileIdentity(status.st_size, status.st_mtime_ns, digest.hexdigest()[:32])

    def unchanged(self, path: str) -> bool:
        """Whether the file's size and the time of its last change are what they were."""
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)

    def check_unchanged(self, path: str, again: str = "index it") -> None:
        """Raises VideoError unless `unchanged`; again: what to do then."""
        if not self.unchanged(path):
            raise VideoError(f"Cannot read {path!r}: it was changed meanwhile; {again} again.")

    def still(self, path: str, touch: Callable[[str, int], object]) -> bool:
        """Whether the file's content is what it was. touch: told the path and time of one only touched."""
        if self.unchanged(path):
            return True
        try:
            now = FileIdentity.of(path)
        except OSError:
            return False
        if not now.same_content(self):
            return False
        touch(path, now.mtime_ns)
        return True

    def same_content(self, other: FileIdentity) -> bool:
        """Whether it is the same content, whenever it was last written."""
        return (self.size, self.ends) == (other.size, other.ends)


def _opened(path: str) -> int:
    try:
        return os.open(path, _FLAGS)
    except ValueError:  # a line of a list may hold anything
        raise OSError(errno.EINVAL, "its path has a NUL character", path) from None


def is_unicode(text: str) -> bool:
    """Whether a text, or a file's name, can be written as UTF-8; Linux allows names that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unreadable(path: str, error: FluxChatError | OSError) -> str:
    """What a report says of a file that could not be read, on a line."""
    if isinstance(error, OSError):
        return f"Cannot read {path!r}: {reason(error)}; check the path."
    return " ".join(str(error).split())


def is_gone(path: str) -> bool:
    """Whether no file is there any more; one whose folder may not be entered is not gone."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        return False
    except (OSError, ValueError):
        return True


def check_name(path: str) -> None:
    """Raises VideoError for a file whose name a library cannot hold."""
    if not is_unicode(path):
        raise VideoError(f"Cannot index {path!r}: its name is no UTF-8 text; rename it.")


def find_videos(sources: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Absolute paths of the videos in folders (searched through), globs, lists (.txt, a path a line, # begins
    a comment, relative ones from the list's folder) and files.

    Raises ConfigError for what is not there, and when nothing is found.
    """
    if not sources:
        raise ConfigError("Name the videos: a folder, files, a pattern in quotes, or a list (.txt).")
    found = {path for source in sources for path in _videos(os.path.expanduser(os.fspath(source)))}
    if not found:
        raise ConfigError(f"There is no video in {', '.join(map(str, sources))}: name another place.")
    return sorted(found)


def _videos(source: str) -> Iterator[str]:
    if os.path.isdir(source):
        yield from _in_folder(source)
    elif os.path.isfile(source):
        if source.lower().endswith(LIST_SUFFIX):
            yield from _listed(source)
        else:
            yield os.path.abspath(source)
    elif glob.has_magic(source):
        for path in glob.iglob(source, recursive=True):
            yield from _in_folder(path) if os.path.isdir(path) else (os.path.abspath(path),)
    else:
        raise ConfigError(f"There is no file or folder {source!r}: check the path.")


def _in_folder(folder: str) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield os.path.abspath(os.path.join(place, name))


def _listed(path: str) -> Iterator[str]:
    """A list's files, whether they are there or not: a missing one is a row of the report."""
    if os.path.getsize(path) > LONGEST_LIST:
        raise ConfigError(f"{path!r} is too long for a list of files: split it.")
    data = Path(path).read_bytes()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell writes it
    text = data.decode("utf-16", "replace") if utf16 else data.decode("utf-8-sig", "surrogateescape")
    for line in text.split("\n"):  # a name may hold any other break
        if (name := line.strip(" \t\r")) and not name.startswith("#"):
            yield os.path.abspath(os.path.join(os.path.dirname(path), os.path.expanduser(name)))
