"""Tiny text towers with random weights, each in the layout of a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llm_bridge.text_encoders.mobileclip import MobileClipConfig, MobileClipText

WORDS = ("a", "dog", "cat", "runs", "left", "right")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with bytes and a few words as vocabulary; the end of text has the highest id."""
    from transformers import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        whole = [*word[:-1], word[-1] + "</w>"]
        while len(whole) > 1:
            merges.append((whole[0], whole[1]))
            whole = [whole[0] + whole[1], *whole[2:]]
            vocabulary.append(whole[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = CLIPTokenizer(vocab=numbers, merges=list(dict.fromkeys(merges)), model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def mobileclip_file(path: Path, vocabulary: int, wrapper: str | None = None) -> MobileClipText:
    """A file as the published one, with an image half and a temperature beside the text half."""
    torch.manual_seed(0)
    model = MobileClipText(MobileClipConfig(64, 2, 1, 96, vocabulary, 12, 24))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {f"text_encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"image_encoder.model.norm.weight": torch.ones(3), "logit_scale": torch.tensor(1.0)}
    torch.save({wrapper: state} if wrapper else state, path)
    return model.eval()


def clip_folder(folder: Path, *, text_only: bool = False) -> Any:
    """CLIP, or its text half with projection alone."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer(folder)
    text = {
        **SMALL,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "projection_dim": 24,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    torch.manual_seed(0)
    if text_only:
        model = CLIPTextModelWithProjection(CLIPTextConfig(**text))
    else:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))
    model.save_pretrained(folder)
    return model.eval()


def siglip_folder(folder: Path) -> Any:
    """SigLIP; its tokenizer stands in as any that pads."""
    from transformers import SiglipConfig, SiglipModel

    tokenizer = clip_tokenizer(folder)
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    model.save_pretrained(folder)
    return model.eval()


def sentence_folder(folder: Path) -> Any:
    """A BERT, as sentence encoders are."""
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=32)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, vocab_size=len(vocabulary), max_position_embeddings=32))
    model.save_pretrained(folder)
    return model.eval()
