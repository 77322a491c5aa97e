"""Files under a root: what is checked is what is opened, and nothing else is readable."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.server.chat_request import Reference
from app.server.errors import ApiError
from app.server.media import path_confinement as beneath
from app.server.media.path_confinement import open_beneath
from app.server.media.resolver import Resolver
from app.server.media.store import MediaStore

INSIDE, SECRET = b"inside", b"secret"


@pytest.fixture(params=["walk", "compare"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files and links, a secret beside it; opened in both ways that there are."""
    monkeypatch.setattr(beneath, "_HAS_WALK", request.param == "walk")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "ok.mp4").write_bytes(INSIDE)
    (root / "sub" / "ok.mp4").write_bytes(INSIDE)
    (root / "größe 100%.mp4").write_bytes(INSIDE)
    (root / "good-link.mp4").symlink_to("sub/ok.mp4")
    (root / "good-folder").symlink_to(root / "sub")
    os.link(root / "ok.mp4", root / "hard.mp4")
    (tmp_path / "secret.mp4").write_bytes(SECRET)
    (root / "bad-link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "bad-folder").symlink_to(tmp_path)
    (root / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(root / "pipe.mp4")
    return root


@pytest.mark.parametrize(
    "name",
    [
        "ok.mp4",
        "./ok.mp4",
        "sub/ok.mp4",
        "sub/../ok.mp4",
        "good-link.mp4",
        "good-folder/ok.mp4",
        "hard.mp4",
        "größe 100%.mp4",
        "{root}/ok.mp4",
        "{root}/sub/../ok.mp4",
    ],
)
def test_files_under_the_root_are_read(root: Path, name: str) -> None:
    with open_beneath(root, name.replace("{root}", str(root))) as file:
        assert file.tell() == 0
        assert os.get_blocking(file.fileno())
        assert file.read() == INSIDE


BAD = [
    "",
    ".",
    "sub",
    "missing.mp4",
    "../secret.mp4",
    "sub/../../secret.mp4",
    "bad-link.mp4",
    "bad-folder/secret.mp4",
    "good-folder/ok.mp4/../../../secret.mp4",
    "loop.mp4",
    "pipe.mp4",
    "OK.MP4" if os.path.normcase("A") == "A" else "missing",
    "ok.mp4/",
    "ok.mp4\0.png",
    "{outside}/secret.mp4",
    "{root}/../secret.mp4",
    "{root}-too/ok.mp4",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
    "/proc/self/root{root}/ok.mp4",
    "~/.profile",
    "x" * 300,
    "x/" * 5000,
    "\udc80.mp4",
    "..\\secret.mp4",
]


@pytest.mark.parametrize("name", BAD, ids=lambda name: repr(name[:30]))
def test_files_outside_the_root_are_refused(root: Path, name: str) -> None:
    name = name.replace("{root}", str(root)).replace("{outside}", str(root.parent))
    if name == "missing" or (name == "ok.mp4/" and os.path.exists(root / name)):
        pytest.skip("names mean something else on this system")
    with pytest.raises((OSError, ValueError)):
        open_beneath(root, name)


def test_a_link_made_after_the_check_is_not_followed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may write under the root swaps the file, or its folder, at the worst moment."""
    secret, resolve = root.parent / "secret.mp4", os.path.realpath
    (root.parent / "away").mkdir()
    (root.parent / "away" / "ok.mp4").write_bytes(SECRET)

    def swap_file() -> None:
        (root / "ok.mp4").unlink()
        (root / "ok.mp4").symlink_to(secret)

    def swap_folder() -> None:
        (root / "sub").rename(root / "old")
        (root / "sub").symlink_to(root.parent / "away")

    for name, swap in (("ok.mp4", swap_file), ("sub/ok.mp4", swap_folder)):
        swaps = [swap]

        def checked(path: str, *, strict: bool = False, swaps: list = swaps) -> str:  # type: ignore[type-arg]
            found = resolve(path, strict=strict)
            if strict and swaps:
                swaps.pop()()
            return found

        monkeypatch.setattr(os.path, "realpath", checked)
        try:
            with open_beneath(root, name) as file:
                assert file.read() == INSIDE
        except (OSError, ValueError):
            pass
        assert not swaps
        monkeypatch.setattr(os.path, "realpath", resolve)


def test_concurrent_swapping_never_reveals_the_outside_file(root: Path) -> None:
    (root / "turn.mp4").write_bytes(INSIDE)
    (root / "link").symlink_to(root.parent / "secret.mp4")
    ended = threading.Event()

    def swap() -> None:
        while not ended.is_set():
            os.replace(root / "turn.mp4", root / "aside.mp4")
            os.replace(root / "link", root / "turn.mp4")
            os.replace(root / "turn.mp4", root / "link")
            os.replace(root / "aside.mp4", root / "turn.mp4")

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    for _ in range(300):
        try:
            with open_beneath(root, "turn.mp4") as file:
                seen.add(file.read())
        except (OSError, ValueError):
            continue
    ended.set()
    thread.join()
    assert seen <= {INSIDE}


@pytest.fixture
def resolver(root: Path) -> Iterator[Resolver]:
    store = MediaStore()
    yield Resolver(store, root)
    store.close()


def test_an_opened_file_stays_the_one_that_was_checked(resolver: Resolver, root: Path) -> None:
    with resolver.open([Reference("sub/ok.mp4")]) as (medium,):
        (root / "sub" / "ok.mp4").unlink()
        (root / "sub" / "ok.mp4").symlink_to(root.parent / "secret.mp4")
        assert medium.source.read() == INSIDE
        assert medium.name == "ok.mp4"
    assert medium.source.closed


@pytest.mark.parametrize(
    ("url", "works"),
    [
        ("file://{root}/ok.mp4", True),
        ("FILE://LocalHost{root}/ok.mp4", True),
        ("file:{root}/ok.mp4", True),
        ("file:ok.mp4", True),
        ("file://{root}/gr%C3%B6%C3%9Fe%20100%25.mp4", True),
        ("file://{root}/ok.mp4?x", False),
        ("file://{root}/ok.mp4#x", False),
        ("file://{root}/%2e%2e/secret.mp4", False),
        ("file://{root}/ok.mp4%00", False),
        ("file://{root}/%ff%fe.mp4", False),
        ("file://evil.example{root}/ok.mp4", False),
        ("file://[{root}/ok.mp4", False),
        ("fi\nle://{root}/ok.mp4", False),
        ("file:///etc/passwd", False),
        ("ok.mp4\t", False),
        ("ftp://localhost{root}/ok.mp4", False),
        ("concat:ok.mp4", False),
    ],
)
def test_file_urls(resolver: Resolver, root: Path, url: str, works: bool) -> None:
    named = [Reference(url.replace("{root}", str(root)), "messages[0].content[0]")]
    if works:
        with resolver.open(named) as (medium,):
            assert medium.source.read() == INSIDE
        return
    with pytest.raises(ApiError, match="no such media") as caught, resolver.open(named):
        pass
    assert caught.value.body["error"]["param"] == "messages[0].content[0]"


def test_all_refusals_have_one_message(resolver: Resolver, root: Path) -> None:
    """A stranger learns nothing of what lies elsewhere."""
    told = set()
    for name in BAD:
        named = [Reference(name.replace("{root}", str(root)).replace("{outside}", str(root.parent)))]
        try:
            with resolver.open(named):
                pass
        except ApiError as error:
            told.add(json_of(error))
    assert len(told) == 1


def json_of(error: ApiError) -> str:
    return repr((error.status, error.body))


def test_an_id_is_only_an_id_and_data_only_data(resolver: Resolver) -> None:
    with pytest.raises(ApiError) as unknown, resolver.open([Reference("ok.mp4", kind="id")]):
        pass
    assert (unknown.value.status, unknown.value.body["error"]["code"]) == (404, "file_not_found")
    with pytest.raises(ApiError, match="base64"), resolver.open([Reference("ok.mp4", kind="data")]):
        pass


def test_files_of_other_clients_are_404(resolver: Resolver, root: Path) -> None:
    with (root / "ok.mp4").open("rb") as file:
        stored = resolver.store.add(file, "mine.mp4", "ann")
    with resolver.open([Reference(stored.id, kind="id")], "ann") as (medium,):
        assert (medium.source.read(), medium.name) == (INSIDE, "mine.mp4")
    for other in ("ben", "", "anonymous-1"):
        with pytest.raises(ApiError) as caught, resolver.open([Reference(stored.id, kind="id")], other):
            pass
        assert caught.value.status == 404


def test_which_of_several_media_is_wrong(resolver: Resolver) -> None:
    named = [Reference("ok.mp4", "a"), Reference("data:;base64,QQ", "b"), Reference("missing.mp4", "c")]
    with pytest.raises(ApiError, match=r"\(video 3 of 3\)\.$") as caught, resolver.open(named):
        pass
    assert caught.value.body["error"]["param"] == "c"
    with resolver.open(named[:2]) as media:
        assert [medium.name for medium in media] == ["ok.mp4", ""]
