"""Readers of the public sets against tiny files of their true layouts."""

import json
from pathlib import Path

import pytest

from encoder.errors import ConfigError, DataError
from training.evaluation.benchmarks import RETRIEVAL, class_words, find_video, read_labelled, read_retrieval


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
    assert class_words(name) == words
