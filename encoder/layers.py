"""The layers of FluxViT: RMSNorm, dual patch norm, attention with LPE, MLP, LayerScale, blocks, pooling.

Tokens of all clips lie packed as (N, C); `segments` lists consecutive runs (clips, tokens per clip). Linear
layers see one long sequence; attention runs once per segment, so no clip pays for, or sees, another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back to the input's dtype, times a weight; eps 1e-6."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def scale(self, x: Tensor) -> Tensor:
        """1 / rms(x), (..., dim) -> (..., 1) in the dtype of x."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.rsqrt(norm.square() / x.shape[-1] + self.eps).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight.to(x.dtype)


ALIGNED = 8  # numbers of 16 bits to a row's multiple of 16 bytes, which fast products want: 588 is none


class PatchEmbed(nn.Module):
    """Non-overlapping 1 x P x P patches, normalised before and after their projection (paper: DPN).

    The paper says LayerNorm; the released model uses RMSNorm without bias, and so does this. dual_norm: False
    leaves both norms out.
    """

    def __init__(
        self, embed_dim: int, patch_size: int = 14, channels: int = 3, *, dual_norm: bool = True
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(
            channels, embed_dim, (1, patch_size, patch_size), stride=(1, patch_size, patch_size)
        )
        self.dual_norm = dual_norm
        if dual_norm:
            self.norm = RMSNorm(embed_dim)
            self.norm_before = RMSNorm(channels * patch_size**2)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, T, H, W), H and W multiples of P -> (B, T, L, C) with L = (H/P) * (W/P)."""
        size = self.patch_size
        batch, channels, frames, height, width = pixels.shape
        patches = (
            pixels.view(batch, channels, frames, height // size, size, width // size, size)
            .permute(0, 2, 3, 5, 4, 6, 1)  # [B, T, h, w, P, P, 3]: channel last, as norm_before is indexed
            .reshape(batch, frames, -1, size * size * channels)
        )
        # A convolution whose stride is its kernel is one linear map of the flattened patch. The first norm's
        # weight joins that map and its scale follows it, which spares three passes over the raw patches.
        weight = self.proj.weight.squeeze(2).permute(0, 2, 3, 1).flatten(1)
        if not self.dual_norm:
            return F.linear(patches, weight, self.proj.bias)
        weight = weight * self.norm_before.weight
        scale = self.norm_before.scale(patches)
        if patches.device.type == "cuda" and (lacking := -patches.shape[-1] % ALIGNED):
            patches, weight = F.pad(patches, (0, lacking)), F.pad(weight, (0, lacking))
        return self.norm(torch.addcmul(self.proj.bias, F.linear(patches, weight), scale))  # type: ignore[arg-type]


class Segment(NamedTuple):
    """A run of clips of equal length in the packed sequence."""

    clips: int
    length: int


class ChannelAffine(nn.Module):
    """y = a_c * x + b_c per channel, kept as a depthwise 1x1x1 convolution for its names in checkpoints.

    Serves as GPE (on the position table) and LPE (on the values); starts as the identity.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv3d(dim, dim, 1, groups=dim)
        nn.init.ones_(self.depthwise_conv.weight)
        nn.init.zeros_(self.depthwise_conv.bias)  # type: ignore[arg-type]

    @property
    def scale(self) -> Tensor:
        """(dim,)"""
        return self.depthwise_conv.weight.flatten()

    @property
    def shift(self) -> Tensor:
        """(dim,)"""
        assert self.depthwise_conv.bias is not None
        return self.depthwise_conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))


