"""Quantisation beside masks: of modules without masks it works, of masked ones it is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import batch, multiplied, tiny
from torch import nn

import fastmask as fm
from fastmask.models.layers import AttachedLinear

LANGUAGES = ["aa", "bb", "cc"]
IDS = [1, 0, -1, 2]
QUERY = "encoder.layer.0.attention.self.query"


def subnetworks(units="both"):
    return fm.Subnetworks.random(tiny("bert").config, LANGUAGES, 0.5, seed=3, units=units)


def run(model):
    return model(**batch(len(IDS)), language_ids=torch.tensor(IDS))[0]


def torchao(model, only=lambda module, name: isinstance(module, nn.Linear)):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=only)
    return model


def quanto(model, **options):
    library = pytest.importorskip("optimum.quanto")
    library.quantize(model, weights=library.qint8, **options)
    library.freeze(model)
    return model


def bitsandbytes(model):
    library = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            made = library.nn.Linear8bitLt(module.in_features, module.out_features, has_fp16_weights=False)
            made.load_state_dict(module.state_dict())
            model.set_submodule(name, made)
    return model.to("cpu")


def bitsandbytes_of_4_bits(model):
    library = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            made = library.nn.Linear4bit(module.in_features, module.out_features, quant_type="nf4")
            made.load_state_dict(module.state_dict())
            model.set_submodule(name, made)
    return model.to("cpu")  # quantises


@pytest.mark.parametrize("quantise", [torchao, quanto, bitsandbytes, bitsandbytes_of_4_bits])
class TestEveryLibrary:
    """Whole models."""

    def test_before_attach(self, quantise):
        """The operators cannot read such weights: they run as they are, with masks around them."""
        model = quantise(tiny("bert").float())
        plain, subnets = model(**batch(2))[0], subnetworks()
        with pytest.warns(UserWarning, match=f"masks are put around '{QUERY}', a .*Linear"):
            fm.attach(model, subnets)
        found = run(model)
        for position, language in enumerate(IDS):
            reference = quantise(tiny("bert").float())
            for layer in range(2) if language >= 0 else ():
                stem = f"encoder.layer.{layer}."
                heads, neurons = (keep[language, layer].float() for keep in (subnets.heads, subnets.neurons))
                masks = {f"attention.self.{name}": heads.repeat_interleave(6) for name in ("query", "key", "value")}
                for name, keep in {**masks, "intermediate.dense": neurons}.items():
                    reference.get_submodule(stem + name).register_forward_hook(
                        lambda module, args, y, keep=keep: y * keep
                    )
            example = {name: value[position : position + 1] for name, value in batch(len(IDS)).items()}
            torch.testing.assert_close(found[position : position + 1], reference(**example)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fm.detach(model)(**batch(2))[0], plain)

    def test_after_attach(self, quantise):
        """A masked layer that was quantised is noticed; after detach the quantised model is plain."""
        model = quantise(fm.attach(tiny("bert").float(), subnetworks()))
        with pytest.raises(
            ValueError, match=f"masked layer '{QUERY}' (was replaced by .*(QLinear|8bitLt|4bit)|became .*Int8Tensor)"
        ):
            run(model)
        expected = quantise(tiny("bert").float())(**batch(2))[0]
        torch.testing.assert_close(fm.detach(model)(**batch(2))[0], expected)

    def test_after_detach(self, quantise):
        """What was attached before leaves nothing that is in the way."""
        model = quantise(fm.detach(fm.attach(tiny("bert").float(), subnetworks())))
        expected = quantise(tiny("bert").float())(**batch(2))[0]
        torch.testing.assert_close(model(**batch(2))[0], expected)


def assert_right(model):
    """The model equals a plain one with its quantised weights rounded likewise and the others multiplied by masks."""
    plain, rounded = tiny("bert"), 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor:
            plain.get_submodule(name).weight.data = module.weight.dequantize().double()
            rounded += 1
    assert rounded
    expected = multiplied(plain, subnetworks("neurons"), batch(len(IDS)), IDS)
    torch.testing.assert_close(run(model).double(), expected, rtol=1e-4, atol=1e-4)


def test_torchao_on_what_has_no_mask():
    """What the message advises."""
    assert_right(torchao(fm.attach(tiny("bert").float(), subnetworks("neurons")), lambda m, name: type(m) is nn.Linear))


def test_quantised_before_attach_where_nothing_is_masked():
    """Quantised layers without masks are no obstacle."""
    model = torchao(tiny("bert").float(), lambda module, name: name.endswith(("query", "key", "value")))
    assert_right(fm.attach(model, subnetworks("neurons")))


def test_quanto_on_what_has_no_mask():
    """What the message advises."""
    model = fm.attach(tiny("bert").float(), subnetworks("neurons"))
    masked = [name for name, module in model.named_modules() if isinstance(module, AttachedLinear)]
    assert_right(quanto(model, exclude=masked))
