"""The languages of a call, by name or by number, given in the call, around it, or for the model."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from tiny_models import batch, multiplied, tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import OPTConfig, OPTModel, WhisperConfig, WhisperForConditionalGeneration

import fastmask as fm
from fastmask.models.attach import attached

LANGUAGES = ["de", "fi", "sw"]
IDS = [1, -1, 0, 1]
NAMES = ["fi", None, "de", "fi"]
INPUTS = batch(4)
WAYS = {
    "names": {"languages": NAMES},
    "a tuple of names": {"languages": tuple(NAMES)},
    "int64": {"language_ids": torch.tensor(IDS)},
    "int32": {"language_ids": torch.tensor(IDS, dtype=torch.int32)},
    "a list of ints": {"language_ids": IDS},
    "an array of names": {"languages": np.array(NAMES, dtype=object)},
    "an array of numbers": {"language_ids": np.array(IDS)},
}


def subnetworks(model):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")


@pytest.fixture(params=["bert", "llama"])
def pair(request):
    """A plain model, and the same with subnetworks."""
    plain = tiny(request.param)
    return plain, fm.attach(copy.deepcopy(plain), subnetworks(plain))


@pytest.fixture
def model():
    plain = tiny("bert")
    return fm.attach(plain, subnetworks(plain))


def answer(plain, *ids):
    return multiplied(plain, subnetworks(plain), {k: v[: len(ids)] for k, v in INPUTS.items()}, list(ids))


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_a_mixed_batch(pair, way):
    """Each way to say the languages of a batch gives what weights times masks give."""
    plain, model = pair
    assert_close(model(**INPUTS, **WAYS[way])[0], answer(plain, *IDS))
    assert_close(model.forward(**INPUTS, **WAYS[way])[0], answer(plain, *IDS))


@pytest.mark.parametrize(("name", "number"), [("fi", 1), (None, -1)])
def test_one_language_for_the_batch(pair, name, number):
    """`language=` is for all examples; None is the full network, also where another language stands."""
    plain, model = pair
    fm.set_language(model, "sw")
    assert_close(model(**INPUTS, language=name)[0], answer(plain, *[number] * 4))


def test_gradients_by_name(pair):
    """Names train what ids train."""
    _, model = pair
    grads = []
    for way in ({"languages": NAMES}, {"language_ids": torch.tensor(IDS)}):
        model.zero_grad()
        model(**INPUTS, **way)[0].square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_generate_by_name():
    """`generate` takes names, and repeats them for beams and for several sequences of one prompt."""
    plain = tiny("llama", "causal")
    model = fm.attach(copy.deepcopy(plain), subnetworks(plain))
    prompts = batch(2)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 49}
    for more in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        alone = []
        for prompt, name in zip(prompts, ["fi", "sw"], strict=True):
            alone.append(model.generate(prompt[None], language=name, **options, **more))
        length = max(y.shape[1] for y in alone)
        alone = torch.cat([torch.nn.functional.pad(y, (0, length - y.shape[1])) for y in alone])
        for way in ({"languages": ["fi", "sw"]}, {"language_ids": [1, 2]}, {"language_ids": torch.tensor([1, 2])}):
            assert torch.equal(model.generate(prompts, **way, **options, **more), alone)


class TestStandingLanguage:
    def test_what_comes_before_what(self, pair):
        """A call's own languages, then `fm.language`, then the standing one; taken off, none is left."""
        plain, model = pair
        fm.set_language(model, "de")
        assert_close(model(**INPUTS)[0], answer(plain, 0, 0, 0, 0))
        with fm.language(model, "fi"):
            assert_close(model(**INPUTS)[0], answer(plain, 1, 1, 1, 1))
        with fm.language(model, None):
            assert_close(model(**INPUTS)[0], answer(plain, -1, -1, -1, -1))
        assert_close(model(**INPUTS, languages=NAMES)[0], answer(plain, *IDS))
        fm.set_language(model, None)
        assert_close(model(**INPUTS)[0], answer(plain, -1, -1, -1, -1))
        fm.set_language(model)
        with pytest.raises(ValueError, match=r"no language was given.*fastmask\.set_language\(model"):
            model(**INPUTS)

    def test_layers_that_are_called_by_themselves(self, model):
        """A masked layer that is reached without its model has the standing language, as inside of `fm.language`."""
        dense, x = model.encoder.layer[0].output.dense, torch.randn(1, 2, 20).double()
        with fm.language(model, "fi"):
            wanted = dense(x)
        fm.set_language(model, "fi")
        assert torch.equal(dense(x), wanted)
        fm.set_language(model)
        with pytest.raises(RuntimeError, match="outside the forward pass"):
            dense(x)

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_and_pickles_keep_it(self, model, how):
        """It is of the model; a copy's is its own from then on."""
        fm.set_language(model, "fi")
        wanted, copied = model(**INPUTS)[0], how(model)
        assert torch.equal(copied(**INPUTS)[0], wanted)
        fm.set_language(copied, "de")
        assert torch.equal(model(**INPUTS)[0], wanted)
        assert torch.equal(copied(**INPUTS)[0], model(**INPUTS, language="de")[0])

    def test_every_thread_sees_it(self, model):
        """Unlike `fm.language`, which is of the context that enters it."""
        fm.set_language(model, "fi")
        found = []
        thread = threading.Thread(target=lambda: found.append(model(**INPUTS)[0]))
        thread.start()
        thread.join()
        assert torch.equal(found[0], model(**INPUTS, language="fi")[0])

    def test_detach_forgets_it(self, model):
        """Subnetworks that are attached later begin without one."""
        fm.set_language(model, "fi")
        subnets = attached(model).subnets
        fm.attach(fm.detach(model), subnets)
        with pytest.raises(ValueError, match="no language was given"):
            model(**INPUTS)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpoints_recompute_under_that_of_the_forward_pass(self, model, use_reentrant):
        """What is set between the forward and the backward pass does not reach what is recomputed."""
        model.train()
        fm.set_language(model, "fi")
        hidden = torch.randn(2, 7, 24).double().requires_grad_()

        def gradients(run, then):
            model.zero_grad()
            fm.set_language(model, "fi")
            y = run(hidden).square().sum()
            fm.set_language(model, *then)
            y.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        def encoder(x):
            return model.encoder(x)[0]

        def checkpointed(x):
            return checkpoint(encoder, x, use_reentrant=use_reentrant)

        wanted = gradients(encoder, ["fi"])
        for then in (["de"], []):
            found = gradients(checkpointed, then)
            assert found.keys() == wanted.keys()
            for name, grad in found.items():
                assert_close(grad, wanted[name])

    def test_compiled(self, model):
        """A compiled model follows it, and is traced once for each."""
        torch._dynamo.reset()
        count = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, fullgraph=True, backend=count)
        for name in ("de", "fi", None, "de"):
            fm.set_language(model, name)
            assert_close(compiled(**INPUTS)[0], model(**INPUTS, language=name)[0])
        assert count.frame_count == 3


