"""`python -m training.data`: what it finds in recipes of every kind, and its exit status."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from encoder.errors import ConfigError
from tests import ROOT
from tests.encoder.video import video_files as vf
from tests.patience import PATIENCE_S
from tests.training.data.test_shards import write_tar
from training.data import synthetic_source as world_data
from training.data.__main__ import main
from training.data.check import find_datasets
from training.data.corpora import compare, corpora
from training.data.datasets import DatasetConfig
from training.data.speed import measure
from training.synthetic.dataset import World
from training.synthetic.sprites import procedural_bank
from training.trainer.recipe import read_values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good videos, one cut off, an empty one, and lists that also name a missing one."""
    for number in range(4):
        vf.write(tmp_path / f"{number}.mp4", vf.steady(20), size=(64, 48))
    vf.truncated(tmp_path / "0.mp4", tmp_path / "cut.mp4", 0.3)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "good.csv").write_text("".join(f"{n}.mp4,{'ab'[n % 2]}\n" for n in range(4)))
    (tmp_path / "bad.csv").write_text("0.mp4 0\ncut.mp4 1\nlost.mp4 1\nempty.mp4 0\n1.mp4 0\n")
    return tmp_path


def recipe(folder: Path, name: str = "recipe", **values) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_all_is_there(folder: Path, capsys) -> None:
    data = [{"csv": str(folder / "good.csv"), "data_root": str(folder)}]
    assert main(["check", recipe(folder, data=data, optim={"lr": 1})]) == 0
    text = capsys.readouterr().out
    assert re.search(r"data\[0\] +4 +0 of 4 +4 +0 +ok", text)
    assert "2 classes" in text
    assert "All datasets can be used." in text


def test_what_is_wrong_is_named_and_counted(folder: Path, capsys) -> None:
    data = {"csv": str(folder / "bad.csv"), "data_root": str(folder)}
    path = recipe(folder, train={"data": data}, max_missing=0.7)
    assert main(["check", path]) == 0  # 2 of 5 missing, 1 of 3 unreadable: 0.6
    text = capsys.readouterr().out
    assert re.search(r"train\.data +5 +2 of 5 +3 +1 +tolerable", text)
    assert f"missing: lost.mp4: there is no file {folder / 'lost.mp4'}" in text
    assert "empty.mp4 (it is empty)" in text
    assert re.search(r"unreadable: cut\.mp4: Cannot read 'cut\.mp4'", text)
    assert main(["check", path, "max_missing=0.5"]) == 2
    assert "Not fit for training: 1 of 1 (max_missing is 0.5)." in capsys.readouterr().out
    assert main(["check", path, "--sample", "0", "--files", "1"]) == 0
    assert re.search(r"0 of 1 +0 +0 +ok", capsys.readouterr().out)


def test_mixtures_shards_and_missing_annotations(folder: Path, llava_json: Path, capsys) -> None:
    part = {"json_path": str(llava_json), "data_root": str(llava_json.parent), "sampling_strategy": "first:5"}
    (folder / "mix.yaml").write_text(yaml.safe_dump({"datasets": [part]}))
    video = (folder / "0.mp4").read_bytes()
    write_tar(folder / "a.tar", [("0.mp4", video), ("0.txt", b"Bars."), ("1.txt", b"nothing")])
    datasets = [
        {"yaml_path": str(folder / "mix.yaml")},
        {"json_path": str(llava_json), "data_root": str(llava_json.parent), "corpus": "coin"},
        {"shards": "a.tar", "data_root": str(folder), "turns": 1},
        {"json_path": str(folder / "none.json")},
    ]
    images = {"images": {"shards": str(folder / "a.tar")}}
    assert main(["check", recipe(folder, datasets=datasets, data=images)]) == 2
    text = capsys.readouterr().out
    assert re.search(r"datasets\[0\] +5 +0 of 5 +5 +0 +ok", text)
    assert re.search(r"datasets\[1\] +15 +1 of 15 +14 +0 +too much is missing", text)
    assert "0.536 % of coin, test (2,797)" in text
    assert re.search(r"datasets\[2\] +2 +1 of 2 +1 +0 +too much is missing", text)  # a caption of nothing
    assert "none.json: No such file or directory." in text
    assert re.search(r"data\.images +2 +1 of 2 +1 +0 +too much is missing", text)
    assert "Not fit for training: 4 of 5" in text


