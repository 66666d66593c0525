"""Masked layers are reached however a model is called: by the models inside of it, `generate`, pipelines, hooks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from tiny_models import batch, multiplied, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

import fastmask as fm
from fastmask.models.attach import attached, is_attached

LANGUAGES = ["de", "fi", "sw"]
IDS = [1, -1, 0]
INPUTS = batch(3)
INNER = {
    "bert": ("tokens", lambda model: model.bert),
    "roberta": ("tokens", lambda model: model.base_model),
    "distilbert": ("tokens", lambda model: model.base_model),
    "llama": ("causal", lambda model: model.model),
    "qwen3": ("causal", lambda model: model.get_decoder()),
}


def subnetworks(model):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")


def pair_of(model_type, head):
    plain = tiny(model_type, head)
    return plain, fm.attach(copy.deepcopy(plain), subnetworks(plain))


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_type", INNER)
def test_the_model_under_a_head(model_type):
    """It takes languages as the whole model does, with the same numbers, gradients and errors."""
    head, inside = INNER[model_type]
    plain, model = pair_of(model_type, head)
    bare = inside(plain)
    wanted = multiplied(bare, subnetworks(plain), INPUTS, IDS)
    for said in ({"languages": ["fi", None, "de"]}, {"language_ids": torch.tensor(IDS)}):
        assert_close(inside(model)(**INPUTS, **said)[0], wanted)
    wanted.square().sum().backward()
    inside(model)(**INPUTS, language_ids=IDS)[0].square().sum().backward()
    for (name, p), q in zip(inside(model).named_parameters(), bare.parameters(), strict=True):
        assert (p.grad is None) is (q.grad is None), name
        if p.grad is not None:
            assert_close(p.grad, q.grad)
    fm.set_language(model, "fi")
    assert_close(inside(model)(**INPUTS)[0], multiplied(bare, subnetworks(plain), INPUTS, [1] * 3))
    assert_close(inside(model)(**INPUTS, language="sw")[0], multiplied(bare, subnetworks(plain), INPUTS, [2] * 3))
    with pytest.raises(KeyError, match="unknown language 'fin'; did you mean 'fi'"):
        inside(model)(**INPUTS, language="fin")
    with fm.language(model, "de"), pytest.raises(ValueError, match="use one of the two"):
        inside(model)(**INPUTS, language="fi")


def test_hidden_states_of_an_encoder():
    """`get_encoder()` of an encoder is a module, and no model of transformers: it takes languages, too."""
    _, model = pair_of("bert", "tokens")
    hidden = torch.randn(3, 5, 24).double()
    with fm.language(model, "fi"):
        wanted = model.get_encoder()(hidden)[0]
    assert_close(model.get_encoder()(hidden, language="fi")[0], wanted)


def test_a_cache_that_an_inner_model_fills():
    """Each head keeps its slot: another language, and the whole model, continue it as weights times masks would."""
    _, model = pair_of("llama", "causal")
    tokens = INPUTS["input_ids"]
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for run, cache in zip((model, model.model), caches, strict=True):
        run(input_ids=tokens[:, :4], past_key_values=cache, languages=["fi", None, "de"])
    found = [
        model(input_ids=tokens[:, 4:], past_key_values=cache, languages=["sw", "sw", None]).logits for cache in caches
    ]
    assert_close(found[1], found[0])
    alone = DynamicCache(config=model.config)
    model.model(input_ids=tokens[:1, :4], past_key_values=alone, language="fi")
    assert_close(model(input_ids=tokens[:1, 4:], past_key_values=alone, language="sw").logits, found[0][:1])


def test_it_belongs_to_the_whole_model():
    """The inner model has the languages of the outer one, and is not detached, or attached to, by itself."""
    _, model = pair_of("bert", "tokens")
    assert is_attached(model.bert)
    assert attached(model.bert) is attached(model)
    wanted = model(**INPUTS, language="fi")[0]
    with fm.language(model.bert, "fi"):
        assert_close(model(**INPUTS)[0], wanted)
    fm.set_language(model.bert, "fi")
    assert_close(model(**INPUTS)[0], wanted)
    with pytest.raises(ValueError, match="cannot detach this BertModel: it is inside of the model"):
        fm.detach(model.bert)
    with pytest.raises(ValueError, match="has subnetworks attached already"):
        fm.attach(model.bert, subnetworks(model))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copy.copy])
def test_copies(how):
    """A copy's inner model is that of the copy; after detach, classes are those of transformers."""
    plain, model = pair_of("llama", "causal")
    copied = how(model)
    assert_close(copied.model(**INPUTS, language="fi")[0], model.model(**INPUTS, language="fi")[0])
    assert attached(copied.model) is attached(copied)
    fm.detach(copied)
    assert type(copied) is type(plain)
    assert type(copied.model) is type(plain.model)
    assert not [name for name, module in copied.named_modules() if "_fastmask" in str([*vars(module)])]
    assert type(copied).forward.__qualname__ == type(plain).forward.__qualname__


class TestNestedCalls:
    def test_a_hook_that_calls_the_model(self):
        """Another language inside of a pass, by argument, leaves that of the pass alone."""
        plain, model = pair_of("bert", "bare")
        inner = []

        def ask(*_):
            handle.remove()
            inner.append(model(**INPUTS, language="de")[0])

        handle = model.encoder.layer[0].register_forward_hook(ask)
        assert_close(model(**INPUTS, language="fi")[0], multiplied(plain, subnetworks(plain), INPUTS, [1] * 3))
        assert_close(inner[0], multiplied(plain, subnetworks(plain), INPUTS, [0] * 3))

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_pass_that_ends_with_an_error(self, error):
        """Its languages end with it, also where a notebook is interrupted."""
        _, model = pair_of("bert", "tokens")

        def fail(*_):
            raise error("here")

        handle = model.bert.encoder.layer[1].register_forward_hook(fail)
        for run in (model, model.bert):
            with pytest.raises(error, match="here"):
                run(**INPUTS, language="fi")
        handle.remove()
        assert attached(model).router.running.route is None
        with pytest.raises(ValueError, match="no language was given"):
            model(**INPUTS)

    def test_hooks_of_the_model_see_its_own_arguments(self):
        """Hooks and forwards of others are given what the plain model takes."""
        _, model = pair_of("llama", "causal")
        seen = []
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
        model(**INPUTS, language="fi")
        assert seen == [["attention_mask", "input_ids", "use_cache"]]