QUERY_CHUNK = 256
# Scores that a graph may keep per call; beyond, the fused kernel's memory saving is worth its time.
GRAPH_SCORES = 2**27


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, H, N, d) heads.

    On CPUs in half precision by plain matrix products, where the fused kernel is slower than in float32:
    without a graph over chunks of queries (1.7 times faster, see tests/bench/encoder.py), with one all at
    once.
    """
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    graph = torch.is_grad_enabled()
    if q.device.type != "cpu" or q.dtype == torch.float32 or (graph and scores > GRAPH_SCORES):
        return F.scaled_dot_product_attention(q, k, v)
    keys = k.contiguous().transpose(-2, -1)
    v = v.contiguous()
    q = q * q.shape[-1] ** -0.5
    if graph:
        return (q.contiguous() @ keys).softmax(dim=-1) @ v
    return torch.cat([(chunk @ keys).softmax(dim=-1) @ v for chunk in q.split(QUERY_CHUNK, dim=-2)], dim=-2)


def attend_in_turn(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment]) -> Tensor:
    """`attend` for packed heads (N, H, d): clips of one length together, lengths one after the other."""
    sizes, out = [clips * length for clips, length in segments], []
    for segment, *parts in zip(segments, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        heads = [part.unflatten(0, segment).transpose(1, 2) for part in parts]  # [clips, H, length, d]
        out.append(attend(*heads).transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


# Of attention for each length more; above, one call for each length is faster (tests/bench/gpu.py, H100).
MACS_A_LENGTH = 1.5e10


@lru_cache(maxsize=64)
def _offsets(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    """(1 + clips,) int32: where the clips begin in the packed sequence, and its end."""
    lengths = [length for clips, length in segments for _ in range(clips)]
    with torch.inference_mode(False):  # training may use it later
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def attends_packed(q: Tensor, segments: Sequence[Segment]) -> bool:
    """Whether clips of several lengths are better attended to in one call.

    torch has a kernel for it on CUDA from Ampere on, in half precision, for heads (N, H, d) of widths by 8 up
    to 256. It is slower than that for one length, and spares the launches of all but one.
    """
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return False
    macs = sum(2 * clips * length**2 for clips, length in segments) * q.shape[1] * q.shape[2]
    few = macs < MACS_A_LENGTH * (len(segments) - 1)
    return few and torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The same in one call for all lengths."""
    from torch.nn.attention.varlen import varlen_attn  # which takes a second, and CUDA alone has it

    offsets, longest = _offsets(tuple(segments), q.device), max(length for _, length in segments)
    attended = varlen_attn(q, k, v, offsets, offsets, longest, longest)
    assert isinstance(attended, Tensor)  # a pair only where more is asked for
    return attended


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V + LPE(V), queries and keys RMS-normalised over all heads together.

    lpe: False leaves the second term out.
    """

    def __init__(self, dim: int, heads: int, *, lpe: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.lpe = ChannelAffine(dim) if lpe else None
        self.q_norm = RMSNorm(dim)
        self.k_norm = RMSNorm(dim)

    def forward(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """(N, C) -> (N, C)."""
        return self.mix(*self.qkv_of(x), segments)

    def qkv_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries, normalised keys, and values, each (N, C)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.q_norm(q), self.k_norm(k), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment]) -> Tensor:
        """What `qkv_of` gave -> (N, C)."""
        heads = [part.unflatten(1, (self.heads, -1)) for part in (q, k, v)]
        together = len(segments) > 1 and attends_packed(heads[0], segments)
        attended = (attend_packed if together else attend_in_turn)(heads[0], heads[1], heads[2], segments)
        mixed = attended.flatten(1)
        return self.proj(mixed if self.lpe is None else mixed + self.lpe(v))


class Mlp(nn.Module):
    """Linear, GELU, Linear, of rows (..., C)."""

    def __init__(self, dim: int, hidden: int, gelu: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.approximate = "tanh" if gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if self._fused(x):
            # In the product's own kernel; on CUDA alone this is the tanh form.
            rows, weight = x.reshape(-1, x.shape[-1]), self.fc1.weight.t()
            hidden = torch._addmm_activation(self.fc1.bias, rows, weight, use_gelu=True)
            return self.fc2(hidden).view(*x.shape[:-1], -1)
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))

    def _fused(self, x: Tensor) -> bool:
        """Whether GELU joins the first product: that has no gradient, and autocast does not cast it."""
        return (
            self.approximate == "tanh"
            and x.device.type == "cuda"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
        )


class LayerScale(nn.Module):
    """x + gamma * y, with the product in float32."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual x (N, C) and branch y (N, C) -> (N, C) in the dtype of x."""
        return torch.addcmul(x.float(), y.float(), self.gamma.float()).to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a clip's whole branch with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, y: Tensor, segments: Sequence[Segment]) -> Tensor:
        """(N, C) -> (N, C)."""
        if not self.training or self.rate == 0:
            return y
        stays = torch.rand(sum(clips for clips, _ in segments), device=y.device) >= self.rate
        factors = (stays.to(y.dtype) / (1 - self.rate)).split([clips for clips, _ in segments])
        rows = [
            factor[:, None].expand(clips, length).flatten()
            for factor, (clips, length) in zip(factors, segments, strict=True)
        ]
        return y * torch.cat(rows)[:, None]


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        gelu: str,
        scale_init: float,
        drop_path: float,
        *,
        lpe: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, heads, lpe=lpe)
        self.ls1 = LayerScale(dim, scale_init)
        self.norm2 = RMSNorm(dim)
        self.mlp = Mlp(dim, mlp_dim, gelu)
        self.ls2 = LayerScale(dim, scale_init)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """(N, C) -> (N, C)."""
        x = self.ls1(x, self.drop_path(self.attn(self.norm1(x), segments), segments))
        return self.ls2(x, self.drop_path(self.mlp(self.norm2(x)), segments))


class CrossAttention(nn.Module):
    """One query against all tokens; biases are separate parameters, as in the released checkpoints."""

    def __init__(self, dim: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.k_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, out_dim)

    def _split(self, x: Tensor, linear: nn.Linear, bias: Tensor) -> Tensor:
        return F.linear(x, linear.weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query (B, 1, C), keys and values (B, N, C) -> (B, 1, out_dim)."""
        q = self._split(query, self.q, self.q_bias)
        k = self._split(keys, self.k, self.k_bias)
        v = self._split(values, self.v, self.v_bias)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, keys: Tensor) -> Tensor:
        """Attention of the query, mean over heads: (B, N)."""
        q = self._split(query, self.q, self.q_bias)
        k = self._split(keys, self.k, self.k_bias)
        return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)[:, 0]


class AttentionPool(nn.Module):
    """Pools all tokens of a clip (cls included) with their mean as the query."""

    def __init__(self, dim: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.norm1_q = nn.LayerNorm(dim)
        self.norm1_k = nn.LayerNorm(dim)
        self.norm1_v = nn.LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, heads, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, out_dim)."""
        query = self.norm1_q(tokens.mean(dim=1, keepdim=True))
        return self.cross_attn(query, self.norm1_k(tokens), self.norm1_v(tokens))[:, 0]

    def attention(self, tokens: Tensor) -> Tensor:
        """Head-mean attention of the pooling query: (B, N, C) -> (B, N). Teachers rank tokens by it."""
        query = self.norm1_q(tokens.mean(dim=1, keepdim=True))
        return self.cross_attn.weights(query, self.norm1_k(tokens))


class Aligner(nn.Module):
    """Linear, LayerNorm, L2 norm: maps a pooled feature to a target to align with."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, in_dim) -> (B, out_dim), unit length."""
        return F.normalize(self.norm(self.head(pooled)), dim=-1)
