"""MVBench: its files, prompt forms, readers of letters and scores; the synthetic world in its layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from encoder.errors import DataError, VideoError
from tests.encoder.video import video_files as vf
from training.data.media import FileMedia
from training.data.synthetic_source import WorldSource
from training.evaluation.mvbench import (
    TASKS,
    FrameFolder,
    Item,
    ask,
    by_video,
    letter_flash,
    letter_videochat2,
    mvbench_scores,
    mvbench_table,
    read_mvbench,
    score_mvbench,
    world_items,
)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def mvbench_rows(name: str) -> list[dict]:
    """Two questions in the layout of the published file of a task."""
    row = {"video": "x.mp4", "question": "What?", "candidates": ["left", "right", "up"], "answer": "up"}
    if name == "episodic_reasoning":
        return [{**row, "video": "castle_s01", "start": 0.0, "end": 2.0, "fps": 3, "subtitle": "(A:) Hi."}]
    if TASKS[name].bounded:
        row |= {"start": 1.0, "end": 3.5}
    return [row, {**row, "answer": "left"}]


def test_all_twenty_tasks(tmp_path: Path) -> None:
    for name in TASKS:
        (tmp_path / f"{name}.json").write_text(json.dumps(mvbench_rows(name)))
    touch(tmp_path / "v/star/Charades_v1_480/x.mp4", tmp_path / "v/sta/sta_video_segment/x.mp4")
    Image.new("RGB", (20, 20)).save(tmp_path / "one.jpg")
    touch(tmp_path / "v/tvqa/frames_fps3_hq/castle_s01/00001.jpg")
    items = read_mvbench(tmp_path, tmp_path / "v")
    assert len(TASKS) == 20
    assert len(items) == 39
    assert len({item.id for item in items}) == 39
    by_task = {item.task: item for item in reversed(items)}
    assert (by_task["action_sequence"].truth, by_task["action_sequence"].candidates[0]) == (2, "left")
    bounded = by_task["action_sequence"].media
    assert isinstance(bounded, FileMedia)
    assert (bounded.start_s, bounded.end_s) == (1.0, 3.5)
    # A video that is cut already is taken whole.
    cut = by_task["action_localization"].media
    assert isinstance(cut, FileMedia)
    assert (cut.start_s, cut.paths[0].parent.name) == (None, "sta_video_segment")
    assert isinstance(by_task["episodic_reasoning"].media, FrameFolder)
    with pytest.raises(VideoError):
        by_task["moving_count"].media.load(4, 56)


def test_bad_mvbench_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"moving_count\.json"):
        read_mvbench(tmp_path, tmp_path, ["moving_count"])
    row = {"video": "x.mp4", "question": "?", "candidates": ["1", "2"], "answer": "3"}
    (tmp_path / "moving_count.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match="question 0"):
        read_mvbench(tmp_path, tmp_path, ["moving_count"])
    with pytest.raises(DataError, match="no task"):
        read_mvbench(tmp_path, tmp_path, ["dancing"])


def test_both_prompt_forms(tmp_path: Path) -> None:
    (tmp_path / "moving_count.json").write_text(json.dumps(mvbench_rows("moving_count")))
    item = read_mvbench(tmp_path, tmp_path, ["moving_count"])[0]
    flash, notebook = ask(item, "flash"), ask(item, "videochat2")
    assert flash.question == (
        "Question: What?\nOption:\n(A) left\n(B) right\n(C) up\nOnly give the best option."
    )
    assert (flash.system, flash.prefix, flash.max_new_tokens) == (None, "", 16)
    assert notebook.question.startswith("Question: What?\nOptions:\n(A) left\n")
    assert notebook.system is not None
    assert notebook.system.startswith("Carefully watch the video")
    assert notebook.prefix == "Best option:("
    shown_nothing = ask(item, "open").question
    assert shown_nothing == "What?\nAnswer the question using a single word or phrase."


def test_frame_folder_shows_three_pictures_a_second(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(12):  # 4 seconds
        Image.fromarray(vf.numbered(number, 96, 64)).save(folder / f"{number + 1:05d}.png")
    clip = FrameFolder(folder, 1.0, 3.0).load(2, 64)
    assert [vf.number_in(frame.numpy()) for frame in clip.frames] == [4, 7]  # at 1.5 and 2.5 s
    assert clip.times_s == (1.5, 2.5)
    with pytest.raises(VideoError, match="ends before"):
        FrameFolder(folder, 9.0).load(2, 64)
    with pytest.raises(VideoError, match="no pictures"):
        FrameFolder(tmp_path / "none").load(2, 64)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B) left", "B"),
        ("B", "B"),
        ("c. to the right", "C"),
        ("The best option is (D).", "D"),
        ("Answer:\n(E)", "E"),
        ("It is left, not right", None),
        ("", None),
        ("F", None),
        ("[C]", "C"),
        ("a dog", "A"),  # the published rule
        ("Best option: 'B'", "B"),
    ],
)
def test_letters_of_the_flash_form(text: str, letter: str | None) -> None:
    assert letter_flash(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A) left", "A"), ("b", "B"), ("(C) x", "C"), (" D.", "D"), ("dog", None), ("", None), ("The A", None)],
)
def test_letters_of_the_videochat2_form(text: str, letter: str | None) -> None:
    assert letter_videochat2(text) == letter


def test_mvbench_by_hand() -> None:
    rows = [
        {"task": "x", "answer": "(A)", "letter": "A", "truth": "A"},
        {"task": "x", "answer": "(B)", "letter": "B", "truth": "A"},
        {"task": "x", "answer": " ", "letter": None, "truth": "A"},  # left out
        {"task": "y", "answer": "dog", "letter": None, "truth": "B"},  # wrong
        {"task": "y", "answer": "B", "letter": "B", "truth": "B"},
        {"task": "y", "answer": "B", "letter": "B", "truth": "B"},
        {"task": "z", "answer": "", "letter": None, "truth": "B"},
    ]
    tasks, mean = mvbench_scores(rows)
    assert tasks["x"].percent == 50
    assert (tasks["x"].answered, tasks["x"].empty) == (2, 1)
    assert tasks["y"].percent == pytest.approx(200 / 3)
    assert tasks["z"].percent is None
    assert mean == pytest.approx((50 + 200 / 3) / 2)
    assert mvbench_scores([]) == ({}, None)


# -- the synthetic world in its layout -----------------------------------------------------------------------


def test_world_questions_in_its_layout(cached_world: Path) -> None:
    source = WorldSource(split="test", count=8)
    world, items = source.open(), world_items(source)
    assert len({item.id for item in items}) == len(items)
    first = next(q for q in world.sample(0).questions if q.options)
    assert items[0].candidates == first.options
    assert items[0].truth == first.answer_index
    assert f"Question: {items[0].question}\n" in first.question
    assert max(len(item.candidates) for item in items) <= 5
    blocks = by_video(items)
    assert [n for block in blocks for n in block] == list(range(len(items)))
    assert len(blocks) == 8


def test_the_world_in_mvbenchs_tasks(cached_world: Path) -> None:
    items = world_items(WorldSource(split="test", count=80))
    said = [{"answer": f"({chr(65 + item.truth)})"} for item in items]
    result = score_mvbench(items, said, "flash")
    assert (result["mean"], result["high"]) == (100.0, 100.0)
    assert result["low"] > 90
    order = list(result["tasks"])
    shared = [task for task in TASKS if task in order]
    assert order[: len(shared)] == shared
    assert {"action_localization", "action_sequence", "moving_direction", "scene_transition"} <= set(shared)
    assert result["tasks"]["existence"]["chance"] == 50
    in_words = [{"answer": item.candidates[item.truth].capitalize() + "."} for item in items]
    assert score_mvbench(items, in_words, "words")["mean"] == 100.0
    assert score_mvbench(items, said, "words")["mean"] == 100.0
    assert score_mvbench(items, in_words, "flash")["mean"] < 50
    text = mvbench_table({"all": result})
    assert f"{len(shared)} of MVBench's 20 tasks" in text
    assert "100.0 [" in text


def test_mvbench_scores_by_hand() -> None:
    media = FileMedia((Path("x"),))
    items = [Item(f"{task}/{n}", task, media, "?", ("1", "2"), 1) for task in ("x", "y") for n in range(3)]
    said = [
        {"answer": "(B)"},
        {"answer": "(A)"},
        {"answer": ""},
        {"answer": "b"},
        {"missing": "gone"},
        {"answer": "hm"},
    ]
    result = score_mvbench(items, said, "flash")
    assert result["tasks"]["x"]["percent"] == 50.0
    assert result["tasks"]["y"]["percent"] == 50.0
    assert (result["tasks"]["x"]["empty"], result["tasks"]["y"]["missing"]) == (1, 1)
    assert (result["mean"], result["chance"], result["unreadable letters"]) == (50.0, 50.0, 1)
    assert result["missing"] == {"y/1": "gone"}


def test_open_answers_are_scored_by_their_words() -> None:
    item = Item("t/0", "action_count", FileMedia((Path("a.mp4"),)), "How many?", ("1", "2", "3"), 1)
    rows = [{"answer": text} for text in ("He does it two times.", "three", "several", "")]
    result = score_mvbench([item] * 4, rows, "open")
    task = result["tasks"]["action_count"]
    assert (task["percent"], task["answered"], task["empty"]) == (pytest.approx(100 / 3), 3, 1)
    assert result["unreadable letters"] == 1


def test_open_answers_have_no_chance() -> None:
    """Whoever is not shown the options cannot guess among them: neither figures nor table say so."""
    items = [Item("t/0", "t", FileMedia((Path("a.mp4"),)), "How many?", ("1", "2"), 1)]
    opened = score_mvbench(items, [{"answer": "two"}], "open")
    chosen = score_mvbench(items, [{"answer": "(B)"}], "flash")
    assert "chance" not in json.dumps(opened)
    both = mvbench_table({"open": opened, "flash": chosen}).splitlines()
    assert both[0].split() == ["task", "open", "flash", "chance", "n"]
    assert both[1].split()[-2:] == ["50", "1"]
    alone = mvbench_table({"open": opened}).splitlines()
    assert alone[0].split() == ["task", "open", "n"]
    assert alone[1].split()[-1] == "1"
