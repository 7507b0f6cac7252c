"""Models as their publishers' code has them, small, in plain torch: what converted weights are compared with.

An open_clip CLIP (residual blocks on `nn.MultiheadAttention`, stacked projections, exact GELU) and ImageReward's BLIP
(timm's ViT, BERT with cross attention), with the names that their checkpoints have.
"""

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = torch.tensor((0.48145466, 0.4578275, 0.40821073)), torch.tensor((0.26862954, 0.26130258, 0.27577711))
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("a", "t</w>")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "##s", "on", "the", "moon"]


def normalised(images: Tensor) -> Tensor:
    """Images [b, 3, h, w] of [0, 1] less CLIP's mean, by its std."""
    return (images - MEAN[:, None, None]) / STD[:, None, None]


def write_merges(path: Path) -> Path:
    """A file as OpenAI's bpe_simple_vocab_16e6.txt: a line about itself, then more pairs than are used."""
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(" ".join(pair) for pair in MERGES), "z q", "x q"]
    path.write_text("\n".join(lines) + "\n")
    return path


def tokens_of(word: str) -> list[int]:
    """Tokens of `cat` and `dog` by hand: 512 letters come first, then the pairs, then the two marks."""
    return [512 + len(MERGES), 512 + {"cat": 1, "dog": 3}[word], 512 + len(MERGES) + 1]


class Block(nn.Module):
    """A pre-norm residual block of open_clip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 3 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(3 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        read = self.ln_1(x)
        x = x + self.attn(read, read, read, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of them."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """The image tower; 80 wide heads, as ViT-H."""

    def __init__(self, size: int = 16, patch: int = 8, width: int = 320, projected: int = 24) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, 2, width // 80)
        self.proj = nn.Parameter(torch.randn(width, projected) / math.sqrt(width))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """A CLIP of open_clip whose text tower is 128 wide, in two heads."""

    def __init__(self, width: int = 128, projected: int = 24, length: int = 9) -> None:
        super().__init__()
        self.visual = Visual(projected=projected)
        self.token_embedding = nn.Embedding(512 + len(MERGES) + 2, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.transformer = Transformer(width, 3, 2)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, projected) / math.sqrt(width))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding[:length], mask))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection

    def cosine(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Of each image [b, 3, 16, 16] in [0, 1] with its tokens, padded by 0."""
        seen, read = self.visual(normalised(images)), self.encode_text(tokens)
        return (F.normalize(seen, dim=1) * F.normalize(read, dim=1)).sum(1)


class Head(nn.Module):
    """The stack of linear layers as it is published, with its dropouts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _VitAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), width // 64

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 8).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, width))


class _VitBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = _VitAttention(width)
        layers = {"fc1": nn.Linear(width, 2 * width), "act": nn.GELU(), "fc2": nn.Linear(2 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Bare(nn.Module):
    """A module whose parts are set from outside."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class _Vit(nn.Module):
    def __init__(self, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        self.patch_embed = _Bare()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(_VitBlock(width) for _ in range(2))
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _BertAttention(nn.Module):
    def __init__(self, width: int, seen: int) -> None:
        super().__init__()
        self.self, self.output, self.heads = _Bare(), _Bare(), width // 64
        self.self.query, self.self.key, self.self.value = (nn.Linear(size, width) for size in (width, seen, seen))
        self.output.dense, self.output.LayerNorm = nn.Linear(width, width), nn.LayerNorm(width, 1e-12)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        b, n, width = x.shape
        split = [
            layer(value).view(b, -1, self.heads, 64).transpose(1, 2)
            for layer, value in ((self.self.query, x), (self.self.key, other), (self.self.value, other))
        ]
        likeness = split[0] @ split[1].transpose(-2, -1) / 8
        if mask is not None:
            likeness = likeness.masked_fill(~mask[:, None, None], -math.inf)
        found = (likeness.softmax(-1) @ split[2]).transpose(1, 2).reshape(b, n, width)
        return self.output.LayerNorm(self.output.dense(found) + x)


class _BertLayer(nn.Module):
    def __init__(self, width: int, seen: int) -> None:
        super().__init__()
        self.attention, self.crossattention = _BertAttention(width, width), _BertAttention(width, seen)
        self.intermediate, self.output = _Bare(), _Bare()
        self.intermediate.dense = nn.Linear(width, 2 * width)
        self.output.dense, self.output.LayerNorm = nn.Linear(2 * width, width), nn.LayerNorm(width, 1e-12)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), seen, None)
        return self.output.LayerNorm(self.output.dense(F.gelu(self.intermediate.dense(x))) + x)


class _Bert(nn.Module):
    def __init__(self, words: int, width: int, seen: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = _Bare(), _Bare()
        self.embeddings.word_embeddings = nn.Embedding(words, width)
        self.embeddings.position_embeddings = nn.Embedding(40, width)
        self.embeddings.LayerNorm = nn.LayerNorm(width, 1e-12)
        self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.encoder.layer = nn.ModuleList(_BertLayer(width, seen) for _ in range(2))

    def forward(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        places = self.embeddings.position_embeddings(torch.arange(ids.shape[1]))
        x = self.embeddings.LayerNorm(self.embeddings.word_embeddings(ids) + places)
        for layer in self.encoder.layer:
            x = layer(x, seen, mask)
        return x


class ImageReward(nn.Module):
    """BLIP and the stack, for images of 32 pixels; text 64 wide, pictures 128."""

    def __init__(self) -> None:
        super().__init__()
        self.blip = _Bare()
        self.blip.visual_encoder = _Vit(32, 16, 128)
        self.blip.text_encoder = _Bert(len(WORDS) + 2, 64, 128)
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(128, 16), nn.Linear(64, 16)
        self.mlp = Head(64)

    def score(self, images: Tensor, words: list[list[str]]) -> Tensor:
        """Of images [b, 3, 32, 32] in [0, 1] and prompts by their words, padded to 35 tokens."""
        rows = [[WORDS.index(word) for word in ("[CLS]", *prompt, "[SEP]")] for prompt in words]
        ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (35 - len(row)) for row in rows])
        read = self.blip.text_encoder(ids, mask, self.blip.visual_encoder(normalised(images)))
        return (self.mlp(read[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


def seeded(kind: type[nn.Module], *sizes: int, seed: int = 0) -> nn.Module:
    """One of these with weights by a seed, in which every part matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(*sizes).eval().requires_grad_(False)
        for name, value in model.named_parameters():
            if name.endswith(("bias", "weight")) and value.ndim == 1:
                value += 0.2 * torch.randn_like(value)
            elif value.ndim > 1 and "embed" not in name:
                value *= 2
    return model
