"""A forward that was kept, or put on the instance, works whatever is attached: accelerate and Trainer do both."""

from __future__ import annotations

import copy
import functools

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from datasets import Dataset
from tiny_models import batch, multiplied, tiny
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fastmask as fm

LANGUAGES = ["aa", "bb"]
IDS = torch.tensor([1, 0])


def subnetworks(model):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")


@pytest.fixture(autouse=True)
def new_accelerators():
    """Accelerators of one process must have one precision, and other tests have made theirs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def inputs():
    return batch(2)


@pytest.fixture
def plain(inputs):
    """What the model computes without masks."""
    return tiny("llama")(**inputs)[0]


@pytest.fixture
def masked(inputs):
    """What it computes with them."""
    model = tiny("llama")
    return multiplied(model, subnetworks(model), inputs, IDS.tolist())


def assert_close(found, wanted, tolerance=1e-9):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_kept_while_attached_and_used_after_detach(inputs, plain, masked):
    """The plain model runs, also from the instance; a language is then an error and not ignored."""
    model = tiny("llama")
    fm.attach(model, subnetworks(model))
    model.forward = kept = model.forward
    assert_close(model(**inputs, language_ids=IDS)[0], masked)
    fm.detach(model)
    assert_close(kept(**inputs)[0], plain)
    assert_close(model(**inputs)[0], plain)
    with pytest.raises(ValueError, match="no subnetworks are attached to this LlamaModel, but language_ids was given"):
        model(**inputs, language_ids=IDS)
    fm.attach(model, subnetworks(model))
    assert_close(kept(**inputs, language_ids=IDS)[0], masked)
    assert_close(model(**inputs, language_ids=IDS)[0], masked)


def test_kept_before_attach_and_put_back_after_it(inputs, plain, masked):
    """It becomes the attached forward: `language_ids` would vanish in the model's **kwargs."""
    model = tiny("llama")
    kept = model.forward
    fm.attach(model, subnetworks(model))
    model.forward = kept
    assert_close(model(**inputs, language_ids=IDS)[0], masked)
    with fm.language(model, "bb"):
        assert_close(model(**inputs)[0][:1], masked[:1])
        with pytest.raises(ValueError, match="use one of the two"):
            model(**inputs, language_ids=IDS)
    with pytest.raises(ValueError, match="no language was given"):
        model(**inputs)
    fm.detach(model)
    assert_close(model(**inputs)[0], plain)


def test_wrapped_before_attach_and_put_on_after_it(inputs, masked):
    """What wraps the plain forward would drop `language_ids`, and is refused; what wraps that of attach is not."""
    model = tiny("llama")
    wrapped = functools.wraps(model.forward)(lambda *args, **kwargs: None)
    fm.attach(model, subnetworks(model))
    with pytest.raises(ValueError, match="this forward was wrapped before attach, and would drop language_ids"):
        model.forward = wrapped
    assert "forward" not in vars(model)
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    assert_close(model(**inputs, language_ids=IDS)[0], masked)


def test_prepare_in_half_precision_then_detach_then_attach(inputs):
    """`Accelerator.prepare` keeps a forward under autocast on the instance, for good."""
    model = tiny("llama").float()
    plain, attached = copy.deepcopy(model), fm.attach(copy.deepcopy(model), subnetworks(model))
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_plain = attached(**inputs, language_ids=IDS)[0].float(), plain(**inputs)[0].float()
    prepared = accelerator.prepare(fm.attach(model, subnetworks(model)))
    for _ in range(2):
        assert torch.equal(prepared(**inputs, language_ids=IDS)[0], expected)
        fm.detach(prepared)
        assert torch.equal(prepared(**inputs)[0], expected_plain)
        fm.attach(prepared, subnetworks(model))
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**inputs, language_ids=IDS)[0], attached(**inputs, language_ids=IDS)[0])
    assert torch.equal(fm.detach(unwrapped)(**inputs)[0], plain(**inputs)[0])


