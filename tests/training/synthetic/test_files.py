"""The world's commands: fetching through a package client, exporting real videos, previews, clear errors."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from encoder.errors import DataError
from llm_bridge.assets.wheels import sha256
from training.synthetic import assets
from training.synthetic.__main__ import main
from training.synthetic.assets import fetch, open_bank
from training.synthetic.dataset import World
from training.synthetic.nouns import load_nouns
from training.synthetic.sprites import load_bank
from training.synthetic.world_config import WorldConfig


def disc(shift: int = 0) -> Image.Image:
    image = np.zeros((32, 32, 4), np.uint8)
    y, x = np.mgrid[:32, :32]
    image[(x - 16 - shift) ** 2 + (y - 16) ** 2 < 100] = (200, 60, 20, 255)
    return Image.fromarray(image)


def webp(*frames: Image.Image) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=50, lossless=True)
    return buffer.getvalue()


def archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/assets/{name}.webp")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package client that hands out two small archives instead of asking a registry."""
    pytest.importorskip("skimage")
    codes = [noun.code for noun in load_nouns()]
    still = webp(disc())
    archive(tmp_path / "still.tgz", {f"{code}-fe0f": still for code in codes} | {"0031": still})
    steady = webp(disc(), Image.eval(disc(), lambda v: v), disc(1))
    wandering = webp(disc(-6), disc(0), disc(6))
    archive(tmp_path / "moving.tgz", {codes[0]: steady, codes[1]: wandering})
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        "#!/bin/sh\n"
        f"case $2 in *anim*) f={tmp_path}/moving.tgz;; *) f={tmp_path}/still.tgz;; esac\n"
        'cp $f "$5/sprites.tgz"\n'
    )
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    for package in assets.SHA256:
        name = "moving.tgz" if "anim" in package else "still.tgz"
        monkeypatch.setitem(assets.SHA256, package, sha256(tmp_path / name))
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_fetch_converts_once_and_worlds_use_it(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch"]) == 0
    assert "fetching" in capsys.readouterr().out
    assert main(["fetch"]) == 0
    assert "fetching" not in capsys.readouterr().out
    bank = open_bank()
    nouns = load_nouns()
    assert bank.nouns == nouns
    assert bank.strips[nouns[0].code].period_s > 0
    # An animation that wanders about would contradict the scene's own motion.
    assert bank.strips[nouns[1].code].period_s == 0
    assert bank.strips[nouns[2].code].period_s == 0
    assert open_bank(stills_only=True).strips[nouns[0].code].frames == 1
    assert len(bank.photos) >= 8
    world = World("train", level=WorldConfig(nouns=20))
    sample = world.sample(1)
    assert world.render(sample.scene, [0.1, 1.0], 32, 32).shape == (2, 32, 32, 3)
    assert sorted(path.name for path in (packages / "cache").iterdir()) == ["world"]

    index = packages / "cache" / "world" / "index.json"
    index.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        open_bank()
    index.write_text('{"format": 0}')
    with pytest.raises(DataError, match="another version"):
        open_bank()
    fetch()
    assert open_bank().nouns == nouns
    (packages / "cache" / "world" / "sprites_64.npy").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_bank()


def test_other_sprites_than_the_reviewed_ones_are_refused(
    packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive(packages / "still.tgz", {"0031": webp(disc(3))})
    assert main(["fetch"]) == 2
    assert "not the file that was reviewed" in capsys.readouterr().err
    assert list((packages / "cache").iterdir()) == []


def test_a_failed_download_says_so_and_leaves_nothing(
    packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages / "bin" / "npm").write_text("#!/bin/sh\necho 'no such package' >&2\nexit 1\n")
    assert main(["fetch"]) == 2
    error = capsys.readouterr().err
    assert "no such package" in error
    assert "network" in error
    assert list((packages / "cache").iterdir()) == []


def test_missing_sprites_and_client_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"python -m training\.synthetic fetch"):
        World("train")
    with pytest.raises(DataError, match="No sprites"):
        load_bank(tmp_path / "nowhere")
    assert main(["fetch"]) == 2
    assert "Node.js" in capsys.readouterr().err


def test_export_writes_videos_that_play_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    out = tmp_path / "videos"
    command = ["export", "--shapes", "--split", "test", "--out", str(out), "--size", "64", "--fps", "8"]
    assert main([*command, "--count", "2"]) == 0
    first = out / "videos" / "test-0-000000.mp4"
    written = first.stat().st_mtime_ns
    (out / "videos" / "test-0-000001.mp4").unlink()
    assert main([*command, "--count", "3"]) == 0
    assert first.stat().st_mtime_ns == written
    records = json.loads((out / "annotations.json").read_text())
    assert [record["id"] for record in records] == [f"test-0-{i:06d}" for i in range(3)]
    from training.synthetic.sprites import procedural_bank

    world = World("test", bank=procedural_bank())
    for index, record in enumerate(records):
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum("<image>" in turn["value"] for turn in turns) == 1
        scene = world.sample(index).scene
        assert turns[1]["value"] == world.sample(index).caption
        with av.open(str(out / record["video"])) as file:
            pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            assert file.streams.video[0].codec_context.name == "h264"
        assert len(pictures) == round(8 * scene.duration_s)
        shown = world.render(scene, [1.0], 64, 64)[0].astype(int)
        assert np.abs(pictures[8].astype(int) - shown).mean() < 12
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--count", "1", "--size", "63"], "even number"),
        (["--count", "1", "--fps", "0"], "out of range"),
        (["--count", "0"], "Nothing to export"),
    ],
)
def test_wrong_export_settings_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["export", "--shapes", "--out", str(tmp_path), *options]) == 2
    assert words in capsys.readouterr().err


def test_two_exports_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--shapes", "--out", str(tmp_path), "--size", "32", "--fps", "2", "--count", "1"]
    assert main(command) == 0
    assert main([*command, "--seed", "1"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_preview_draws_a_sheet(tmp_path: Path) -> None:
    file = tmp_path / "sheets" / "sheet.png"
    assert main(["preview", "--shapes", "--simple", "--rows", "2", "--out", str(file)]) == 0
    with Image.open(file) as sheet:
        assert sheet.width > 8 * 128
        assert np.asarray(sheet).std() > 20
