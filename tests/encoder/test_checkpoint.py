"""Weight files: wrapped, prefixed, partial, damaged."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder.checkpoint import build, infer_config, load_official, load_tensors, read_tensors, save_tensors
from encoder.config import SMALL, FluxViTConfig
from encoder.errors import CheckpointError, ConfigError
from encoder.fluxvit import FluxViT
from tests.encoder.test_fluxvit import TINY


@pytest.fixture(scope="module")
def model() -> FluxViT:
    return FluxViT(TINY)


@pytest.mark.parametrize("wrapper", [None, "model", "module"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder."])
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
@pytest.mark.quick(6)
def test_official_layouts(tmp_path: Path, model: FluxViT, wrapper, prefix: str, suffix: str) -> None:
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / f"w{suffix}")
    loaded, report = load_official(tmp_path / f"w{suffix}", config=TINY)
    assert report.exact
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_a_real_small_file_is_recognised(tmp_path: Path) -> None:
    original = FluxViT(SMALL.replace(num_classes=7))
    save_tensors(original.state_dict(), tmp_path / "s.safetensors")
    loaded, report = load_official(tmp_path / "s.safetensors", gelu="erf")
    assert report.exact
    assert loaded.config == SMALL.replace(num_classes=7, gelu="erf")


def test_missing_unexpected_and_misshaped_keys_are_reported(model: FluxViT) -> None:
    tensors = dict(model.state_dict())
    del tensors["cls_token"]
    tensors["extra"] = torch.zeros(1)
    tensors["fc_norm.weight"] = torch.zeros(3)
    with pytest.raises(
        CheckpointError, match=r"1 missing: cls_token; 1 unexpected: extra; 1 mis-shaped: fc_norm.weight"
    ):
        load_tensors(FluxViT(TINY), tensors)
    report = load_tensors(FluxViT(TINY), tensors, strict=False)
    assert report.missing == ("cls_token",)
    assert report.mismatched == (("fc_norm.weight", (3,), (16,)),)


def test_no_weights_are_drawn_for_what_is_loaded(model: FluxViT) -> None:
    before = torch.get_rng_state()
    built = build(lambda: FluxViT(model.config), model.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    found = built.state_dict()
    assert found.keys() == {name for name, _ in [*built.named_parameters(), *built.named_buffers()]}
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_with_its_command_line(tmp_path: Path, model: FluxViT) -> None:
    args = argparse.Namespace(lr=1e-3, model="fluxvit_small_patch14", nested=argparse.Namespace(a=[1, None]))
    torch.save({"model": model.state_dict(), "args": args, "epoch": 4}, tmp_path / "w.pth")
    loaded, report = load_official(tmp_path / "w.pth", config=TINY)
    assert report.exact
    assert torch.equal(loaded.pos_embed, model.pos_embed)


def test_a_file_of_the_clip_stage(tmp_path: Path, model: FluxViT) -> None:
    state = {f"vision_encoder.{name}": value for name, value in model.state_dict().items()}
    others = {"text_encoder.embedding.weight": torch.ones(3, 4), "vision_align.0.weight": torch.ones(2)}
    torch.save({"module": {**others, **state, "temp": torch.tensor(0.01)}}, tmp_path / "clip.pth")
    loaded, report = load_official(tmp_path / "clip.pth", config=TINY)
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    assert report.exact
    assert report.left_out == ("text_encoder.embedding.weight", "vision_align.0.weight", "temp")
    assert "3 left out: text_encoder.embedding.weight" in str(report)


def test_a_file_with_a_single_head(tmp_path: Path) -> None:
    one = FluxViT(SMALL.replace(num_pools=1, num_classes=5, num_aligners=0))
    names = {
        name: name.replace("head.0.", "head.").replace("clip_projector.0.", "clip_projector.")
        for name in one.state_dict()
    }
    torch.save({names[name]: value for name, value in one.state_dict().items()}, tmp_path / "one.pth")
    loaded, report = load_official(tmp_path / "one.pth")
    assert report.exact
    assert (loaded.config.num_pools, loaded.config.num_classes) == (1, 5)
    assert torch.equal(loaded.head[0].weight, one.head[0].weight)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Harmful:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"model": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="Cannot read"):
        read_tensors(tmp_path / "bad.pth")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_broken_files(tmp_path: Path, content) -> None:
    for name in ("w.pth", "w.safetensors"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            read_tensors(tmp_path / name)


def test_other_checkpoints_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not a FluxViT"):
        infer_config({"weight": torch.zeros(2)})


def test_save_and_load(tmp_path: Path, model: FluxViT) -> None:
    model.save_pretrained(tmp_path / "m")
    again = FluxViT.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "m" / "config.json").write_text('{"width": 3}')
    with pytest.raises(ConfigError, match="width"):
        FluxViTConfig.read(tmp_path / "m" / "config.json")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"embed_dim": 10**10}, "embed_dim"),
        ({"depth": 10**9}, "depth"),
        ({"depth": "6"}, "depth"),
        ({"depth": True}, "depth"),
        ({"num_heads": 0}, "num_heads"),
        ({"mlp_ratio": 1e300}, "mlp_ratio"),
        ({"pos_frames": -1}, "pos_frames"),
        ({"frames_range": [4, 10**9, 2]}, "frames_range"),
        ({"frames_range": [4, 8, 0]}, "frames_range"),
        ({"resolution_range": "wide"}, "resolution_range"),
        ({"embed_dim": 4096, "depth": 200}, "do not fit the model"),
    ],
)
def test_impossible_sizes_allocate_no_memory(tmp_path: Path, values: dict[str, Any], word: str) -> None:
    FluxViT(TINY).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    with pytest.raises((ConfigError, CheckpointError), match=word) as caught:
        FluxViT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"{", b"\xff", b"[]", b'{"depth": NaN}', b" " * 2**21])
def test_malformed_configurations_are_one_sentence(tmp_path: Path, text: bytes) -> None:
    FluxViT(TINY).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"^Cannot read the encoder configuration [^\n]*\.$"):
        FluxViT.from_pretrained(tmp_path)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    claimed = torch.zeros(1).expand(2**40)
    torch.save({"cls_token": claimed}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="does not hold all of 'cls_token'"):
        read_tensors(tmp_path / "a.pth")
    torch.save({"cls_token": torch.zeros(1, 1, 384), "blocks.x.y": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="no blocks"):
        load_official(tmp_path / "b.pth")
