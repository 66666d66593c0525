"""A cache of keys and values holds what W * mask puts there, whoever continues it, and whatever rows are left of it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny, unit_masks
from transformers import DynamicCache, StaticCache

import fastmask as fm
from fastmask.models.editing import set_subnetwork

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

LANGUAGES = ("narrow", "wide", "other", "none")
TOKENS = torch.randint(5, 50, (6, 8), generator=torch.Generator().manual_seed(2))
FULL = -1


def subnetworks(model):
    """Of one, two and one of three groups of heads; the last language has none in the first layer."""
    subnets = fm.Subnetworks.random(model.config, LANGUAGES, 0.5, 3, units="both")
    heads = torch.zeros_like(subnets.heads)
    heads[0, :, 0], heads[1, :, 1:], heads[2, :, 2], heads[3, 1, :2] = True, True, True, True
    return fm.Subnetworks(LANGUAGES, heads, subnets.neurons)


class Pair:
    """An attached decoder, and for each language a plain one with its weights multiplied by the masks."""

    def __init__(self, model_type="llama", **changes):
        plain = tiny(model_type, "causal", **changes)
        subnets = subnetworks(plain)
        self.dense = {FULL: plain}
        for language in range(len(LANGUAGES)):
            self.dense[language] = copy.deepcopy(plain)
            for name, multiplier in unit_masks(plain, subnets, language).items():
                self.dense[language].get_parameter(name).data *= multiplier
        self.model = fm.attach(copy.deepcopy(plain), subnets)

    def cache(self):
        return DynamicCache(config=self.model.config)

    def wanted(self, rows, *passes):
        """Logits of the last pass (languages of the rows, from, to); each row has a cache of its own."""
        logits = []
        for position, row in enumerate(rows):
            cache = self.cache()
            for languages, start, stop in passes:
                dense = self.dense[languages[position]]
                out = dense(TOKENS[row : row + 1, start:stop], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
        return torch.cat(logits)

    def run(self, cache, languages, rows, start, stop, **options):
        ids = torch.tensor(languages)
        tokens = TOKENS[list(rows), start:stop]
        return self.model(tokens, past_key_values=cache, language_ids=ids, **options).logits


@pytest.fixture(scope="module")
def llama():
    return Pair()


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3", "bert"])
def pair(request):
    return Pair(request.param, **({"is_decoder": True} if request.param == "bert" else {}))


def assert_equal(y, wanted):
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)


def heads_in(cache):
    return [layer.keys.shape[1] for layer in cache.layers]


@pytest.mark.parametrize("after", [0, 1, 2, 3, FULL])
@pytest.mark.parametrize("before", [0, 1, 3, FULL])
@pytest.mark.parametrize("pair", ["llama", "qwen3", "bert"], indirect=True)
def test_continued_under_another_language(pair, before, after):
    """A cache can be continued under another language: each head is in its own slot."""
    cache = pair.cache()
    with fm.language(pair.model, None if before == FULL else LANGUAGES[before]):
        pair.model(TOKENS[:2, :4], past_key_values=cache, use_cache=True)
    with fm.language(pair.model, None if after == FULL else LANGUAGES[after]):
        for start, stop in ((4, 5), (5, 8)):
            logits = pair.model(TOKENS[:2, start:stop], past_key_values=cache, use_cache=True).logits
    assert_equal(logits, pair.wanted((0, 1), ([before] * 2, 0, 4), ([after] * 2, 4, 5), ([after] * 2, 5, 8)))


def test_rows_of_the_widest_language_are_dropped(llama):
    """A batch that has lost its widest language continues its cache."""
    cache, before = llama.cache(), [0, 1, 2, FULL, 0]
    llama.run(cache, before, range(5), 0, 4)
    for rows in ((0, 1, 2, 4), (0, 4)):
        kept = list(rows) if len(rows) == 4 else [0, 3]
        cache.batch_select_indices(torch.tensor(kept))
        languages = [before[row] for row in rows]
        start = cache.get_seq_length()
        logits = llama.run(cache, languages, rows, start, start + 1)
    passes = ([before[0], before[4]], 0, 4), ([0, 0], 4, 5), ([0, 0], 5, 6)
    assert_equal(logits, llama.wanted((0, 4), *passes))


def test_rows_of_a_batch_join_and_change_places(llama):
    """A mixed batch continues rows that others have filled, in another order."""
    cache, before = llama.cache(), [0, 1, 2]
    llama.run(cache, before, range(3), 0, 4)
    order = [2, 0, 0, 1]
    cache.reorder_cache(torch.tensor(order))
    after = [1, 0, FULL, 3]
    logits = llama.run(cache, after, order, 4, 6)
    assert_equal(logits, llama.wanted(order, ([before[row] for row in order], 0, 4), (after, 4, 6)))


class TestPacked:
    def test_one_language_from_the_start(self, llama):
        """One language's cache is as narrow as its heads, and stays right when rows are dropped."""
        cache = llama.cache()
        llama.run(cache, [0, 0, 0], range(3), 0, 3)
        cache.batch_select_indices(torch.tensor([2, 0]))
        llama.run(cache, [0, 0], (2, 0), 3, 4)
        cache.reorder_cache(torch.tensor([1, 0, 0]))
        with fm.language(llama.model, "narrow"):
            logits = llama.model(TOKENS[[0, 2, 2], 4:6], past_key_values=cache).logits
        assert heads_in(cache) == [1, 1]
        assert_equal(logits, llama.wanted((0, 2, 2), ([0] * 3, 0, 3), ([0] * 3, 3, 4), ([0] * 3, 4, 6)))

    def test_a_prefix_is_copied_and_continued_by_many(self, llama):
        """A copy knows that it is packed, and unpacking one leaves the others."""
        prefix = llama.cache()
        with torch.no_grad():
            llama.run(prefix, [1], [0], 0, 4)
        for language in (1, 0, FULL, 1, 3):
            cache = copy.deepcopy(prefix)
            llama.run(cache, [language], [0], 4, 6)
            logits = llama.run(cache, [language], [0], 6, 8)
            assert heads_in(cache) == ([2, 2] if language == 1 else [3, 3])
            assert_equal(logits, llama.wanted([0], ([1], 0, 4), ([language], 4, 6), ([language], 6, 8)))
        assert heads_in(prefix) == [2, 2]

    def test_back_to_the_first_language(self, llama):
        """A cache that was unpacked stays so when its first language comes back."""
        cache = llama.cache()
        for language, start in ((0, 0), (1, 2), (0, 4)):
            logits = llama.run(cache, [language], [0], start, start + 2)
        assert_equal(logits, llama.wanted([0], ([0], 0, 2), ([1], 2, 4), ([0], 4, 6)))

    def test_emptied_and_filled_again(self, llama):
        """A cache that was reset is read by what it holds now."""
        cache = llama.cache()
        llama.run(cache, [0], [0], 0, 4)
        cache.reset()
        llama.run(cache, [1, 0], (1, 2), 0, 4)
        assert_equal(llama.run(cache, [1, 2], (1, 2), 4, 6), llama.wanted((1, 2), ([1, 0], 0, 4), ([1, 2], 4, 6)))

    def test_a_subnetwork_that_changed_meanwhile(self):
        """Heads in a cache are those the language had when they were put there."""
        pair = Pair()
        cache = pair.cache()
        pair.run(cache, [0], [0], 0, 4)
        heads = torch.tensor([[False, False, True], [True, True, False]])
        set_subnetwork(pair.model, "narrow", heads=heads)
        logits = pair.run(cache, [0], [0], 4, 6)
        subnets, plain = pair.model._fastmask.subnets, pair.dense[FULL]
        changed = copy.deepcopy(plain)
        for name, multiplier in unit_masks(plain, subnets, 0).items():
            changed.get_parameter(name).data *= multiplier
        cache = pair.cache()
        pair.dense[0](TOKENS[:1, :4], past_key_values=cache)
        assert_equal(logits, changed(TOKENS[:1, 4:6], past_key_values=cache).logits)

    def test_made_of_the_tensors_of_another(self, llama):
        """A cache of packed heads that no longer says which heads they are is refused, and not changed."""
        cache = llama.cache()
        llama.run(cache, [0], [0], 0, 4)
        rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        with pytest.raises(ValueError, match=r"the cache holds 1 \(key/value\) heads in a layer, expected 3"):
            llama.run(rebuilt, [0], [0], 4, 6)
        assert heads_in(rebuilt) == [1, 1]
        assert rebuilt.get_seq_length() == 4

    def test_gradients_through_a_cache(self, llama):
        """Gradients flow through a cache that is unpacked."""

        def gradient(model, first, second, **options):
            model.zero_grad()
            cache = llama.cache()
            with fm.language(model, "narrow") if options else torch.enable_grad():
                first(TOKENS[:2, :4], past_key_values=cache)
            with fm.language(model, "wide") if options else torch.enable_grad():
                second(TOKENS[:2, 4:], past_key_values=cache).logits.square().sum().backward()
            return model.model.layers[0].self_attn.k_proj.weight.grad

        found = gradient(llama.model, llama.model, llama.model, attached=True).clone()
        one = gradient(llama.dense[0], llama.dense[0], llama.dense[1])
        two = llama.dense[1].model.layers[0].self_attn.k_proj.weight.grad
        masks = [unit_masks(llama.dense[FULL], llama.model._fastmask.subnets, i) for i in (0, 1)]
        name = "model.layers.0.self_attn.k_proj.weight"
        assert_equal(found, one * masks[0][name] + two * masks[1][name])


