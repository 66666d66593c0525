"""What a 7B decoder with 100 languages needs, counted on paper: `python -m benchmarks.paper` fills in PAPER.md.

No time is given: nobody has measured one. Sizes are those of the library's own data structures at the real widths
(masks of an attached layer on the "meta" device, tile lists, bytes that autograd saves in one real layer), multiplied
by the number of layers, languages and tokens that they are proportional to.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastmask_kernels.tile_layout import TileLayout
from torch import nn

import fastmask as fm
from benchmarks.memory import saved_bytes
from benchmarks.product import units_of
from benchmarks.tables import replace_between

__all__ = ["BEGIN", "END", "Decoder", "activation_bytes", "mask_bytes", "tables"]

BEGIN, END = "<!-- paper:begin -->", "<!-- paper:end -->"
PAPER = Path(__file__).with_name("PAPER.md")
ADAM = 16  # bytes a parameter: weight, gradient and two moments in float32
GPUS = (1, 8, 64)
TOKENS = 8192  # of a batch on one GPU


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder of 7 billion parameters, and of its subnetworks."""

    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    layers: int = 32
    vocabulary: int = 32000
    languages: int = 100
    density: float = 0.5

    @property
    def layer_parameters(self) -> int:
        """Of the projections of one layer."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.ffn

    @property
    def parameters(self) -> int:
        """Of the whole, without norms."""
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.hidden

    def one_layer(self, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """A model of one layer of these widths."""
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.ffn, num_attention_heads=self.heads, num_hidden_layers=1,
            num_key_value_heads=self.heads, vocab_size=8, max_position_embeddings=4096, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaModel(config).to(dtype).train()

    def names(self) -> list[str]:
        """The languages."""
        return [f"language {i}" for i in range(self.languages)]


def mask_bytes(decoder: Decoder) -> dict[str, dict[str, float]]:
    """Bytes of all languages' masks in all layers, by unit and form; the forms are `COLUMNS`."""
    L, layers = decoder.languages, decoder.layers
    model = decoder.one_layer("meta")
    subnets = fm.Subnetworks.random(model.config, decoder.names(), decoder.density, seed=0, units="both")
    assert subnets.heads is not None
    assert subnets.neurons is not None
    fm.attach(model, subnets, verify=False)  # there is nothing to run on the meta device
    masks = [layer.mask for layer in model.modules() if isinstance(layer, fm.MaskedLinear)]
    attached = sum(mask.nbytes for mask in masks)
    booleans = subnets.heads.numel() + subnets.neurons.numel()
    # Packed, as in an attached model, the kernels read the lists as they are.
    found = {"heads + neurons": _row(layers, booleans, _on_disk(subnets), attached, 0)}

    # One projection and few languages, scaled: both are proportional to weights and languages.
    N, K, few = decoder.ffn, decoder.hidden, 2
    scale = decoder.layer_parameters / (N * K) * L / few
    keep = units_of(few, N // 64 * (K // 64), 1, decoder.density).reshape(few, N // 64, K // 64)
    mask, layout = fm.Mask.blocks(keep, (64, 64)), TileLayout.from_blocks(keep, (64, 64))
    sizes = (keep.numel(), keep.numel() / 8, mask.nbytes, layout.nbytes * few / (few + 1))
    found["blocks of 64"] = _row(layers, *(size * scale for size in sizes))
    single = torch.rand(few, N, K, generator=torch.Generator().manual_seed(0)) < decoder.density
    mask = fm.Mask.weights(single)
    layout = TileLayout.from_bits(mask.index, N, K)
    more = (layout.nbytes - mask.index.nbytes) * few / (few + 1)
    sizes = (single.numel(), single.numel() / 8, mask.nbytes, more)
    found["single weights"] = _row(layers, *(size * scale for size in sizes))
    return found


def _row(layers: int, booleans: float, disk: float, attached: float, kernels: float) -> dict[str, float]:
    return {name: layers * size for name, size in zip(COLUMNS, (booleans, disk, attached, kernels), strict=True)}


COLUMNS = ("booleans", "on disk", "attached", "kernels, besides")


def _on_disk(subnets: fm.Subnetworks) -> int:
    """Bytes of the file, of which names and metadata are too few to matter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.safetensors"
        subnets.save(path)
        return path.stat().st_size


def activation_bytes(decoder: Decoder, tokens: int = 64) -> dict[str, float]:
    """Bytes that one layer keeps for its backward pass for each token, in bfloat16: dense, and one language a batch."""
    model: Any = decoder.one_layer("cpu")
    x = torch.randn(1, tokens, decoder.hidden, dtype=torch.bfloat16, requires_grad=True)
    known = [*model.parameters(), *model.buffers(), x]
    dense = saved_bytes(lambda: model(inputs_embeds=x)[0], known)
    names = decoder.names()[:1]
    fm.attach(model, fm.Subnetworks.random(model.config, names, decoder.density, seed=0, units="both"))
    masks = [
        tensor
        for layer in model.modules()
        if isinstance(layer, fm.MaskedLinear)
        for tensor in (layer.mask.index, layer.mask.extents)
    ]
    ids = torch.zeros(1, dtype=torch.int64)
    ours = saved_bytes(lambda: model(inputs_embeds=x, language_ids=ids)[0], [*known, *masks, ids])
    return {"dense": dense / tokens, "fastmask": ours / tokens}


def tables(decoder: Decoder) -> str:
    """The tables of PAPER.md."""
    L, gib = decoder.languages, 2**30
    masks, activations = mask_bytes(decoder), activation_bytes(decoder)
    lines = [
        f"{decoder.parameters / 1e9:.2f} billion parameters, {decoder.layers} layers of "
        f"{decoder.layer_parameters / 1e6:.0f} million; {L} languages that own {decoder.density:.0%} each. "
        "GiB of 2^30 bytes.",
        "",
        f"Masks of {L} languages, on every GPU (they are not sharded):",
        "",
        "| unit | as booleans | on disk | attached (`Mask`) | what the kernels make, besides |",
        "|---|---|---|---|---|",
    ]
    for unit, sizes in masks.items():
        lines.append(f"| {unit} | " + " | ".join(f"{sizes[name] / gib:.3g} GiB" for name in COLUMNS) + " |")
    attached = masks["heads + neurons"]["attached"]
    kept = {name: size * decoder.layers * TOKENS for name, size in activations.items()}
    gathered = 2 * decoder.layer_parameters  # bfloat16
    lines += [
        "",
        f"Training with AdamW in float32 ({ADAM} bytes a parameter), {TOKENS} tokens a GPU in bfloat16, heads + "
        "neurons; GiB on each GPU:",
        "",
        "| GPUs (FSDP) | weights, gradients, moments | masks | one gathered layer | activations, dense | the same, "
        "subnetworks |",
        "|---|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        needed = (
            ADAM * decoder.parameters / gpus, attached, gathered if gpus > 1 else 0, kept["dense"], kept["fastmask"],
        )  # fmt: skip
        lines.append(f"| {gpus} | " + " | ".join(f"{size / gib:.3g}" for size in needed) + " |")
    gradient = 4 * decoder.hidden * decoder.ffn
    lines += [
        "",
        f"For each token and layer autograd keeps {activations['dense'] / 1024:.0f} KiB dense and "
        f"{activations['fastmask'] / 1024:.0f} KiB with subnetworks. dW of one projection, summed over languages in "
        f"float32, takes {gradient / 2**20:.0f} MiB whatever the languages; a pass moves "
        f"{2 * decoder.parameters / gib:.3g} GiB of bfloat16 weights to every GPU under FSDP, dead or live.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Fill in PAPER.md."""
    replace_between(PAPER, BEGIN, END, tables(Decoder()))
    print(f"tables written into {PAPER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
