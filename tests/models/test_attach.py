"""An attached model equals the plain model with its weights multiplied by masks: outputs and every gradient."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from tiny_models import DECODERS, ENCODERS, batch, multiplied, tiny
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastmask as fm
from fastmask.torch_path import layers as torch_layers

LANGUAGES = ["aa", "bb", "cc"]
MIXED = [2, 0, 1, 1, 0, 2, 0]
WITH_FULL = [2, 0, -1, 1, 0, 2]


def subnetworks(model, units="both", density=0.5, seed=3):
    return fm.Subnetworks.random(model.config, LANGUAGES, density, seed, units=units)


def gradients_of(model, output, upstream):
    model.zero_grad()
    (output * upstream).sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_equals_multiplying(model, subnets, ids=MIXED):
    inputs = batch(len(ids))
    expected = multiplied(model, subnets, inputs, ids)
    upstream = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(5))
    expected_grads = gradients_of(model, expected, upstream)
    fm.attach(model, subnets)
    output = model(**inputs, language_ids=torch.tensor(ids))[0]
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for name, grad in gradients_of(model, output, upstream).items():
        if expected_grads[name] is None:
            assert grad is None, name
        else:
            torch.testing.assert_close(
                grad, expected_grads[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("model_type", [*ENCODERS, *DECODERS])
def test_every_family(model_type, every_way):
    """Heads and neurons of every family are where they are taken to be, by each way to run a mixed batch."""
    model = tiny(model_type)
    assert_equals_multiplying(model, subnetworks(model))


@pytest.mark.parametrize("units", ["heads", "neurons"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_units_and_attention_implementations(model_type, units, attention):
    """Either kind of unit works, and both, under every attention implementation."""
    model = tiny(model_type, attention=attention)
    assert_equals_multiplying(model, subnetworks(model, units))


@pytest.mark.parametrize(("model_type", "head"), [("bert", "tokens"), ("distilbert", "tokens"), ("qwen2", "causal")])
def test_under_a_task_head(model_type, head):
    """A model under a task head is found there, whatever its modules are called."""
    model = tiny(model_type, head)
    assert_equals_multiplying(model, subnetworks(model))


@pytest.mark.parametrize(
    "ids", [[1, 1, 1, 1], [0, 1, 0, 1], [-1, -1], WITH_FULL], ids=["one", "interleaved", "full", "with_full"]
)
def test_batches(ids):
    """Any mix of languages works."""
    model = tiny("bert")
    assert_equals_multiplying(model, subnetworks(model), ids)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_uneven_and_dead_layers(model_type):
    """Languages of different sizes share a packed buffer, and a layer without any live unit still runs."""
    model = tiny(model_type)
    subnets = subnetworks(model)
    heads, neurons = subnets.heads.clone(), subnets.neurons.clone()
    heads[0, 0], neurons[0, 0] = False, False
    heads[1], neurons[1] = True, True
    subnets = fm.Subnetworks(LANGUAGES, heads, neurons)
    assert_equals_multiplying(copy.deepcopy(model), subnets)
    assert_equals_multiplying(model, subnets, [0, 0])


def test_a_zero_filled_head_contributes_nothing():
    """The slots that a language with fewer heads leaves empty change neither output nor gradients."""
    model = tiny("bert")
    heads = torch.zeros(2, 2, 4, dtype=torch.bool)
    heads[0, :, :1], heads[1] = True, True
    subnets = fm.Subnetworks(["small", "large"], heads)
    fm.attach(model, subnets)
    inputs = batch(2)
    alone = model(**{k: v[:1] for k, v in inputs.items()}, language_ids=torch.tensor([0]))[0]
    alone.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    beside = model(**inputs, language_ids=torch.tensor([0, 1]))[0][:1]
    beside.square().sum().backward()
    torch.testing.assert_close(alone, beside)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name])


def test_dead_heads_are_not_computed(monkeypatch):
    """Projections and neurons have the size of the live units, which is what saves memory and time."""
    monkeypatch.setattr(torch_layers, "is_cheaper", lambda *batch: False)
    model = tiny("bert")
    fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.25, 0, units="both"))
    shapes = []
    layer = model.encoder.layer[0]
    for module in (layer.attention.self.query, layer.intermediate.dense):
        module.register_forward_hook(lambda m, args, out: shapes.append(out.shape[-1]))
    model(**batch(2), language_ids=torch.tensor([0, 1]))
    assert shapes == [6, 5]


@pytest.mark.parametrize(("act", "taken"), [("gelu", True), ("relu", True), ("gelu_new", False)])
def test_activation_is_recomputed_not_kept(act, taken):
    """The activation is applied once, and computed again in the backward pass instead of being kept."""
    model = tiny("bert", hidden_act=act)
    plain = model.encoder.layer[0].intermediate.intermediate_act_fn
    subnets = subnetworks(model)
    assert_equals_multiplying(model, subnets)
    assert isinstance(model.encoder.layer[0].intermediate.intermediate_act_fn, nn.Identity) is taken
    assert fm.detach(model).encoder.layer[0].intermediate.intermediate_act_fn is plain


def test_weight_masks():
    """Single weights of named modules can be masked."""
    model = tiny("bert")
    name = "encoder.layer.1.intermediate.dense"
    keep = torch.rand(2, 20, 24) < 0.4
    linear = model.get_submodule(name)
    inputs = batch(2)
    plain = copy.deepcopy(model)
    fm.attach(model, fm.Subnetworks(["a", "b"], weights={name: keep}))
    output = model(**inputs, language_ids=torch.tensor([1, 0]))[0]
    for position, language in enumerate([1, 0]):
        plain.get_submodule(name).weight.data = linear.weight.data * keep[language]
        example = {k: v[position : position + 1] for k, v in inputs.items()}
        torch.testing.assert_close(output[position : position + 1], plain(**example)[0])


def test_detach_restores_the_plain_model():
    """After detach nothing of the masks is left, and what was trained is."""
    model = tiny("bert")
    inputs, keys, linear = batch(2), list(model.state_dict()), model.encoder.layer[0].output.dense
    parameters = [id(p) for p in model.parameters()]
    before = model(**inputs)[0]
    fm.attach(model, subnetworks(model))
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    fm.detach(model)
    assert torch.equal(model(**inputs)[0], before)
    assert model.encoder.layer[0].output.dense is linear
    assert linear.weight is model.get_parameter("encoder.layer.0.output.dense.weight")
    assert type(model).__module__.startswith("transformers.")


def test_save_pretrained_stays_the_same(tmp_path):
    """A fine-tuned model can be loaded without fastmask."""
    from transformers import AutoModelForTokenClassification

    model = tiny("bert", "tokens")
    expected = model(**batch(2)).logits
    fm.attach(model, subnetworks(model)).save_pretrained(tmp_path)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path).double()
    assert loaded.config.architectures == ["BertForTokenClassification"]
    torch.testing.assert_close(loaded(**batch(2)).logits, expected, rtol=1e-5, atol=1e-5)


def test_signature_keeps_the_column_for_trainer():
    """`transformers.Trainer` keeps the columns of languages."""
    model = tiny("bert", "tokens")
    plain = list(inspect.signature(model.forward).parameters)
    fm.attach(model, subnetworks(model))
    names = list(inspect.signature(model.forward).parameters)
    told = ["language", "languages", "language_ids", "language_counts"]
    assert [name for name in names if name not in told] == plain
    assert [name for name in names if name in told] == told


def test_deepcopy_runs_its_own_weights():
    """A copied model runs, and trains, its own weights."""
    model = fm.attach(tiny("bert"), subnetworks(tiny("bert")))
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    ids = torch.tensor([0, 1])
    assert not clone(**batch(2), language_ids=ids)[0].any()
    assert model(**batch(2), language_ids=ids)[0].any()
    fm.detach(clone)
    assert model(**batch(2), language_ids=ids)[0].any()


def test_data_parallel_is_refused():
    """A replica made by `DataParallel` is refused, and the message says what to use."""
    model = tiny("bert")
    replica = fm.attach(model, subnetworks(model))._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(**batch(2), language_ids=torch.tensor([0, 1]))


def test_language_context():
    """One language for the whole batch, nested and with the full network."""
    model = tiny("bert")
    inputs, plain = batch(3), None
    plain = model(**inputs)[0]
    fm.attach(model, subnetworks(model))
    with fm.language(model, "bb"):
        one = model(**inputs)[0]
        with fm.language(model, None):
            full = model(**inputs)[0]
        again = model(**inputs)[0]
    torch.testing.assert_close(one, model(**inputs, language_ids=torch.tensor([1, 1, 1]))[0])
    torch.testing.assert_close(full, plain)
    assert torch.equal(one, again)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    """A layer recomputed in the backward pass has the languages of its forward pass."""
    model = tiny("bert", "tokens").train()
    subnets = subnetworks(model)
    first, second = [2, 0, 0], [1, 1, 2]

    def two_batches_then_backward(model):
        model.zero_grad()
        losses = [model(**batch(3), language_ids=torch.tensor(ids)).logits.square().sum() for ids in (first, second)]
        sum(losses).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    fm.attach(model, subnets)
    expected = two_batches_then_backward(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, grad in two_batches_then_backward(model).items():
        torch.testing.assert_close(grad, expected[name])


def test_generate_with_a_decoder():
    """Decoding step by step, with a cache of packed heads, continues as the full forward pass does."""
    model = tiny("llama", "causal")
    fm.attach(model, subnetworks(model))
    prompt = batch(2)["input_ids"]
    with fm.language(model, "bb"):
        tokens = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        again = prompt
        for _ in range(5):
            again = torch.cat([again, model(input_ids=again).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, again)
    mixed = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, language_ids=torch.tensor([1, 1]))
    assert torch.equal(mixed, tokens)


def test_float32_training_step_moves_only_the_live_part():
    """An SGD step of one language moves only what it owns."""
    model = tiny("bert").float().train()
    subnets = subnetworks(model)
    fm.attach(model, subnets)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch(2), language_ids=torch.tensor([1, 1]))[0].square().sum().backward()
    optimizer.step()
    moved = (
        model.state_dict()["encoder.layer.0.intermediate.dense.weight"]
        != before["encoder.layer.0.intermediate.dense.weight"]
    ).any(1)
    assert torch.equal(moved, subnets.neurons[1, 0])


def test_compiles_without_graph_breaks():
    """An attached encoder compiles to one graph, for any languages."""
    torch._dynamo.reset()
    model = tiny("bert", num_hidden_layers=1).float()
    fm.attach(model, subnetworks(model))
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for ids in ([0, 1, 2], [1, 1, 1], [2, 0, 0]):
        inputs = {**batch(3), "language_ids": torch.tensor(ids)}
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-4)
    assert count.frame_count == 1
    # A width for the subnetworks has no room for the full network; as the batch's only language it has its own.
    inputs = batch(3)
    with pytest.raises(ValueError, match=r"full network \(-1\) has 24 live rows, more than the packed width 12"):
        compiled(**inputs, language_ids=torch.tensor([0, -1, 1]))
    for name in (None, "bb"):
        with fm.language(model, name):
            torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-4)


class TestBadInput:
    """Each error names what was given and what was expected, and leaves the model as it was."""

    def test_no_language(self):
        model = fm.attach(tiny("bert"), subnetworks(tiny("bert")))
        with pytest.raises(ValueError, match=r"no language was given.*0 = aa, 1 = bb, 2 = cc"):
            model(**batch(2))

    def test_unknown_language(self):
        model = fm.attach(tiny("bert"), subnetworks(tiny("bert")))
        with pytest.raises(KeyError, match="unknown language 'ab'; did you mean"), fm.language(model, "ab"):
            pass

    def test_id_out_of_range(self):
        model = fm.attach(tiny("bert"), subnetworks(tiny("bert")))
        with pytest.raises(ValueError, match="language id 3 is out of range"):
            model(**batch(2), language_ids=torch.tensor([0, 3]))

    def test_wrong_ids(self):
        model = fm.attach(tiny("bert"), subnetworks(tiny("bert")))
        with pytest.raises(ValueError, match="expected language_ids as an int64 tensor"):
            model(**batch(2), language_ids=["aa", "bb"])
        with pytest.raises(ValueError, match="one language id for each of the 2 examples"):
            model(**batch(2), language_ids=torch.tensor([0, 1, 2]))

    def test_both_ways_at_once(self):
        model = fm.attach(tiny("bert"), subnetworks(tiny("bert")))
        with fm.language(model, "aa"), pytest.raises(ValueError, match="use one of the two"):
            model(**batch(2), language_ids=torch.tensor([0, 1]))

    def test_attached_twice(self):
        model = fm.attach(tiny("bert"), subnetworks(tiny("bert")))
        with pytest.raises(ValueError, match="attached already"):
            fm.attach(model, subnetworks(model))

    def test_not_attached(self):
        with pytest.raises(ValueError, match="no subnetworks are attached"):
            fm.detach(tiny("bert"))

    def test_unsupported_model(self):
        from transformers import MambaConfig, MambaModel

        model = MambaModel(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=10, state_size=2))
        heads = torch.ones(1, 1, 2, dtype=torch.bool)
        with pytest.raises(
            ValueError, match=r"cannot attach to MambaModel \(model type 'mamba'\): it has no attention"
        ):
            fm.attach(model, fm.Subnetworks(["a"], heads))
        with pytest.raises(
            ValueError, match="cannot attach to Linear: it has no attention and no FFN of a known layout"
        ):
            fm.attach(nn.Linear(2, 2), fm.Subnetworks(["a"], heads))

    def test_masks_of_another_model_leave_it_untouched(self):
        model = tiny("bert")
        layers = dict(model.named_modules())
        with pytest.raises(
            ValueError, match="masks are for 3 layers of 4 heads, this BertModel has 2 layers of 4 heads"
        ):
            fm.attach(model, fm.Subnetworks(["a"], torch.ones(1, 3, 4, dtype=torch.bool)))
        assert dict(model.named_modules()) == layers

    def test_unknown_module(self):
        keep = torch.ones(1, 20, 24, dtype=torch.bool)
        with pytest.raises(KeyError, match=r"encoder\.layer\.0\.intermediate\.dens'; did you mean"):
            fm.attach(tiny("bert"), fm.Subnetworks(["a"], weights={"encoder.layer.0.intermediate.dens": keep}))

    def test_two_masks_for_one_module(self):
        model = tiny("bert")
        subnets = subnetworks(model)
        weights = {"encoder.layer.0.intermediate.dense": torch.ones(3, 20, 24, dtype=torch.bool)}
        with pytest.raises(ValueError, match="has a mask over weights and one over heads or neurons"):
            fm.attach(model, fm.Subnetworks(LANGUAGES, subnets.heads, subnets.neurons, weights))

    def test_layer_outside_forward(self):
        model = fm.attach(tiny("bert"), subnetworks(tiny("bert")))
        with pytest.raises(RuntimeError, match="outside the forward pass"):
            model.encoder.layer[0].output.dense(torch.zeros(1, 1, 20))


def test_units_stay_in_their_slots_where_that_is_cheaper(monkeypatch):
    """A batch that is multiplied whole is not packed, neither heads nor neurons, and computes the same."""
    shapes, found = [], []
    for cheaper in (True, False):
        monkeypatch.setattr(torch_layers, "is_cheaper", lambda *batch, cheaper=cheaper: cheaper)
        model = tiny("bert")
        fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.25, 0, units="both"))
        layer = model.encoder.layer[0]
        for module in (layer.attention.self.query, layer.intermediate.dense):
            module.register_forward_hook(lambda m, args, out: shapes.append(out.shape[-1]))
        output = model(**batch(2), language_ids=torch.tensor([0, 1]))[0]
        found.append({"output": output.detach(), **gradients_of(model, output, torch.ones_like(output))})
    assert shapes == [24, 20, 6, 5]
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-9, atol=1e-9)


def test_attention_probabilities_do_not_depend_on_what_is_cheaper(monkeypatch):
    """Those that a model is asked for, by the call or by its config, are of live heads."""
    monkeypatch.setattr(torch_layers, "is_cheaper", lambda *batch: True)
    for asked in ("call", "config"):
        model = tiny("bert", attention="eager", output_attentions=asked == "config")
        fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, 0))
        more = {"output_attentions": True} if asked == "call" else {}
        found = model(**batch(2), language_ids=torch.tensor([0, 1]), **more).attentions
        assert [probabilities.shape[1] for probabilities in found] == [2, 2]


@pytest.mark.parametrize("languages", [[1, 1], [0, 1]])
def test_a_cache_does_not_depend_on_what_is_cheaper(monkeypatch, languages):
    """Keys and values of a longer pass are continued by shorter ones, which would choose differently."""
    monkeypatch.setattr(torch_layers, "is_cheaper", lambda tables, x, *rest: x.shape[1] == 1)
    model = tiny("gpt2", "causal")
    fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, 0, units="both"))
    ids, tokens = torch.tensor(languages), batch(2)["input_ids"]
    whole = model(input_ids=tokens, language_ids=ids).logits
    first = model(input_ids=tokens[:, :-1], language_ids=ids, use_cache=True)
    last = model(input_ids=tokens[:, -1:], language_ids=ids, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-9, atol=1e-9)