class TestCompiled:
    @pytest.fixture
    def model(self):
        """Each layer takes a second to trace, and there is nothing new in the next one."""
        plain = tiny("bert", num_hidden_layers=1)
        return fm.attach(plain, subnetworks(plain))

    def test_names(self, model):
        """The languages of a call by name are traced; ids of any mix are one graph, whatever is counted beside them."""
        torch._dynamo.reset()
        count = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, fullgraph=True, backend=count)
        assert_close(compiled(**INPUTS, language="fi")[0], model(**INPUTS, language="fi")[0])
        names = ["fi", "sw", "de", "de"]
        assert_close(compiled(**INPUTS, languages=names)[0], model(**INPUTS, languages=names)[0])
        before = count.frame_count
        collate = fm.LanguageCollator(lambda examples: {}, model)
        for some in (names, ["fi"] * 4, ["de", "sw", "de", "sw"]):
            told = collate([{"language": name} for name in some])
            assert_close(compiled(**INPUTS, **told)[0], model(**INPUTS, languages=some)[0])
        assert count.frame_count == before + 1

    def test_in_place(self, model):
        """`model.compile()` traces the forward, which must find the languages that it is called with."""
        torch._dynamo.reset()
        compiled = copy.deepcopy(model)
        compiled.compile(fullgraph=True, backend=(count := CompileCounterWithBackend("eager")))
        for ids in ([0, 1, 2, 0], [2, 2, 2, 2], [1, 0, 1, 0]):
            ids = torch.tensor(ids)
            assert_close(compiled(**INPUTS, language_ids=ids)[0], model(**INPUTS, language_ids=ids)[0])
        assert count.frame_count == 1