def test_prepared_first(inputs, masked):
    """The masked layers of a model that was prepared in half precision would not be told the languages."""
    model = tiny("llama")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    with pytest.raises(ValueError, match=r"forward of this LlamaModel has been replaced, as `Accelerator\.prepare`"):
        fm.attach(prepared, subnetworks(model))
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert "forward" in vars(unwrapped)
    fm.attach(unwrapped, subnetworks(model))
    assert_close(unwrapped(**inputs, language_ids=IDS)[0], masked)


def test_a_model_that_trainer_trained_in_half_precision(tmp_path):
    """After the Trainer, detach gives the plain model with the weights of training."""
    model = tiny("bert", "tokens").float()
    fm.attach(model, subnetworks(model))
    rows = {"input_ids": [[5] * 6] * 8, "labels": [[0] * 6] * 8, "language_ids": [0, 1] * 4}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=Dataset.from_dict(rows)).train()
    fm.detach(model).eval()
    plain = tiny("bert", "tokens").float()
    plain.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(**batch(2)).logits.float()
    assert torch.equal(model(**batch(2)).logits, expected)
    fm.attach(model, subnetworks(model))(**batch(2), language_ids=IDS)


def test_hooks_of_accelerate_before_attach(inputs, masked):
    """They hide the forward of attach; taken off, they leave a model that can be attached to."""
    model = tiny("llama")
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"replaced, as .* offload do.*remove_hook_from_submodules\(model\)"):
        fm.attach(model, subnetworks(model))
    remove_hook_from_submodules(model)
    fm.attach(model, subnetworks(model))
    assert_close(model(**inputs, language_ids=IDS)[0], masked)


def test_loaded_with_a_device_map(tmp_path):
    """A model spread over two places has hooks that hide the forward of attach."""
    tiny("llama", "causal").save_pretrained(tmp_path / "model")
    places = {"lm_head": "cpu", "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    with pytest.raises(ValueError, match=r"forward of this LlamaForCausalLM has been replaced, as .* device_map"):
        fm.attach(model, subnetworks(model))


def test_hooks_of_accelerate_on_masked_layers_only(inputs):
    """A model without a hook of its own, whose layers have some."""
    model = tiny("llama")
    accelerate.cpu_offload(model.layers[0].self_attn.q_proj, execution_device="cpu")
    with pytest.raises(ValueError, match=r"cannot mask 'layers\.0\.self_attn\.q_proj': its forward has been replaced"):
        fm.attach(model, subnetworks(model))


def test_dispatched_after_attach(inputs, plain, masked):
    """A model spread over devices keeps all its weights there; detach says what must be taken off."""
    model = tiny("llama")
    fm.attach(model, subnetworks(model))
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert_close(model(**inputs, language_ids=IDS)[0], masked)
    with pytest.raises(ValueError, match=r"cannot detach, and lose what hangs on 'layers\.0\.self_attn\.q_proj'"):
        fm.detach(model)
    remove_hook_from_submodules(model)
    assert_close(model(**inputs, language_ids=IDS)[0], masked)
    assert_close(fm.detach(model)(**inputs)[0], plain)


def test_offloaded_after_attach(inputs):
    """Weights that come one layer at a time are not there when projections are computed together."""
    model = tiny("llama")
    fm.attach(model, subnetworks(model))
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"'layers\.0\.self_attn\.q_proj' is offloaded by accelerate"):
        model(**inputs, language_ids=IDS)


def test_offloaded_under_weight_masks(inputs):
    """Layers that are computed alone may be offloaded."""
    model = tiny("llama")
    name = "layers.1.self_attn.o_proj"
    subnets = fm.Subnetworks(LANGUAGES, weights={name: torch.rand(2, 24, 48) > 0.5})
    whole = fm.attach(tiny("llama"), subnets)(**inputs, language_ids=IDS)[0]
    accelerate.cpu_offload(fm.attach(model, subnets), execution_device="cpu")
    assert_close(model(**inputs, language_ids=IDS)[0], whole)


def test_one_class_for_all_models_of_a_class():
    """Models that are attached one after the other, or again, have one class."""
    models = [fm.attach(tiny("llama"), subnetworks(tiny("llama"))) for _ in range(2)]
    assert type(models[0]) is type(models[1])
    again = fm.attach(fm.detach(models[0]), subnetworks(models[0]))
    assert type(again) is type(models[1])
    assert type(again).__name__ == "LlamaModel"
