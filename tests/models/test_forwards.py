"""A forward that was kept, or put on the instance, works whatever is attached: accelerate and Trainer do both."""

from __future__ import annotations

import copy
import functools
import inspect

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
    """A plain forward that is put back after attach becomes the attached one, which knows `language_ids`."""
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
    """What wraps the plain forward is told no languages, and needs none; what wraps that of attach may be."""
    model = tiny("llama")
    plain = model.forward
    fm.attach(model, subnetworks(model))
    attached = model.forward
    for inner in (plain, attached):
        model.forward = functools.wraps(inner)(lambda *args, inner=inner, **kwargs: inner(*args, **kwargs))
        assert_close(model(**inputs, language_ids=IDS)[0], masked)
        with fm.language(model, "bb"):
            assert_close(model(**inputs)[0][:1], masked[:1])
        with pytest.raises(ValueError, match="no language was given"):
            model(**inputs)
    assert_close(model.forward(**inputs, language_ids=IDS)[0], masked)


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
    """A model that was prepared in half precision runs its forward under autocast, and is told the languages."""
    model = tiny("llama").float()
    attached = fm.attach(copy.deepcopy(model), subnetworks(model))
    with torch.autocast("cpu", torch.bfloat16):
        expected = attached(**inputs, language_ids=IDS)[0].float()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    fm.attach(prepared, subnetworks(model))
    assert torch.equal(prepared(**inputs, language_ids=IDS)[0], expected)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert_close(unwrapped(**inputs, language_ids=IDS)[0], masked, 1e-4)


def test_generating_with_a_model_that_was_prepared_first():
    """Its forward shows the old signature, by which `generate` judges arguments; a language around it is none."""
    model = tiny("llama", "causal").float()
    prompt, options = batch(2)["input_ids"], {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    attached = fm.attach(copy.deepcopy(model), subnetworks(model))
    with torch.autocast("cpu", torch.bfloat16):
        expected = attached.generate(prompt, language="bb", **options)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    fm.attach(prepared, subnetworks(model))
    with fm.language(prepared, "bb"):
        assert torch.equal(prepared.generate(prompt, **options), expected)
    with pytest.raises(ValueError, match=r"not used by the model.*language"):
        prepared.generate(prompt, language="bb", **options)


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


# ---- hooks of accelerate: devices, offload


def offloaded(model, folder):
    """One layer on the "disk", the rest in memory; the weights of that layer are there only while it runs."""
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    stack = "layers" if model.config.model_type == "llama" else "encoder.layer"
    names = {name for name, module in model.named_modules() if not name.startswith(f"{base}{stack.split('.')[0]}")}
    places = {name: "cpu" for name in names if name and f"{name}." != base}
    places |= {f"{base}{stack}.0": "cpu", f"{base}{stack}.1": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


HOOKS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device="cpu"),
    "device_map": offloaded,
    "dispatch": lambda model, folder: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
}


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@pytest.mark.parametrize("how", HOOKS)
def test_hooks_of_accelerate_before_attach(tmp_path, inputs, how, model_type):
    """Masked layers take them over, with weights that are only there while a layer runs; detach gives them back."""
    model = tiny(model_type)
    plain, masked = model(**inputs)[0], multiplied(model, subnetworks(model), inputs, IDS.tolist())
    HOOKS[how](model, tmp_path)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    for _ in range(2):
        fm.attach(model, subnetworks(model))
        assert "language_ids" in inspect.signature(model.forward).parameters
        assert_close(model(**inputs, language_ids=IDS)[0], masked)
        with fm.language(model, "bb"):
            assert_close(model(**inputs)[0][:1], masked[:1])
        fm.detach(model)
        assert "language_ids" not in inspect.signature(model.forward).parameters
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        assert_close(model(**inputs)[0], plain)
    remove_hook_from_submodules(model)
    assert_close(model(**inputs)[0], plain)
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]


@pytest.mark.parametrize("how", HOOKS)
def test_hooks_of_accelerate_that_are_taken_off_while_attached(tmp_path, inputs, plain, masked, how):
    """The model then has its weights in memory again, with masks and without."""
    model = tiny("llama")
    HOOKS[how](model, tmp_path)
    fm.attach(model, subnetworks(model))
    remove_hook_from_submodules(model)
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert_close(model(**inputs, language_ids=IDS)[0], masked)
    fm.detach(model)
    assert not [name for name, module in model.named_modules() if "_hf_hook" in vars(module)]
    assert_close(model(**inputs)[0], plain)


@pytest.mark.parametrize("how", HOOKS)
def test_hooks_of_accelerate_after_attach(tmp_path, inputs, plain, masked, how):
    """Projections that are computed together are computed one by one where their weights come one by one."""
    model = tiny("llama")
    fm.attach(model, subnetworks(model))
    HOOKS[how](model, tmp_path)
    assert_close(model(**inputs, language_ids=IDS)[0], masked)
    remove_hook_from_submodules(model)
    assert_close(fm.detach(model)(**inputs)[0], plain)


def test_generating_with_offloaded_weights(tmp_path):
    """The hook of a model that was offloaded first shows the languages that its forward takes."""
    model = tiny("llama", "causal")
    prompt, options = batch(2)["input_ids"], {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = fm.attach(copy.deepcopy(model), subnetworks(model)).generate(prompt, languages=["bb", "aa"], **options)
    fm.attach(HOOKS["device_map"](model, tmp_path), subnetworks(model))
    assert torch.equal(model.generate(prompt, languages=["bb", "aa"], **options), wanted)


def test_loaded_with_a_device_map(tmp_path, inputs):
    """A model that was never in memory as a whole."""
    whole = tiny("llama", "causal")
    masked = multiplied(whole, subnetworks(whole), inputs, IDS.tolist())
    whole.save_pretrained(tmp_path / "model")
    places = {"lm_head": "cpu", "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload"), dtype=torch.float64
    )
    fm.attach(model, subnetworks(model))
    assert_close(model(**inputs, language_ids=IDS)[0], masked)


def test_hooks_of_accelerate_on_masked_layers_only(inputs, masked):
    """A model without a hook of its own, whose layers have some."""
    model = tiny("llama")
    accelerate.cpu_offload(model.layers[0].self_attn.q_proj, execution_device="cpu")
    fm.attach(model, subnetworks(model))
    assert_close(model(**inputs, language_ids=IDS)[0], masked)


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