class TestBadInput:
    """Each error names what was given and what was expected, before anything is computed."""

    def test_unknown_names(self, model):
        for call in (
            lambda: model(**INPUTS, language="fin"),
            lambda: model(**INPUTS, languages=["de", "fin", "de", "de"]),
            lambda: fm.set_language(model, "fin"),
        ):
            with pytest.raises(KeyError, match="unknown language 'fin'; did you mean 'fi'"):
                call()
        with pytest.raises(KeyError, match="unknown language 'FI'; did you mean 'fi'"):
            model(**INPUTS, language="FI")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"language": "fi", "languages": ["fi"] * 4}, "language and languages were given: use one of them"),
            ({"language": None, "language_ids": IDS}, "language and language_ids were given"),
            ({"languages": "fi"}, "expected languages as a list of names .*one for each example, given 'fi'"),
            ({"languages": {"fi", "de"}}, "given set"),
            ({"languages": [1, 0, 1, 0]}, "expected the name of a language .*given int"),
            ({"languages": ["fi", "de"]}, r"one language id for each of the 4 examples, given .*\(2,\)"),
            ({"language": 1}, "expected the name of a language .*given int"),
            ({"language_ids": NAMES}, r"expected language_ids as an int64 tensor .*names go in languages=\[\.\.\.\]"),
            ({"language_ids": 1}, "expected language_ids as an int64 tensor .*given int"),
            ({"language_ids": [1.0, 0.0, 1.0, 0.0]}, r"given torch\.float32 of shape \(4,\)"),
            ({"language_ids": torch.ones(4, dtype=torch.bool)}, r"given torch\.bool"),
            ({"language_ids": [True, False, True, False]}, r"given torch\.bool"),
            ({"language_ids": torch.tensor(1)}, r"given torch\.int64 of shape \(\)"),
            ({"language_ids": [0, 1, 2, 3]}, "language id 3 is out of range: expected 0 to 2"),
            ({"language_ids": [0, 1, 2, -2]}, "language id -2 is out of range"),
            ({"language_ids": np.array(NAMES)}, "expected language_ids as an int64 tensor .*given list of "),
            ({"language_ids": np.ones(4)}, r"given torch\.float32 of shape \(4,\)"),
            ({"language_ids": []}, r"given language_ids of shape \(0,\)"),
        ],
    )
    def test_values(self, model, given, message):
        with pytest.raises(ValueError, match=message):
            model(**INPUTS, **given)
        assert attached(model).router.running.route is None

    def test_inside_of_a_block(self, model):
        for given in ({"language": "fi"}, {"languages": NAMES}, {"language_ids": IDS}):
            with fm.language(model, "fi"), pytest.raises(ValueError, match="use one of the two"):
                model(**INPUTS, **given)

    def test_detached(self):
        model = tiny("llama")
        fm.attach(model, subnetworks(model))
        model.forward = model.forward
        fm.detach(model)
        with pytest.raises(ValueError, match="no subnetworks are attached to this LlamaModel, but languages was given"):
            model(**INPUTS, languages=NAMES)


@pytest.mark.parametrize("given", [[0, 1], [0] * 8, []], ids=str)
def test_as_many_ids_as_examples_where_a_model_flattens_tokens(given):
    """OPT's feed-forward layers see tokens only: half as many ids as examples must not be spread over them."""
    config = OPTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, vocab_size=11, word_embed_proj_dim=8
    )
    model = fm.attach(OPTModel(config), fm.Subnetworks.random(config, ["de", "fi"], 0.5, seed=0, units="neurons"))
    ids = torch.tensor(given, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"each of the 4 examples, given language_ids of shape \({len(given)},\)"):
        model(input_ids=torch.ones(4, 3, dtype=torch.int64), language_ids=ids)


def whisper():
    """A multilingual one, with languages of its own, and masks of two that are not those."""
    torch.manual_seed(0)
    sizes = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    lengths = dict(max_source_positions=10, max_target_positions=20, num_mel_bins=4)
    tokens = dict(vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
    widths = dict(encoder_ffn_dim=24, decoder_ffn_dim=24, init_std=1.0)
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **lengths, **tokens, **widths)).double().eval()
    for name, value in {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 4, "<|fi|>": 5},
        "task_to_id": {"transcribe": 6, "translate": 7},
        "no_timestamps_token_id": 8,
    }.items():
        setattr(model.generation_config, name, value)
    model.generation_config.forced_decoder_ids = None
    return fm.attach(model, fm.Subnetworks.random(model, ["fi", "sw"], 0.5, seed=1, units="neurons"))


@pytest.mark.filterwarnings("ignore")
def test_generate_with_an_argument_language_of_its_own():
    """Whisper's `language=` is a token to begin with; `languages=`, a block and a standing one say which network."""
    model, sound = whisper(), torch.randn(2, 4, 20, dtype=torch.float64)
    networks = {"fi": fm.merge(model, "fi"), "sw": fm.merge(model, "sw")}
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = {
        (network, token): found.generate(sound, language=token, **options)
        for network, found in networks.items()
        for token in ("fi", "en", None)
    }
    assert len({tuple(found.flatten().tolist()) for found in alone.values()}) > 2
    for token in ("fi", "en", None):  # None: detected in a pass of its own, before any other
        with pytest.raises(ValueError, match=r"`language` of WhisperFor.* is that model's own.* languages="):
            model.generate(sound, language=token, **options)
        found = model.generate(sound, language=token, languages=["sw", "fi"], **options)
        for row, network in enumerate(("sw", "fi")):
            wanted = alone[network, token][row]
            assert torch.equal(found[row][: len(wanted)], wanted)
        fm.set_language(model, "sw")
        assert torch.equal(model.generate(sound, language=token, **options), alone["sw", token])
        fm.set_language(model)
        with fm.language(model, "fi"):
            assert torch.equal(model.generate(sound, language=token, **options), alone["fi", token])
    assert torch.equal(model.generate(sound, languages=["fi", "fi"], **options), alone["fi", None])
    # Of sound longer than a window, rows that have come to their end are dropped.
    long, options = torch.randn(2, 4, 60, dtype=torch.float64), {**options, "return_timestamps": True}
    options["attention_mask"] = torch.ones(2, 60)
    options["attention_mask"][0, 25:] = 0
    wanted = networks["sw"].generate(long, **options)
    assert torch.equal(model.generate(long, languages=["sw", "sw"], **options), wanted)
    with pytest.raises(ValueError, match=r"that model's own.*fastmask.set_language"):
        model.generate(sound, **options)
