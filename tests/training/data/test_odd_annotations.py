"""Annotations as people write them: read as they are meant, or skipped with a reason, never learnt from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from encoder.errors import DataError, VideoError
from tests.encoder.video import video_files as vf
from training.data.__main__ import main as check_main
from training.data.annotations import read_csv, read_json
from training.data.datasets import DatasetConfig
from training.data.examples import Example
from training.data.loader import Loader

NAN = float("nan")


def human(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


TALK = [human("<video>\nWhat is it?"), gpt("A cat.")]
TURN = ("What is it?", "A cat.")


def read(folder: Path, row: Any) -> Example:
    """The first row of a file of two; the second is always fine."""
    (folder / "a.json").write_text(json.dumps([row, {"video": "x.mp4", "conversations": TALK}]))
    return read_json(folder / "a.json", folder, need="answer")[0]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"video": "a.mp4", "conversations": [gpt("Hello!"), *TALK]}, [TURN]),
        ({"video": "a.mp4", "conversations": [*TALK, human("And then?")]}, [TURN]),
        (
            {"video": "a.mp4", "conversations": [{"from": "user", "value": TALK[0]["value"]}, gpt("A cat.")]},
            [TURN],
        ),
        (
            {
                "video": ["a.mp4"],
                "messages": [
                    {"role": "user", "content": "<image>What is it?"},
                    {"role": "Assistant", "content": [{"type": "text", "text": "A cat."}]},
                ],
            },
            [TURN],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "video_url", "video_url": {"url": "file://a.mp4"}},
                            {"type": "text", "text": "What is it?"},
                        ],
                    },
                    {"role": "assistant", "content": "A cat."},
                ]
            },
            [TURN],
        ),
        ({"messages": TALK, "videos": ["a.mp4"]}, [TURN]),
        ({"video": "a.mp4", "caption": " A cat. "}, [("", "A cat.")]),
        ({"video": "a.mp4", "caption": [None, "", "A cat."], "conversations": []}, [("", "A cat.")]),
        ({"video": "a.mp4", "image": None, "conversations": TALK, "caption": NAN}, [TURN]),
    ],
)
def test_what_is_meant_is_read(tmp_path: Path, row: dict, turns: list) -> None:
    example = read(tmp_path, row)
    assert list(example.turns) == turns
    assert example.media.paths == (tmp_path / "a.mp4",)  # type: ignore[attr-defined]
    assert example.lacks("answer") is None


def test_text_alone_systems_and_several_images(tmp_path: Path) -> None:
    text = read(tmp_path, {"video": None, "conversations": [human("Hi"), gpt("Hello.")]})
    assert not text.has_media
    with pytest.raises(VideoError, match="no video or image"):
        text.media.load(2, 56)
    told = [{"from": "system", "value": "Be short."}, *TALK]
    assert read(tmp_path, {"video": "a.mp4", "conversations": told}).system == "Be short."
    pair = [human("<image>\n<image>\nWhich?"), gpt("The first.")]
    several = read(tmp_path, {"image": ["a.png", "b.png"], "conversations": pair})
    assert (several.kind, len(several.media.paths)) == ("image", 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": "a.mp4", "caption": None}, "neither a conversation nor a caption"),
        ({"video": "a.mp4", "caption": NAN}, "neither a conversation nor a caption"),
        ({"video": "a.mp4", "caption": " "}, "neither a conversation nor a caption"),
        ({"video": "a.mp4", "caption": 3}, "a caption that is no text"),
        ({"video": "a.mp4"}, "neither a conversation nor a caption"),
        ({"video": "a.mp4", "conversations": [human("<video>?"), gpt(" ")]}, "an empty answer"),
        ({"video": "a.mp4", "conversations": [human("<video>?"), gpt(None)]}, "an empty answer"),
        ({"video": "a.mp4", "conversations": [human("<video>?"), gpt(NAN)]}, "an empty answer"),
        (
            {"video": "a.mp4", "conversations": [human("<video>?"), gpt("See <image>.")]},
            "an answer of it holds",
        ),
        ({"videos": "a.mp4", "conversations": TALK}, "the key 'videos'"),
        ({"vidoe": "a.mp4", "caption": "A cat."}, "the key 'vidoe'"),
        ({"Video": "a.mp4", "caption": "A cat."}, "the key 'Video'"),
        ({"image_path": "a.png", "conversations": [human("Hi"), gpt("Hello.")]}, "the key 'image_path'"),
        ({"video": "", "conversations": TALK}, "an empty name"),
        ({"video": [None], "conversations": TALK}, "no file name"),
        ({"video": 7, "conversations": TALK}, "no file name"),
        ({"video": ["a.mp4", "b.mp4"], "conversations": TALK}, "2 videos"),
        ({"video": "https://x.org/a.mp4", "conversations": TALK}, "no local file"),
        ({"conversations": TALK}, "1 times <image> or <video>, but it has 0"),
        ({"image": "a.png", "conversations": [human("<image><image>?"), gpt("!")]}, "2 times"),
        ({"video": "a.mp4", "conversations": [human("What is it?"), gpt("A cat.")]}, "holds no <video>"),
        ({"caption": "A cat."}, "names no video or image"),
        ({"conversations": [human(" "), gpt("A cat.")]}, "neither a question nor"),
        ({"video": "a.mp4", "conversations": [human("<video>?")]}, "no answer"),
        ({"video": "a.mp4", "conversations": [gpt("A."), human("<video>?")]}, "no answer"),
        (
            {"video": "a.mp4", "conversations": [human("<video>"), human("?"), gpt("!"), gpt("!")]},
            "does not alternate",
        ),
        ({"video": "a.mp4", "conversations": [{"from": "tool", "value": "x"}, *TALK]}, "a message of 'tool'"),
        ({"video": "a.mp4", "conversations": "What?"}, "no list of messages"),
        ({"video": "a.mp4", "conversations": ["What?"]}, "no message"),
        ({"video": "a.mp4", "conversations": [human({"a": 1}), gpt("!")]}, "neither text nor"),
        ({"video": "a.mp4", "conversations": [human("<video>?"), gpt("\ud83d")]}, "neither text nor"),
        ({"video": "a.mp4", "caption": "\ud83d"}, "a caption that is no text"),
        ({"video": "a\0.mp4", "conversations": TALK}, "no file can have"),
        ({"video": "a.mp4", "conversations": TALK, "start": NAN, "end": -1}, "no number of seconds"),
        ({"video": "a.mp4", "conversations": TALK, "start": 5, "end": 2}, "not after its start"),
        ([1], "is not an object"),
    ],
)
def test_what_cannot_be_learnt_from_is_skipped_with_its_reason(tmp_path: Path, row: Any, reason: str) -> None:
    try:
        problem = read(tmp_path, row).lacks("answer")
    except VideoError as error:
        problem = str(error)
    assert problem is not None
    assert reason in problem
    assert "\n" not in problem
    # With nothing else in the file, the file itself is refused.
    (tmp_path / "only.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match=r"only\.json"):
        read_json(tmp_path / "only.json", tmp_path, need="answer")


ROWS = [{"id": n, "video": f"{n}.mp4", "conversations": TALK} for n in range(3)]
LINES = "\n".join(json.dumps(row) for row in ROWS)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=1).encode("utf-8-sig"),
        LINES.encode(),
        LINES.replace("\n", "\r\n\r\n").encode("utf-8-sig"),
        gzip.compress(LINES.encode("utf-8-sig")),
        gzip.compress(json.dumps(ROWS).encode()),
        LINES.encode() + b"\n\n",
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_files_are_read_by_what_they_hold(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    source = DatasetConfig(json_path=str(tmp_path / name)).open("answer")
    assert [(source[n].id, source[n].turns) for n in range(len(source))] == [
        (str(n), (TURN,)) for n in range(3)
    ]


def test_a_broken_first_line_is_one_of_many(tmp_path: Path) -> None:
    for content in ("{broken\n" + LINES, '{"video": \n' + LINES):
        (tmp_path / "rows.jsonl").write_text(content)
        source = read_json(tmp_path / "rows.jsonl", tmp_path, need="answer")
        assert [source[n].id for n in (1, 2, 3)] == ["0", "1", "2"]
        with pytest.raises(VideoError, match=r"rows\.jsonl, row 1 cannot be used"):
            source[0]


def test_one_object_is_one_row_and_damage_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert len(read_json(path, tmp_path)) == 1
    for content in (
        gzip.compress(LINES.encode())[:-20],
        b"\xff\xfe[",
        b"[1, 2",
        b"{",
        b"[" * 100_000,
        b"[]",
        b" ",
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"one\.json") as caught:
            read_json(path, tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "list.csv").write_bytes(gzip.compress("\ufeffa.mp4,1\r\nb.mp4,0\r\n".encode()))
    source = read_csv(tmp_path / "list.csv", tmp_path)
    assert [(source[n].id, source[n].label) for n in range(2)] == [("a.mp4", 1), ("b.mp4", 0)]


def test_labels_as_tables_export_them(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "label": value} for value in (2, 2.0, "2", NAN, None)]
    (tmp_path / "l.json").write_text(json.dumps(rows))
    source = read_json(tmp_path / "l.json", tmp_path)
    assert [source[n].label for n in range(5)] == [2, 2, 2, None, None]
    assert source[3].lacks("label") == "It has no label."


def test_the_check_counts_what_a_run_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty rows: six that cannot be used, two of them of one id and two whose files are not there."""
    vf.write(tmp_path / "a.mp4", vf.steady(8), size=(64, 48))
    good = [{"id": str(n), "video": "a.mp4", "conversations": TALK} for n in range(14)]
    bad = [
        {"id": "twice", "video": "a.mp4", "caption": None},
        {"id": "twice", "video": "gone.mp4", "conversations": TALK},
        {"videos": "a.mp4", "conversations": TALK},
        {"video": "a.mp4", "conversations": [human("What?"), gpt("A cat.")]},
        {"video": "lost.mp4", "conversations": TALK},
        {"conversations": TALK},
    ]
    (tmp_path / "a.json").write_text(json.dumps([*good, *bad]))
    data = {"json_path": str(tmp_path / "a.json"), "data_root": str(tmp_path)}
    loader = Loader(
        DatasetConfig(**data).open("answer"), 0, out=tmp_path, stride=4, max_missing=1.0, need="answer"
    )
    taken = [loader.usable(0, place, lambda one: one.media.load(2, 56))[0] for place in range(len(loader))]
    assert {example.id for example in taken} == {str(n) for n in range(14)}
    missing = json.loads((tmp_path / "missing.json").read_text())
    assert len(missing) == len(bad)
    assert sum(name.startswith("twice") for name in missing) == 2
    (tmp_path / "r.yaml").write_text(json.dumps({"stage": "chat_stage1", "datasets": [data]}))
    assert check_main(["check", str(tmp_path / "r.yaml")]) == 2
    told = capsys.readouterr().out
    assert f"{len(bad)} of 20" in told
    assert any(reason in told for reason in missing.values())
    # Flux-UMT needs no answers: only what has no video is missing.
    (tmp_path / "r.yaml").write_text(json.dumps({"stage": "umt", "data": [data]}))
    assert check_main(["check", str(tmp_path / "r.yaml"), "max_missing=0.5"]) == 0
    assert "5 of 20" in capsys.readouterr().out


def test_a_row_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[null]")
    with pytest.raises(DataError) as caught:
        read_json(path, tmp_path, need="answer")
    assert str(caught.value).endswith(f"the first of them: {path}, row 1 is not an object.")
