"""A tiny batch for a model that nothing is known of but its config: three examples that it may take."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EXAMPLES", "Inputs", "short", "tiny_batch", "working_inputs"]

Inputs = Mapping[str, Any]

EXAMPLES = 3
_TOKENS = 7


def working_inputs(model: nn.Module, example: Inputs | None = None) -> tuple[dict[str, Any] | None, str]:
    """Arguments that a plain model runs with, `example` if it is given; or None, and what the model said."""
    forward = inspect.signature(model.forward).parameters
    without_cache = {"use_cache": False} if "use_cache" in forward else {}
    failure = "no input that is known"
    for inputs in tiny_batch(model) if example is None else [dict(example)]:
        try:
            model(**inputs, **without_cache)
        except Exception as error:  # whatever a model's own code raises for an input it does not take
            failure = short(error)
        else:
            return {**inputs, **without_cache}, ""
    return None, failure


def short(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def tiny_batch(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments for a forward pass of three examples that the model may take, most likely ones first."""
    config: Any = getattr(model, "config", None)
    first = next(iter(model.parameters()))
    device, dtype = first.device, first.dtype
    generator, cpu = torch.Generator("cpu").manual_seed(1), torch.device("cpu")  # whatever the standing device is

    def tokens(length: int) -> Tensor:
        get: Any = getattr(model, "get_input_embeddings", None)
        embeddings: Any = None
        with contextlib.suppress(NotImplementedError):  # speech models have none
            embeddings = get() if get is not None else None
        size = getattr(embeddings, "num_embeddings", 0) or _setting(config, "vocab_size") or 16
        ids = torch.randint(min(4, size - 1), size, (EXAMPLES, length), generator=generator, device=cpu)
        end = _setting(config, "eos_token_id")
        if 0 < end < size:
            ids[:, -1] = end  # classifiers of some models read there
        return ids.to(device)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(EXAMPLES, *shape, generator=generator, device=cpu).to(device, dtype)

    extra = {"decoder_input_ids": tokens(_TOKENS - 2)} if getattr(config, "is_encoder_decoder", False) else {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_values":
        yield {main: numbers(4000), **extra}
    elif main == "input_features":
        sizes = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
        frames = 2 * _setting(config, "max_source_positions") or 64
        for size in filter(None, (_setting(config, name) for name in sizes)):
            yield {main: numbers(size, frames), **extra}
            yield {main: numbers(64, size), **extra}
    else:
        ids = tokens(_TOKENS)
        yield {"input_ids": ids, **extra}
        yield {"input_ids": ids}
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


def _setting(config: Any, name: str) -> int:
    """A number of a config, or of one of the configs in it; 0 if there is none."""
    places = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))] if config else []
    for place in places:
        value = getattr(place, name, None)
        if type(value) is int and value > 0:
            return value
    return 0