@pytest.mark.parametrize("kind", ["static", "made_by_the_model", "positional", "sliding"])
def test_other_caches(llama, kind):
    """Every kind of cache, handed over in any way, is known to hold heads for others."""
    pair = Pair("mistral", sliding_window=3) if kind == "sliding" else llama
    model, before, after = pair.model, [0, 0], [0, 1]
    if kind == "made_by_the_model":
        cache = model(TOKENS[:2, :4], use_cache=True, language_ids=torch.tensor(before)).past_key_values
    else:
        cache = StaticCache(config=model.config, max_cache_len=8) if kind == "static" else pair.cache()
        pair.run(cache, before, range(2), 0, 4)
    if kind == "positional":
        logits = model(TOKENS[:2, 4:6], None, None, cache, language_ids=torch.tensor(after)).logits
    else:
        logits = pair.run(cache, after, range(2), 4, 6)
    assert_equal(logits, pair.wanted(range(2), (before, 0, 4), (after, 4, 6)))


def test_no_cache_unless_asked_for(llama):
    """No pass makes a cache that was not asked for, or computes dead heads for it."""
    model, ids = llama.model, torch.tensor([0, 0])
    widths = []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *a: widths.append(a[-1].shape[-1]))
    assert model(TOKENS[:2], language_ids=ids).past_key_values is None
    assert model(TOKENS[:2], None, None, None, None, None, None, language_ids=ids).past_key_values is None
    assert model(TOKENS[:2], use_cache=False, language_ids=ids).past_key_values is None
    assert model(TOKENS[:2], use_cache=True, language_ids=ids).past_key_values.get_seq_length() == 8
    handle.remove()
    assert widths == [8, 8, 8, 24]