# ---- transformers' own tools


@pytest.fixture(scope="module")
def tokenizer():
    words = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "</s>", *[f"w{i}" for i in range(3, 50)]])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>", model_max_length=40
    )


def in_finnish(model, run):
    """A run under `fm.language`, then under `fm.set_language`."""
    with fm.language(model, "fi"):
        first = run()
    fm.set_language(model, "fi")
    second = run()
    fm.set_language(model)
    return first, second


def test_pipelines(tokenizer):
    """A pipeline runs in the language around it, or in the standing one; `generate` also takes one by name."""
    texts = ["w5 w6 w7", "w8 w9"]
    _, model = pair_of("llama", "causal")
    options = {"max_new_tokens": 4, "do_sample": False}
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    first, second = in_finnish(model, lambda: generate(texts, **options))
    prompt = torch.tensor([tokenizer("w8 w9")["input_ids"]])
    wanted = model.generate(prompt, language="fi", pad_token_id=0, **options)
    assert first == second == generate(texts, language="fi", **options)
    text = tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert first[1][0]["generated_text"].replace(" ", "") == text.replace(" ", "")
    _, model = pair_of("bert", "tokens")
    classify = pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu")
    first, second = in_finnish(model, lambda: classify(texts[0]))
    inputs = tokenizer(texts[0], return_tensors="pt")
    scores = model(input_ids=inputs["input_ids"], language="fi").logits.softmax(-1).max(-1).values[0]
    for found in (first, second):
        torch.testing.assert_close(torch.tensor([one["score"] for one in found]).double(), scores, rtol=1e-6, atol=1e-6)


def test_continuous_batching():
    """All requests in the standing language; several are refused with the reason."""
    _, model = pair_of("llama", "causal")
    model.float()
    prompts = [[5, 6, 7], [8, 9]]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    if (config_class := getattr(transformers, "ContinuousBatchingConfig", None)) is None:
        pytest.skip("this version of transformers has no ContinuousBatchingConfig")
    small = config_class(num_blocks=8, block_size=8, max_batch_tokens=16)
    options, found = {"generation_config": config, "continuous_batching_config": small, "warmup": False}, {}
    for name in ("fi", None):
        fm.set_language(model, name)
        made = model.generate_batch(prompts, **options)
        found[name] = [one.generated_tokens for one in made.values()]
        for prompt, tokens in zip(prompts, found[name], strict=True):
            alone = model.generate(torch.tensor([prompt]), generation_config=config, language=name)
            assert alone[0, len(prompt) :].tolist() == tokens
    assert found["fi"] != found[None]
    with pytest.raises(ValueError, match=r"continuous batching .* runs in that of `fastmask\.set_language"):
        model.generate_batch(prompts, **options, languages=["fi", "de"])
    with fm.language(model, "fi"), pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch(prompts, **options)


@pytest.mark.parametrize("model_type", ["t5", "m2m_100"])
def test_generating_with_an_encoder_and_a_decoder(model_type):
    """`generate` calls the encoder by itself, with the languages of the call; each row is as if it were alone."""
    sizes = {"d_model": 16, "vocab_size": 40, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 39}
    if model_type == "t5":
        config = AutoConfig.for_model("t5", d_kv=4, d_ff=12, num_layers=2, num_heads=4, **sizes)
        names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.k"]
    else:
        shape = {"layers": 2, "attention_heads": 4, "ffn_dim": 12}
        both = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in shape.items()}
        config = AutoConfig.for_model("m2m_100", max_position_embeddings=40, **both, **sizes)
        names = ["model.encoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.encoder_attn.k_proj"]
    torch.manual_seed(0)
    plain = AutoModelForSeq2SeqLM.from_config(config)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    plain = plain.double().eval()
    keep = {name: torch.rand(3, *plain.get_submodule(name).weight.shape) > 0.7 for name in names}
    model = fm.attach(copy.deepcopy(plain), fm.Subnetworks(LANGUAGES, weights=keep))
    prompts, options = torch.randint(3, 39, (3, 6)), {"max_new_tokens": 5, "do_sample": False}
    for more in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        wanted = []
        for prompt, language in zip(prompts, IDS, strict=True):
            alone = copy.deepcopy(plain)
            for name in names if language >= 0 else []:
                alone.get_submodule(name).weight.data.mul_(keep[name][language])
            found = alone.generate(prompt[None], **options, **more)
            wanted.append(torch.nn.functional.pad(found, (0, 6 - found.shape[1])))
        found = model.generate(prompts, languages=["fi", None, "de"], **options, **more)
        assert torch.equal(torch.nn.functional.pad(found, (0, 6 - found.shape[1])), torch.cat(wanted))
    states = model.get_encoder()(prompts, languages=["fi", None, "de"])[0]
    for row, (prompt, language) in enumerate(zip(prompts, IDS, strict=True)):
        alone = copy.deepcopy(plain)
        for name in names if language >= 0 else []:
            alone.get_submodule(name).weight.data.mul_(keep[name][language])
        assert_close(states[row : row + 1], alone.get_encoder()(prompt[None])[0])
