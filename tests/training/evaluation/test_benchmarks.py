"""Readers of the public sets against tiny files of their true layouts; views and settings."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from encoder.budget import PlanTable
from encoder.errors import ConfigError, DataError, VideoError
from tests.encoder.video import video_files as vf
from training.data.media import FileMedia
from training.evaluation.benchmarks import RETRIEVAL, find_video, read_labelled, read_retrieval, spoken
from training.evaluation.encoder_input import Setting, from_table, head_for, unmasked
from training.evaluation.mvbench import TASKS, FrameFolder, ask, read_mvbench
from training.evaluation.views import Views, load_block, squares


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


# -- retrieval ----------------------------------------------------------------------------------------------


def test_json_list_with_several_captions_and_paragraphs(tmp_path: Path) -> None:
    rows = [
        {"video": "a.mp4", "caption": ["First.", "Second."]},
        {"video": "b.mp4", "caption": "One."},
        {"video": "a.mp4", "caption": "Third."},
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    several = read_retrieval(tmp_path / "test.json", tmp_path, RETRIEVAL["msvd"])
    assert [(e.id, e.captions) for e in several] == [
        ("a.mp4", ("First.", "Second.", "Third.")),
        ("b.mp4", ("One.",)),
    ]
    paragraphs = read_retrieval(tmp_path / "test.json", tmp_path, RETRIEVAL["didemo"])
    assert paragraphs[0].captions == ("First. Second. Third.",)
    assert paragraphs[0].media.end_s == 30.0  # type: ignore[attr-defined]


def test_msrvtt_csv(tmp_path: Path) -> None:
    touch(tmp_path / "videos" / "video7020.mp4")
    (tmp_path / "test.csv").write_text(
        'key,vid_key,video_id,sentence\nret0,msr7020,video7020,"a woman, cooking"\nret1,msr1,video1,a car\n'
    )
    found = read_retrieval(tmp_path / "test.csv", tmp_path / "videos", RETRIEVAL["msrvtt"])
    assert [e.captions for e in found] == [("a woman, cooking",), ("a car",)]
    assert found[0].media.paths[0].name == "video7020.mp4"  # type: ignore[attr-defined]


def test_activitynet_captions(tmp_path: Path) -> None:
    rows = {"v_x": {"duration": 9.5, "timestamps": [[0, 4], [4, 9]], "sentences": ["He runs. ", " He sits."]}}
    (tmp_path / "val_1.json").write_text(json.dumps(rows))
    [only] = read_retrieval(tmp_path / "val_1.json", tmp_path, RETRIEVAL["activitynet"])
    assert (only.id, only.captions) == ("v_x", ("He runs. He sits.",))


def test_lsmdc_tab_separated(tmp_path: Path) -> None:
    line = "1004_Juno_00.00.32.161-00.00.33.500\t00.00.32.161\t00.00.33.500\t\t\tSOMEONE walks.\n"
    (tmp_path / "test.csv").write_text(line)
    [only] = read_retrieval(tmp_path / "test.csv", tmp_path, RETRIEVAL["lsmdc"])
    assert (only.id, only.captions) == ("1004_Juno_00.00.32.161-00.00.33.500", ("SOMEONE walks.",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{"),
        ("a.json", "[]"),
        ("a.json", '[{"video": "a.mp4"}]'),
        ("a.json", '[{"caption": "x"}]'),
        ("a.json", '{"v": 3}'),
        ("a.csv", "x,y\n1,2\n"),
    ],
)
def test_bad_captions_are_one_sentence(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        read_retrieval(tmp_path / name, tmp_path, RETRIEVAL["msrvtt"])
    assert name in str(error.value)
    with pytest.raises(DataError, match="Cannot read"):
        read_retrieval(tmp_path / "none.json", tmp_path, RETRIEVAL["msrvtt"])


def test_a_video_is_found_under_another_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "a.webm", tmp_path / "c.d.avi")
    assert find_video(tmp_path, "a.mp4") == tmp_path / "a.webm"
    assert find_video(tmp_path, "a") == tmp_path / "a.webm"
    assert find_video(tmp_path, "c.d") == tmp_path / "c.d.avi"
    assert find_video(tmp_path, "none") == tmp_path / "none.mp4"


# -- classes ------------------------------------------------------------------------------------------------


def test_ucf101(tmp_path: Path) -> None:
    (tmp_path / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    (tmp_path / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi\nApplyEyeMakeup/v_A_g01_c01.avi\n")
    data = read_labelled("ucf101", tmp_path / "testlist01.txt", tmp_path, tmp_path / "classInd.txt")
    assert data.classes == ("ApplyEyeMakeup", "YoYo")
    assert [e.label for e in data.examples] == [1, 0]


def test_moments(tmp_path: Path) -> None:
    (tmp_path / "moments_categories.txt").write_text("praying,1\nclapping,0\nadult+male+singing,2\n")
    (tmp_path / "validationSet.csv").write_text(
        "praying/x.mp4,praying,4,0\nadult+male+singing/y.mp4,adult+male+singing,5,1\n"
    )
    data = read_labelled(
        "mitv1", tmp_path / "validationSet.csv", tmp_path, tmp_path / "moments_categories.txt"
    )
    assert data.classes == ("clapping", "praying", "adult+male+singing")
    assert [e.label for e in data.examples] == [1, 2]


def test_something(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({"Pushing something": "1", "Holding something": "0"}))
    rows = [{"id": "74225", "label": "pushing a cup", "template": "Pushing [something]", "placeholders": []}]
    (tmp_path / "validation.json").write_text(json.dumps(rows))
    touch(tmp_path / "74225.webm")
    data = read_labelled("ssv2", tmp_path / "validation.json", tmp_path, tmp_path / "labels.json")
    assert data.classes == ("Holding something", "Pushing something")
    assert [(e.label, e.media.paths[0].name) for e in data.examples] == [(1, "74225.webm")]  # type: ignore[attr-defined]


def test_coin(tmp_path: Path) -> None:
    rows = {
        "a1": {"recipe_type": 1, "class": "BoilNoodles", "subset": "testing", "annotation": []},
        "b2": {"recipe_type": 0, "class": "MakeTea", "subset": "training", "annotation": []},
        "c3": {"recipe_type": 0, "class": "MakeTea", "subset": "testing", "annotation": []},
    }
    (tmp_path / "COIN.json").write_text(json.dumps({"database": rows}))
    touch(tmp_path / "1" / "a1.mp4")
    data = read_labelled("coin", tmp_path / "COIN.json", tmp_path, None)
    assert data.classes == ("MakeTea", "BoilNoodles")
    assert [(e.id, e.label) for e in data.examples] == [("a1", 1), ("c3", 0)]
    assert data.examples[0].media.paths[0] == tmp_path / "1" / "a1.mp4"  # type: ignore[attr-defined]


def test_kinetics_and_missing_class_files(tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text("a.mp4 0\nb.mp4 1\n")
    (tmp_path / "names.txt").write_text("running\nsitting\n")
    data = read_labelled("k400", tmp_path / "val.csv", tmp_path, tmp_path / "names.txt")
    assert (data.classes, [e.label for e in data.examples]) == (("running", "sitting"), [0, 1])
    with pytest.raises(ConfigError, match=r"labels\.json"):
        read_labelled("ssv2", tmp_path / "val.csv", tmp_path, None)
    (tmp_path / "bad.csv").write_text("a.mp4\n")
    with pytest.raises(DataError, match="no label"):
        read_labelled("k400", tmp_path / "bad.csv", tmp_path, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("adult+male+singing", "adult male singing"),
        ("air_drumming", "air drumming"),
        ("playing TV games", "playing tv games"),
    ],
)
def test_class_names_as_words(name: str, words: str) -> None:
    assert spoken(name) == words


# -- MVBench ------------------------------------------------------------------------------------------------


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


# -- views and settings -------------------------------------------------------------------------------------


def test_moments_of_clips() -> None:
    assert Views(1).moments(0, 4) == [0.125, 0.375, 0.625, 0.875]
    assert [Views(3).moments(clip, 1)[0] for clip in range(3)] == [0.25, 0.5, 0.75]


def test_three_squares_along_the_longer_side() -> None:
    wide = torch.arange(10).view(1, 1, 10, 1).expand(2, 4, 10, 3)
    assert [crop[0, 0, :, 0].tolist() for crop in squares(wide)] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],
    ]
    tall = wide.transpose(1, 2)
    assert [tuple(crop.shape) for crop in squares(tall)] == [(2, 4, 4, 3)] * 3


def test_views_of_a_real_video_and_a_missing_one(tmp_path: Path) -> None:
    from training.data.examples import Example

    vf.write(tmp_path / "a.mp4", [i / 10 for i in range(24)], size=(96, 64))
    examples = [
        Example("a", FileMedia((tmp_path / "a.mp4",))),
        Example("b", FileMedia((tmp_path / "b.mp4",))),
    ]
    loaded = load_block(examples, Setting(4, 56), Views(2, 3), workers=2)
    assert loaded.places == [0]
    assert [tuple(v.shape) for v in loaded.views[0]] == [(3, 4, 56, 56)] * 6
    assert "no such file" in loaded.missing[1]
    # The crops of one clip differ, and so do the clips.
    assert not torch.equal(loaded.views[0][0], loaded.views[0][2])
    assert not torch.equal(loaded.views[0][0], loaded.views[0][3])


@pytest.mark.parametrize("text", ["8x224", "16x168:1024", "4x56:9/random", "24x252:512+vid-tldr"])
def test_settings_read_back(text: str) -> None:
    assert str(Setting.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "8", "8x", "0x224", "8x224:0", "8x224/best", "8x224+vid-tldr", "8x224:-1"]
)
def test_wrong_settings(text: str) -> None:
    with pytest.raises(ConfigError):
        Setting.parse(text)


def test_settings_of_the_paper(tmp_path: Path) -> None:
    assert [str(s) for s in unmasked((2048, 1024, 512), 224, 14)] == [
        "8x224:2048",
        "4x224:1024",
        "2x224:512",
    ]
    (tmp_path / "plan.json").write_text('[{"tokens": 1024, "frames": 16, "resolution": 168}]')
    [plus] = from_table(PlanTable.read(tmp_path / "plan.json"))
    assert plus.label == "1024+ (16x168:1024)"
    assert [head_for(keep, 3) for keep in (None, 3072, 2048, 1024, 512)] == [0, 0, 1, 2, 2]
    assert (head_for(512, 2), head_for(512, 1)) == (1, 0)
