"""PEFT beside masks: adapters on modules without masks work, adapters on masked ones are refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import batch, multiplied, tiny
from torch import nn

import fastmask as fm
from fastmask.models.attach import attached
from fastmask.models.editing import set_subnetwork

peft = pytest.importorskip("peft")

LANGUAGES = ["aa", "bb", "cc"]
IDS = [1, 0, -1, 2, 0]
QUERY = "bert.encoder.layer.0.attention.self.query"


def subnetworks(model, units="both"):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units=units)


def with_lora(model, *targets):
    """LoRA with adapters that are not zero; the same ones every time."""
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=list(targets), r=4, lora_alpha=8, init_lora_weights=False)
    return peft.get_peft_model(model, config).double().eval()


def merged(*targets):
    return with_lora(tiny("bert", "tokens"), *targets).merge_and_unload().eval()


def run(model, ids=IDS):
    return model(**batch(len(ids)), language_ids=torch.tensor(ids)).logits


def assert_equal(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", ["attach", "peft"])
def test_adapters_on_modules_without_masks(first):
    """Neurons are masked, query and value have adapters: outputs, gradients and detach are right, in either order."""
    model, targets = tiny("bert", "tokens"), ("query", "value")
    subnets = subnetworks(model, "neurons")
    if first == "attach":
        wrapped = with_lora(fm.attach(model, subnets), *targets)
    else:
        wrapped = with_lora(model, *targets)
        fm.attach(wrapped.get_base_model(), subnets)
    assert_equal(run(wrapped), multiplied(merged(*targets), subnets, batch(len(IDS)), IDS))
    with fm.language(wrapped, "bb"):
        found = wrapped(**batch(2)).logits
    assert_equal(found, multiplied(merged(*targets), subnets, batch(2), [1, 1]))
    run(wrapped).sum().backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in wrapped.named_parameters())
    fm.detach(wrapped)
    assert_equal(wrapped(**batch(2)).logits, merged(*targets)(**batch(2)).logits)
    assert sum("lora_" in name for name, _ in wrapped.named_parameters()) == 8


@pytest.mark.parametrize("targets", [("query", "value"), ("attention.output.dense",), ("intermediate.dense",)])
@pytest.mark.parametrize("ids", [[1, 0, -1], [-1, -1], [0, 0], [0, 1]], ids=str)
def test_adapters_on_masked_modules(targets, ids):
    """Adapters on packed modules are refused: their outputs would land on other heads."""
    wrapped = with_lora(fm.attach(tiny("bert", "tokens"), subnetworks(tiny("bert"))), *targets)
    with pytest.raises(ValueError, match=r"masked layer 'bert\..*' was wrapped in peft\.tuners\.lora\.layer\.Linear"):
        run(wrapped, ids)


def test_what_the_message_advises():
    """Taken off, the subnetworks run as before; merged, the adapters are in the weights behind the masks."""
    targets = ("query", "value")
    plain = tiny("bert", "tokens")
    subnets = subnetworks(plain)
    attached = with_lora(fm.attach(copy.deepcopy(plain), subnets), *targets).unload()
    assert_equal(run(attached), multiplied(plain, subnets, batch(len(IDS)), IDS))
    attached = with_lora(fm.attach(copy.deepcopy(plain), subnets), *targets).merge_and_unload()
    assert_equal(run(attached), multiplied(merged(*targets), subnets, batch(len(IDS)), IDS))
    assert_equal(fm.detach(attached)(**batch(2)).logits, merged(*targets)(**batch(2)).logits)


@pytest.mark.parametrize("how", ["the PEFT model", "its base model"])
def test_detach_under_adapters(how):
    """Detaching under adapters is refused before anything changes, and the message says how to remove them."""
    model = fm.attach(tiny("bert", "tokens"), subnetworks(tiny("bert")))
    wrapped = with_lora(model, "query", "value")
    modules = dict(wrapped.named_modules())
    with pytest.raises(ValueError, match=f"cannot detach: the masked layer '{QUERY}' is wrapped in peft.*unload"):
        fm.detach(wrapped if how == "the PEFT model" else model)
    assert dict(wrapped.named_modules()) == modules
    fm.detach(wrapped.unload())
    assert_equal(model(**batch(2)).logits, tiny("bert", "tokens")(**batch(2)).logits)


def test_attach_to_what_peft_has_wrapped():
    """The wrapper is refused by name; its model can be had, with masks around the adapters."""
    wrapped = with_lora(tiny("bert", "tokens"), "query", "value")
    subnets = subnetworks(tiny("bert"))
    with pytest.raises(ValueError, match=r"given PeftModel of PEFT: attach to the model inside, `peft_model\.get_base"):
        fm.attach(wrapped, subnets)
    with pytest.raises(ValueError, match="given LoraModel of PEFT"):
        fm.attach(wrapped.base_model, subnets)
    wanted = multiplied(merged("query", "value"), subnets, batch(len(IDS)), IDS)
    with pytest.warns(UserWarning, match=rf"masks are put around '{QUERY}', a peft\.tuners\.lora\.layer\.Linear"):
        fm.attach(wrapped.get_base_model(), subnets)
    assert_equal(run(wrapped), wanted)
    fm.detach(wrapped)
    plain = wrapped.merge_and_unload()
    assert_equal(run(fm.attach(plain, subnets)), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", [("query", "value"), ("attention.output.dense",), ("intermediate.dense", "key")])
def test_masks_around_adapters(targets):
    """W + BA is masked: forward, the adapters' gradients, another subnetwork, one more, and none."""
    wrapped, reference = with_lora(tiny("bert", "tokens"), *targets), with_lora(tiny("bert", "tokens"), *targets)
    subnets = subnetworks(tiny("bert"))
    fm.attach(wrapped.get_base_model(), subnets)
    assert_equal(run(wrapped), multiplied(merged(*targets), subnets, batch(len(IDS)), IDS))
    with fm.language(wrapped, "bb"):
        wrapped(**batch(2)).logits.square().sum().backward()
    row, base = 1, reference.get_base_model()
    for layer in range(2):
        stem = f"bert.encoder.layer.{layer}."
        heads, neurons = (keep[row, layer].double() for keep in (subnets.heads, subnets.neurons))
        for name in ("query", "key", "value"):
            base.get_submodule(f"{stem}attention.self.{name}").register_forward_hook(
                lambda module, args, y, keep=heads: y * keep.repeat_interleave(6)
            )
        base.get_submodule(f"{stem}attention.output.dense").register_forward_pre_hook(
            lambda module, args, keep=heads: (args[0] * keep.repeat_interleave(6),)
        )
        base.get_submodule(f"{stem}intermediate.dense").register_forward_hook(
            lambda module, args, y, keep=neurons: y * keep
        )
    reference(**batch(2)).logits.square().sum().backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, msg=lambda m, n=name: f"{n}: {m}")
    set_subnetwork(wrapped, "aa", heads=subnets.heads[2], neurons=subnets.neurons[2])
    fm.add_language(wrapped, "dd", subnets.select(["bb"]))
    assert_equal(run(wrapped, [0, 3]), multiplied(merged(*targets), subnets, batch(2), [2, 1]))
    assert_equal(run(copy.deepcopy(wrapped), [0, 3]), run(wrapped, [0, 3]))
    with pytest.raises(ValueError, match="cannot multiply a mask into"):
        fm.merge(wrapped, "aa")
    with pytest.raises(ValueError, match="was replaced by torch"):
        run(copy.deepcopy(wrapped).merge_and_unload())
    fm.detach(wrapped)
    assert_equal(wrapped(**batch(2)).logits, merged(*targets)(**batch(2)).logits)
    assert not any(module._forward_hooks for module in wrapped.modules())


