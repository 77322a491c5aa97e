"""A compiled encoder gives the same tokens, or says what it lacks."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from encoder import compiling
from encoder.compiling import compile_encoder
from encoder.config import MICRO
from encoder.errors import ConfigError
from encoder.fluxvit import FluxViT
from encoder.selection import importance
from tests import ROOT

TINY = MICRO.replace(embed_dim=32, depth=2, num_heads=2, pool_heads=2, clip_embed_dim=16, num_classes=0)


@pytest.mark.slow  # a compiler runs for some ten seconds
def test_tokens_are_those_of_the_encoder_as_written() -> None:
    torch.manual_seed(0)
    plain = FluxViT(TINY).eval().requires_grad_(False)
    compiled = compile_encoder(copy.deepcopy(plain))
    for frames, keep in ((4, 20), (4, 20), (2, None), (4, [20, 11])):
        clips = torch.randn(2, 3, frames, 56, 56)
        expected, found = plain(clips, keep), compiled(clips, keep)
        for one, other in zip(expected.kept, found.kept, strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(found.packed, expected.packed, atol=1e-4, rtol=1e-4)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    copy.deepcopy(compiled)(clips, 9)


def test_a_compiled_encoder_is_copied_and_pickled_as_written() -> None:
    plain = FluxViT(TINY).eval().requires_grad_(False)
    compiled = compile_encoder(copy.deepcopy(plain))
    clips = torch.randn(1, 3, 2, 56, 56)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(other(clips, 9).packed, plain(clips, 9).packed)
        assert other.importance is importance  # the one that is compiled has its own


@pytest.mark.slow
def test_an_encoder_is_there_without_what_only_cuda_and_the_compiler_need() -> None:
    """Each takes a second to import, in every process."""
    late = "torch.nn.attention.varlen", "torch._inductor.compile_fx"
    code = f"import sys, encoder.fluxvit, encoder.compiling; print(sorted(set({late}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_what_is_lacking_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler g\+\+: install it, or leave compile out\.$"):
        compile_encoder(FluxViT(TINY))
    # torch calls the one and looks for no other.
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None if name == "g++" else f"/usr/bin/{name}")
    assert compiling.lacking_compiler(torch.device("cpu")) == "there is no C++ compiler g++"
    monkeypatch.undo()
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert compiling.lacking_compiler(torch.device("cuda")) == "the package triton is not there"