def test_heads_of_size_one():
    """Heads of one feature are heads, and go into the cache in their slots."""
    pair = Pair("bert", is_decoder=True, hidden_size=4)
    assert pair.model.bert.encoder.layer[0].attention.self.key.unit == 1
    cache = pair.cache()
    pair.run(cache, [0, 1], range(2), 0, 4, use_cache=True)
    logits = pair.run(cache, [2, 0], range(2), 4, 6, use_cache=True)
    assert_equal(logits, pair.wanted(range(2), ([0, 1], 0, 4), ([2, 0], 4, 6)))


def test_around_the_forward(llama):
    """The base model, called by itself, fills a cache that any language can continue."""
    cache = llama.cache()
    with fm.language(llama.model, "narrow"):
        llama.model.model(TOKENS[:1, :4], past_key_values=cache)
    with fm.language(llama.model, "wide"):
        hidden = llama.model.model(TOKENS[:1, 4:6], past_key_values=cache)[0]
    assert_equal(llama.model.lm_head(hidden), llama.wanted([0], ([0], 0, 4), ([1], 4, 6)))


@pytest.mark.parametrize("filled", [pytest.param("packed", marks=pytest.mark.slow), "compiled"])
@pytest.mark.parametrize("after", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_compiled(llama, filled, after):
    """A compiled model reads caches, packed or not, and fills them in slots."""
    torch._dynamo.reset()
    compiled = torch.compile(llama.model, backend="eager")
    first, cache = llama.model if filled == "packed" else compiled, llama.cache()
    with fm.language(llama.model, "narrow"):
        first(TOKENS[:2, :4], past_key_values=cache)
    with fm.language(llama.model, LANGUAGES[after]):
        logits = compiled(TOKENS[:2, 4:6], past_key_values=cache).logits
    assert_equal(logits, llama.wanted(range(2), ([0] * 2, 0, 4), ([after] * 2, 4, 6)))


OPTIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "no_cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("how", OPTIONS)
def test_generate_for_a_mixed_batch(pair, how):
    """Each prompt of a mixed batch is continued as its language alone would, beam by beam."""
    options = {"max_new_tokens": 6, "pad_token_id": 0, **OPTIONS[how]}
    languages = [0, 1, FULL, 2, 0]
    found = pair.model.generate(TOKENS[:5, :4], language_ids=torch.tensor(languages), **options)
    for row, language in enumerate(languages):
        assert torch.equal(found[row : row + 1], pair.dense[language].generate(TOKENS[row : row + 1, :4], **options))


def test_generate_by_sampling(llama):
    """A seed gives the text that W * mask gives, and dead heads are not computed."""
    options = {"max_new_tokens": 6, "do_sample": True, "pad_token_id": 0, "num_return_sequences": 2}
    with fm.language(llama.model, "wide"):
        torch.manual_seed(0)
        found = llama.model.generate(TOKENS[:2, :4], return_dict_in_generate=True, **options)
    torch.manual_seed(0)
    assert torch.equal(found.sequences, llama.dense[1].generate(TOKENS[:2, :4], **options))
    assert heads_in(found.past_key_values) == [2, 2]


def test_generate_after_a_prefix(llama):
    """A system prompt that the full network has read can be continued in a language."""
    prefix = llama.cache()
    with fm.language(llama.model, None), torch.no_grad():
        llama.model(TOKENS[:1, :4], past_key_values=prefix)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for language in (0, 1, 2):
        dense = llama.cache()
        llama.dense[FULL](TOKENS[:1, :4], past_key_values=dense)
        with fm.language(llama.model, LANGUAGES[language]):
            found = llama.model.generate(TOKENS[:1, :6], past_key_values=copy.deepcopy(prefix), **options)
        assert torch.equal(found, llama.dense[language].generate(TOKENS[:1, :6], past_key_values=dense, **options))
