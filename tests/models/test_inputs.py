"""Inputs that are not one row for each example: choices, tokens of several languages in a row, packed sequences."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import DECODER, DECODERS, ENCODER, batch, multiplied, tiny, unit_masks
from torch.nn import functional
from transformers import AutoConfig, AutoModelForMultipleChoice, DataCollatorWithFlattening, DynamicCache

import fastmask as fm

LANGUAGES = ["aa", "bb", "cc"]
TOKENS = torch.tensor([[0, 0, 1, 1, -1, 2, 2], [1, 1, 1, 2, 2, 0, -1], [0, 2, 0, 2, 0, 2, 0]])


def subnetworks(model, units="both"):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units=units)


def multiple_choice(model_type):
    config = AutoConfig.for_model(model_type, **(DECODER if model_type in DECODERS else ENCODER))
    torch.manual_seed(0)
    model = AutoModelForMultipleChoice.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def gradients(model, y):
    model.zero_grad()
    weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype).view(y.shape).cos()
    (y * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, wanted, what=None):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


def assert_all_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert_close(grad, wanted[name], name)


# ---- choices


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("how", ["input_ids", "positional", "inputs_embeds"])
def test_multiple_choice(model_type, how):
    """[B, choices, T] is B * choices examples inside: outputs and gradients are those of each question's language."""
    plain = multiple_choice(model_type)
    model, subnets, ids = fm.attach(copy.deepcopy(plain), subnetworks(plain)), subnetworks(plain), [2, 0, -1, 1]
    flat = batch(4 * 3)
    inputs = {name: value.view(4, 3, -1) for name, value in flat.items()}
    if how == "inputs_embeds":
        embed = plain.get_input_embeddings()
        inputs["inputs_embeds"] = embed(inputs.pop("input_ids")).detach()
    wanted = multiplied(plain, subnets, inputs, ids)
    first = [inputs.pop("input_ids")] if how == "positional" else []
    wanted_grads = gradients(plain, wanted)
    for said in ({"language_ids": torch.tensor(ids)}, {"languages": ["cc", "aa", None, "bb"]}):
        found = model(*first, **inputs, **said).logits
        assert_close(found, wanted)
        assert_all_close(gradients(model, found), wanted_grads)


def test_a_language_for_each_choice():
    """Ids [B, choices], and of every choice's every token [B, choices, T]."""
    plain = multiple_choice("bert")
    model, ids = fm.attach(copy.deepcopy(plain), subnetworks(plain)), torch.tensor([[0, 1, 2], [2, -1, 0]])
    flat = batch(6)
    inputs = {name: value.view(2, 3, -1) for name, value in flat.items()}
    singly = {name: value[:, None] for name, value in flat.items()}
    wanted = multiplied(plain, subnetworks(plain), singly, ids.flatten().tolist()).view(2, 3)
    assert_close(model(**inputs, language_ids=ids).logits, wanted)
    assert_close(model(**inputs, language_ids=ids.flatten()).logits, wanted)
    assert_close(model(**inputs, language_ids=ids[:, :, None].expand(2, 3, 7)).logits, wanted)
    with pytest.raises(ValueError, match=r"for each token of \[6, 7\], given language_ids of shape \[3, 2\]"):
        model(**inputs, language_ids=ids.T)


# ---- tokens


def with_masks_of_tokens(plain, subnets, ids):
    """The plain model, each of whose masked projections multiplies its weights by the mask of every single token."""
    model, masks = copy.deepcopy(plain), {}
    for language in range(len(LANGUAGES)):
        for name, mask in unit_masks(model, subnets, language).items():
            masks.setdefault(name, {})[language] = mask

    def of_tokens(name):
        def forward(module, args, _):
            y = 0
            for language in (-1, *range(len(LANGUAGES))):
                weight = module.weight * masks[f"{name}.weight"].get(language, 1)
                bias = module.bias
                if bias is not None:
                    bias = bias * masks.get(f"{name}.bias", {}).get(language, 1)
                y = y + functional.linear(args[0], weight, bias) * (ids == language)[..., None]
            return y

        return forward

    for name, module in model.named_modules():
        if f"{name}.weight" in masks:
            module.register_forward_hook(of_tokens(name))
    return model