def test_the_world_and_overrides(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = procedural_bank()
    monkeypatch.setattr(world_data, "World", lambda split, seed, level: World(split, seed, level, bank))
    path = recipe(
        folder,
        world={"count": 500, "preset": "simple"},
        datasets=[{"world": {"count": 3}, "captions": 0.2}, {"world": {"count": 9}}],
    )
    assert main(["check", path, "datasets.0.world.count=4", "--sample", "2"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"world +500 +0 of 500 +2 +0 +ok", text)
    assert re.search(r"datasets\[0\] +4 +0 of 4 +2 +0 +ok", text)
    assert main(["check", path, "datasets.7.world.count=4"]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_datasets_are_found_by_what_they_read() -> None:
    found = dict(
        find_datasets(
            {
                "a": [{"csv": "x"}, {"json_path": "y"}],
                "b": {"shards": "z"},
                "world": {"count": 5},
                "other": {"csvs": 1, "deep": [[{"jsonl": "q"}]]},
            }
        )
    )
    assert {where: dataset.name for where, dataset in found.items()} == {
        "a[0]": "x",
        "a[1]": "y",
        "b": "z",
        "world": "synthetic world, train",
        "other.deep[0][0]": "q",
    }
    with pytest.raises(ConfigError, match=r"data\[0\] has the unknown setting 'rot'"):
        list(find_datasets({"data": [{"csv": "x", "rot": "y"}]}))


def test_wrong_calls(folder: Path, capsys) -> None:
    for arguments, message in (
        (["check", str(folder / "no.yaml")], "Cannot read the recipe"),
        (["check", recipe(folder, "a", optim={"lr": 1})], "names no dataset"),
        (["check", recipe(folder, "b", data={"csv": "x"}), "--files", "0"], "at least 1"),
        (["check", recipe(folder, "c", data={"csv": "x", "jsonl": "y"})], "exactly one"),
        (["corpora", "imagenet"], "There is no corpus"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_every_shipped_recipe_is_understood() -> None:
    folder = ROOT / "training" / "recipes"
    recipes = [path for path in folder.rglob("*.yaml") if path.parent.name != "accelerate"]
    assert recipes
    for path in recipes:
        found = list(find_datasets(read_values(path)))
        assert found, path
        for _, dataset in found:
            if dataset.corpus is not None:
                compare(dataset.corpus, 1)


def test_corpora(capsys) -> None:
    known = corpora()
    parts = ("cc3m", "cc12m", "webvid10m", "visual_genome", "sbu", "coco")
    total = sum(known[name].clips["train"] for name in parts)
    # The lists as published; the paper's own copies (25.68M) had lost some links.
    assert 0 < total - known["clip_25m"].clips["train"] < 0.1 * total
    assert compare("ssv2", 168_913) == "as expected of ssv2, train (168,913)"
    assert compare("kinetics400", 120_218) == "50 % of kinetics400, train (240,436)"
    assert main(["corpora"]) == 0
    assert "smit_caption_481k" in capsys.readouterr().out
    assert main(["corpora", "coin"]) == 0
    assert 'clips:    {"train": 9030, "test": 2797}' in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_command(folder: Path) -> None:
    path = recipe(folder, data={"csv": str(folder / "bad.csv"), "data_root": str(folder)})
    done = subprocess.run(
        [sys.executable, "-m", "training.data", "check", path],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert "2 of 5" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_speed_says_what_was_measured_and_what_a_card_needs(
    folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = read_values(str(ROOT / "training" / "recipes" / "cpu" / "umt.yaml"))
    values["data"] = [{"csv": str(folder / "bad.csv"), "data_root": str(folder)}]
    path = recipe(folder, **values)
    assert main(["check", path, "max_missing=0.9", "--speed", "--sample", "6"]) == 0
    text = capsys.readouterr().out
    each = [float(ms) for ms in re.findall(r"clips/s on \d+ cores, ([\d.]+) CPU-ms each", text)]
    assert "data[0]: " in text
    need = re.search(
        r"An H100 at 35% of 989 TFLOPS trains on ([\d.]+) samples/s .*computed, not measured", text
    )
    cores = re.search(r"That takes ([\d.]+) cores", text)
    assert need is not None
    assert cores is not None
    expected = float(need[1]) * sum(each) / len(each) / 1e3
    assert float(cores[1]) == pytest.approx(expected, rel=0.02)


def test_speed_counts_the_clips_that_could_be_read(folder: Path) -> None:
    dataset = DatasetConfig(csv=str(folder / "bad.csv"), data_root=str(folder))
    speed = measure(dataset, None, (2, 28), 20)
    assert speed is not None
    draw = random.Random(0)
    numbers = [draw.randrange(5) for _ in range(20)]
    assert speed.clips == sum(number in (0, 4) for number in numbers)
    assert speed.clips_per_s > 0
    assert speed.cpu_s >= 0
    (folder / "lost.csv").write_text("lost.mp4 1\n")
    assert (
        measure(DatasetConfig(csv=str(folder / "lost.csv"), data_root=str(folder)), None, (2, 28), 3) is None
    )