def test_adapters_without_a_wrapper_around_the_model():
    """`add_adapter` of transformers puts them in like this."""
    model = fm.attach(tiny("bert", "tokens"), subnetworks(tiny("bert")))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)
    with pytest.raises(ValueError, match=f"masked layer '{QUERY}' was wrapped in peft"):
        run(model)


def test_modules_that_are_trained_beside_the_adapters():
    """`modules_to_save` of a masked module is refused, as the copy would run without its masks."""
    model = tiny("bert", "tokens")
    subnets = fm.Subnetworks(LANGUAGES, weights={"classifier": torch.rand(3, 2, 24) > 0.5})
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    wrapped = peft.get_peft_model(fm.attach(model, subnets), config)
    with pytest.raises(ValueError, match="masked layer 'classifier' was wrapped in peft"):
        run(wrapped)


def test_masks_under_an_adapter_by_name():
    """The layer inside an adapter is a linear layer like others: a mask over its weights leaves the adapter alone."""
    wrapped = with_lora(tiny("bert", "tokens"), "query")
    keep = torch.rand(3, 24, 24) > 0.5
    base = wrapped.get_base_model()
    fm.attach(base, fm.Subnetworks(LANGUAGES, weights={f"{QUERY}.base_layer": keep}))
    reference = with_lora(tiny("bert", "tokens"), "query")
    for position, language in enumerate([2, 0]):
        layer = reference.get_base_model().get_submodule(f"{QUERY}.base_layer")
        layer.weight = nn.Parameter(base.get_submodule(f"{QUERY}.base_layer").weight.detach() * keep[language])
        wanted = reference(**batch(2)).logits[position]
        assert_equal(run(wrapped, [2, 0])[position], wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saving_without_masks_warns(tmp_path):
    """PEFT writes adapters; the masks below them go beside those by a call of their own."""
    base = tiny("bert", "tokens").float()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    subnets = subnetworks(model, "neurons")
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    adapted = peft.get_peft_model(fm.attach(model, subnets), config).eval()
    with pytest.warns(UserWarning, match="adapters without the masks"):
        adapted.save_pretrained(tmp_path / "adapted")
    fm.save_pretrained(adapted, tmp_path / "adapted", weights=False)
    again = peft.PeftModel.from_pretrained(fm.from_pretrained(tmp_path / "adapted"), tmp_path / "adapted")
    assert attached(again).subnets == subnets
    torch.testing.assert_close(run(again.eval()), run(adapted))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_prompts_without_masks_warn(tmp_path):
    """What PEFT trains beside a model, with no layer of its own inside of it."""
    base = tiny("bert", "tokens").float()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    prompts = peft.PromptTuningConfig(
        task_type="TOKEN_CLS", num_virtual_tokens=2, token_dim=24, num_attention_heads=4, num_layers=2
    )
    adapted = peft.get_peft_model(fm.attach(model, subnetworks(model, "neurons")), prompts)
    with pytest.warns(UserWarning, match="adapters without the masks"):
        adapted.save_pretrained(tmp_path / "adapted")
    fm.save_pretrained(adapted, tmp_path / "adapted", weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*not packed")
        fm.from_pretrained(tmp_path / "adapted")


def test_freezing_and_saving_with_masks_around_adapters(tmp_path):
    """Adapters would be frozen with what no mask touches; and saved under names that plain loading leaves out."""
    wrapped = with_lora(tiny("bert", "tokens"), "query")
    model = wrapped.get_base_model()
    fm.freeze_unmasked(fm.attach(model, subnetworks(model, "heads")))
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and "query" in name} == {
        "default"
    }
    assert not model.classifier.weight.requires_grad
    with pytest.raises(ValueError, match=r"cannot save weights with an adapter between them .*0.attention.self.query"):
        fm.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