@pytest.mark.parametrize("units", ["both", "heads", "neurons"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("model_type", "head"), [("bert", "tokens"), ("llama", "causal"), ("qwen3", "causal")])
def test_tokens_of_several_languages_in_a_row(model_type, head, attention, units, every_way):
    """Each token's projections are those of its language; a head that is dead for it gives zeros there."""
    plain = tiny(model_type, head, attention)
    subnets = subnetworks(plain, units)
    oracle = with_masks_of_tokens(plain, subnets, TOKENS)
    model = fm.attach(copy.deepcopy(plain), subnets)
    inputs = batch(3)
    wanted = oracle(**inputs).logits
    found = model(**inputs, language_ids=TOKENS).logits
    assert_close(found, wanted)
    assert_all_close(gradients(model, found), gradients(oracle, wanted))


def test_tokens_of_one_language():
    """Ids of tokens that say the same for a whole batch, or a row, give what ids of examples give."""
    model = tiny("bert")
    fm.attach(model, subnetworks(model))
    inputs = batch(3)
    for ids in ([1, 1, 1], [2, 0, -1]):
        ids = torch.tensor(ids)
        assert_close(model(**inputs, language_ids=ids[:, None].expand(3, 7))[0], model(**inputs, language_ids=ids)[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_tokens_under_gradient_checkpointing(use_reentrant):
    """What is recomputed has the ids of its tokens."""
    model = tiny("bert", "tokens").train()
    fm.attach(model, subnetworks(model))

    def found():
        return gradients(model, model(**batch(3), language_ids=TOKENS).logits)

    wanted = found()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_all_close(found(), wanted)


def test_tokens_compiled():
    """Without a graph break."""
    torch._dynamo.reset()
    model = tiny("bert", num_hidden_layers=1)
    fm.attach(model, subnetworks(model))
    ids = TOKENS.clamp(min=0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**batch(3), language_ids=ids)[0], model(**batch(3), language_ids=ids)[0])


def test_tokens_beside_a_cache():
    """A cache that was filled by tokens of several languages holds every head in its slot."""
    plain = tiny("llama", "causal")
    subnets = subnetworks(plain)
    model, oracle = fm.attach(copy.deepcopy(plain), subnets), with_masks_of_tokens(plain, subnets, TOKENS)
    tokens = batch(3)["input_ids"]
    wanted = oracle(input_ids=tokens).logits
    cache = DynamicCache(config=model.config)
    first = model(input_ids=tokens[:, :4], past_key_values=cache, language_ids=TOKENS[:, :4]).logits
    rest = model(input_ids=tokens[:, 4:], past_key_values=cache, language_ids=TOKENS[:, 4:]).logits
    assert_close(torch.cat([first, rest], 1), wanted)
    with pytest.raises(ValueError, match=r"for each token of \[3, 1\], given language_ids of shape \[3, 7\]"):
        model.generate(tokens, language_ids=TOKENS, max_new_tokens=3, pad_token_id=0)


def test_layers_that_do_not_run_for_each_token():
    """A masked layer that sees one vector of each example cannot have ids of tokens."""
    model = tiny("bert")
    masks = fm.Subnetworks(LANGUAGES, weights={"pooler.dense": torch.rand(3, 24, 24) > 0.5})
    fm.attach(model, masks)
    with pytest.raises(ValueError, match=r"one id for each token of \[3, 7\], but a masked layer was given \[3, 24\]"):
        model(**batch(3), language_ids=TOKENS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sequences_packed_into_one_row(attention):
    """A collator that puts all examples into one row: each is computed as if it were alone, in its language."""
    plain = tiny("llama", "causal", attention)
    subnets = subnetworks(plain)
    model = fm.attach(copy.deepcopy(plain), subnets)
    examples = [
        {"input_ids": [5, 6, 7, 8], "language": "bb"},
        {"input_ids": [9, 10], "language": None},
        {"input_ids": [11, 12, 13], "language": "aa"},
    ]
    packed = fm.LanguageCollator(DataCollatorWithFlattening(), model)(examples)
    assert packed["language_ids"].tolist() == [[1, 1, 1, 1, -1, -1, 0, 0, 0]]
    alone = [
        multiplied(plain, subnets, {"input_ids": torch.tensor([example["input_ids"]])}, [language])[0]
        for example, language in zip(examples, [1, -1, 0], strict=True)
    ]
    assert_close(model(**packed).logits[0], torch.cat(alone))


def test_ids_that_fit_nothing():
    """Neither one for each example nor one for each token."""
    model = tiny("bert")
    fm.attach(model, subnetworks(model))
    with pytest.raises(ValueError, match=r"for each token of \[3, 7\], given language_ids of shape \[7, 3\]"):
        model(**batch(3), language_ids=TOKENS.T)
    with pytest.raises(ValueError, match=r"given language_ids of shape \[3, 7, 1\]"):
        model(**batch(3), language_ids=TOKENS[..., None])


def test_choices_under_gradient_checkpointing():
    """Choices that are recomputed have the language of their question."""
    model = multiple_choice("bert").train()
    fm.attach(model, subnetworks(model))
    inputs = {name: value.view(2, 3, -1) for name, value in batch(6).items()}

    def found():
        return gradients(model, model(**inputs, language_ids=torch.tensor([2, 0])).logits)

    wanted = found()
    for use_reentrant in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert_all_close(found(), wanted)


def test_three_dimensions_that_are_no_choices():
    """Tokens of several codebooks, [B, T, codebooks], are one example each: ids stay as they are."""

    class Codebooks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.dense = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8)

        def forward(self, input_ids):
            return self.dense(self.embed(input_ids).sum(2))

    model, tokens = Codebooks(), torch.arange(24).view(2, 4, 3) % 9
    keep = torch.rand(3, 8, 8) > 0.5
    states, linear = model.embed(tokens).sum(2), model.dense
    wanted = [functional.linear(x, linear.weight * keep[i], linear.bias) for x, i in zip(states, [2, 0], strict=True)]
    fm.attach(model, fm.Subnetworks(LANGUAGES, weights={"dense": keep}))
    torch.testing.assert_close(model(tokens, language_ids=[2, 0]), torch.stack(wanted))
