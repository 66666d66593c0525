"""Scores that are taken once, of the full network: whose a unit's activity is, and what a head is worth to others."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BartConfig, BartModel, BertConfig, BertModel, LlamaConfig, LlamaModel, Phi3Config, Phi3Model

import fastmask as fm
from fastmask.discovery import COMPARING, entropy, importance, relative, shapley
from fastmask.discovery.scores import RARE

LANGUAGES = ["a", "b"]
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def made(model_type="bert"):
    torch.manual_seed(0)
    if model_type == "bert":
        model = BertModel(BertConfig(**SIZES, attn_implementation="eager"), add_pooling_layer=False)
    else:
        config, cls = {"llama": (LlamaConfig, LlamaModel), "phi3": (Phi3Config, Phi3Model)}[model_type]
        model = cls(config(**SIZES, num_key_value_heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def attached_model(model_type="bert", units="both"):
    model = made(model_type)
    return fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=0, units=units))


def batches_of(language, seed):
    """Two batches of one language's words, with padding behind the shorter sentences."""
    generator = torch.Generator().manual_seed(seed)
    low, high = {"a": (1, 12), "b": (12, 30)}[language]
    found = []
    for lengths in ((5, 3, 4), (6, 2)):
        ids = torch.randint(low, high, (len(lengths), max(lengths)), generator=generator)
        mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
        found.append({"input_ids": ids * mask, "attention_mask": mask.long()})
    return found


DATA = {name: batches_of(name, seed) for seed, name in enumerate(LANGUAGES)}


def losses(model):
    target = torch.randn(16, generator=torch.Generator().manual_seed(2)).double()
    return lambda inputs: ((model(**inputs)[0] - target) ** 2).mean((1, 2))


BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 12}


def seq2seq(pairs):
    """A batch of sources and targets [B, T] each, with padding behind the shorter ones."""
    sources, targets = (pad_sequence(side, batch_first=True) for side in zip(*pairs, strict=True))
    return {"input_ids": sources, "attention_mask": (sources != 0).long(), "decoder_input_ids": targets}


class TestEntropy:
    @pytest.mark.parametrize("model_type", ["bert", "llama", "phi3"])
    def test_is_the_share_of_each_language_token_by_token(self, model_type):
        """Scores must be those of the plain model, read from its own modules without padding, in the full network."""
        plain, rates = made(model_type), {}
        for name, scoring in DATA.items():
            seen = {"heads": [[], []], "neurons": [[], []]}
            handles = []
            for layer in range(2):
                if model_type == "bert":
                    out = plain.encoder.layer[layer].attention.output.dense
                    gate, groups = plain.encoder.layer[layer].intermediate.dense, 4
                else:
                    out, mlp, groups = plain.layers[layer].self_attn.o_proj, plain.layers[layer].mlp, 2
                    gate = mlp.gate_proj if model_type == "llama" else mlp.gate_up_proj
                handles.append(out.register_forward_pre_hook(lambda m, x, i=layer, s=seen: s["heads"][i].append(x[0])))
                handles.append(gate.register_forward_hook(lambda m, x, y, i=layer, s=seen: s["neurons"][i].append(y)))
            for inputs in scoring:
                plain(**inputs)
            for handle in handles:
                handle.remove()
            masks = [inputs["attention_mask"].bool() for inputs in scoring]

            def tokens(values, masks=masks):
                return torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)])

            heads = [tokens(values).view(-1, groups, 16 // groups).norm(dim=2).mean(0) for values in seen["heads"]]
            neurons = [(tokens(values)[:, :12] > 0).double().mean(0) + RARE for values in seen["neurons"]]
            rates[name] = {"heads": torch.stack(heads), "neurons": torch.stack(neurons)}
        model = attached_model(model_type)
        found = entropy(model, DATA, losses(model))
        for kind in ("heads", "neurons"):
            total = rates["a"][kind] + rates["b"][kind]
            for name in LANGUAGES:
                expected = (rates[name][kind] / total).detach().float()
                torch.testing.assert_close(found[name][kind], expected, rtol=1e-5, atol=1e-6)

    def test_an_encoder_and_a_decoder_have_masks_of_their_own(self):
        """Padding of the source hides nothing of the target, and that of the target does not count."""
        sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in BART.items()}
        torch.manual_seed(0)
        model = BartModel(BartConfig(vocab_size=30, d_model=16, max_position_embeddings=16, pad_token_id=0, **sizes))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        fm.attach(model.double().eval(), fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=0, units="both"))
        alone, together = {}, {}
        for name, seed in (("a", 1), ("b", 2)):
            generator = torch.Generator().manual_seed(seed)
            pairs = [[torch.randint(3, 30, (n,), generator=generator) for n in (a, b)] for a, b in ((5, 2), (2, 5))]
            alone[name] = [seq2seq([pair]) for pair in pairs]
            together[name] = [seq2seq(pairs)]

        def loss(batch):
            return model(**batch).last_hidden_state.sum((1, 2))

        first, second = (entropy(model, data, loss) for data in (alone, together))
        for name in LANGUAGES:
            for kind in ("heads", "neurons"):
                torch.testing.assert_close(first[name][kind], second[name][kind], rtol=1e-5, atol=0)

    def test_a_language_keeps_the_units_that_are_its_own(self):
        """A neuron that only one language's words excite must be kept by that language, and not by the other."""
        model = made()
        with torch.no_grad():
            embeddings = model.embeddings
            embeddings.position_embeddings.weight.zero_()
            embeddings.token_type_embeddings.weight.zero_()
            embeddings.LayerNorm.weight.fill_(1)
            embeddings.LayerNorm.bias.zero_()
            words = torch.where(torch.arange(30) < 12, 1.0, -1.0)[:, None] * torch.tensor([1.0, -1.0]).repeat(8)
            embeddings.word_embeddings.weight.copy_(words)
            layer = model.encoder.layer[0]
            layer.attention.output.dense.weight.zero_()
            layer.attention.output.dense.bias.zero_()
            layer.attention.output.LayerNorm.weight.fill_(1)
            layer.attention.output.LayerNorm.bias.zero_()
            layer.intermediate.dense.bias.zero_()
            layer.intermediate.dense.weight[3] = torch.tensor([1.0, -1.0]).repeat(8)  # a's words
            layer.intermediate.dense.weight[7] = torch.tensor([-1.0, 1.0]).repeat(8)  # b's words
        found = fm.discover(model, DATA, losses(model), score="entropy", units="neurons", density=0.5)
        assert found.neurons.sum((1, 2)).tolist() == [12, 12]
        assert found.neurons[:, 0, 3].tolist() == [True, False]
        assert found.neurons[:, 0, 7].tolist() == [False, True]

    def test_goes_down_one_ranking_to_tau(self):
        """The ranking must be taken once, and the metric must still decide where it stops."""
        model, calls = made(), []
        loss = losses(model)

        def counting(inputs):
            calls.append(1)
            return loss(inputs)

        metric = {8: 100.0, 7: 99.0, 6: 96.0, 5: 90.0}
        found = fm.discover(
            model,
            DATA,
            counting,
            lambda name: metric[int(model._fastmask.subnets.select([name]).heads.sum())],
            score="entropy",
        )
        assert len(calls) == 4  # two batches of two languages
        assert found.heads.sum((1, 2)).tolist() == [6, 6]
        ranked = entropy(fm.attach(model, fm.Subnetworks.full(model, LANGUAGES)), DATA, loss)
        for name, keep in zip(LANGUAGES, found.heads, strict=True):
            assert ranked[name]["heads"][keep].min() > ranked[name]["heads"][~keep].max()


class TestShapley:
    def game(self, value, **options):
        """Scores of a model whose loss is `value` of its gates [2, 4], whatever it computes."""
        model = attached_model(units="heads")
        consumers = [layer.attention.output.dense for layer in model.encoder.layer]
        inputs = [torch.ones(1, 1, 16).double()] * 2

        def loss(batch):
            model(input_ids=torch.ones(1, 1, dtype=torch.long))  # what is gated
            gates = []
            for consumer, x in zip(consumers, inputs, strict=True):
                for hook in consumer._forward_pre_hooks.values():
                    gates.append(hook(consumer, (x,))[0].view(4, 4)[:, 0])
            return value(torch.stack(gates))[None]

        return shapley(model, {"a": [0]}, loss, **options)["a"]["heads"]

    def test_of_an_additive_loss_is_what_each_head_takes_off(self):
        """Where heads do not interact, every order must give each head its own worth."""
        worth = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.0, 4.0, -1.0, 2.0]]).double()
        found = self.game(lambda gates: -(worth * gates).sum(), orders=2, truncation=1)
        torch.testing.assert_close(found.double(), worth)

    def test_of_two_heads_that_stand_in_for_each_other(self):
        """Of two heads either of which is enough, each must be worth a half, where a gradient would give one all."""
        found = self.game(lambda gates: -torch.maximum(gates[0, 0], gates[1, 2]), orders=16, truncation=1)
        assert found[0, 0] == pytest.approx(0.5, abs=1e-6)  # an order and its reverse: each head once
        assert found[1, 2] == pytest.approx(0.5, abs=1e-6)
        assert found.sum() == pytest.approx(1)
        assert (found != 0).sum() == 2

    def test_adds_up_and_equals_all_orders(self):
        """With every order it must be the definition; with some, values must add up to the loss without any head."""
        model = attached_model(units="heads")
        loss = losses(model)
        found = shapley(model, DATA, loss, orders=4, truncation=1)
        for name, scoring in DATA.items():
            with torch.no_grad():
                plain = fm.detach(attached_model(units="heads"))
                full = torch.cat([losses(plain)(inputs) for inputs in scoring]).mean()
                for layer in plain.encoder.layer:
                    layer.attention.output.dense.weight.zero_()
                none = torch.cat([losses(plain)(inputs) for inputs in scoring]).mean()
            assert float(found[name]["heads"].sum()) == pytest.approx(float(none - full), rel=1e-5)

        def square(gates):
            return (1 - gates.flatten()[:3].mean()) ** 3 + gates[0, 0] * gates[0, 1]

        values = torch.zeros(3)
        for order in itertools.permutations(range(3)):
            gates = torch.ones(2, 4)
            for head in order:
                before = square(gates)
                gates[0, head] = 0
                values[head] += (square(gates) - before) / 6
        torch.testing.assert_close(self.game(square, orders=50, truncation=1)[0, :3], values, rtol=0, atol=0.03)

    def test_truncated_orders_count_only_what_they_measured(self):
        """An order must end where half of the loss is lost, and what lies behind must not be measured."""
        calls = []

        def steep(gates):
            calls.append(int(gates.sum()))
            return -(gates.sum() / 8)

        found = self.game(steep, orders=2, truncation=0.5)
        assert min(calls[2:]) == 3  # of 8: with 4 left the loss has risen by half, not more
        assert len(calls) == 2 + 2 * 5
        torch.testing.assert_close(found, torch.full((2, 4), 0.125))

    @pytest.mark.parametrize("truncation", [0.5, 0.9, 1.0])
    def test_no_order_ends_where_the_loss_falls_without_heads(self, truncation):
        """Where heads are harmful together there is no ruin to reach: all of them must be measured."""
        found = self.game(lambda gates: (gates * torch.arange(8).view(2, 4)).sum(), orders=2, truncation=truncation)
        torch.testing.assert_close(found, -torch.arange(8.0).view(2, 4))

    def test_harmful_heads_go_first(self):
        """Heads must be dropped from the lowest value up, and each layer must keep its best one, be it below zero."""
        model = made()
        found = {}
        kept = fm.discover(model, DATA, losses(model), score="shapley", density=0.5, on_scores=found.__setitem__)
        assert kept.heads.sum((1, 2)).tolist() == [4, 4]
        assert kept.heads.any(2).all()
        for keep, name in zip(kept.heads, LANGUAGES, strict=True):
            of_heads = found[name]["heads"]
            best = of_heads == of_heads.amax(1, keepdim=True)
            assert of_heads[keep & ~best].min() >= of_heads[~keep].max()


class TestRelative:
    """How much more a unit matters to one language than to the others."""

    def test_is_own_importance_minus_the_mean_of_the_others(self):
        """By hand from `importance` of the full network, for heads and neurons."""
        model = made()
        fm.attach(model, fm.Subnetworks.full(model.config, LANGUAGES, units="both"))
        loss = losses(model)
        own = {name: importance(model, DATA[name], loss, name) for name in LANGUAGES}
        found = relative(model, DATA, loss)
        for kind in ("heads", "neurons"):
            a, b = (own[name][kind] for name in LANGUAGES)
            torch.testing.assert_close(found["a"][kind], a - b)
            torch.testing.assert_close(found["b"][kind], b - a)
            assert (a - b).abs().max() > 0.01

    def test_masks_have_less_in_common(self):
        """Masks by it overlap less than those by gradients, and a single language is refused."""
        model = made()
        found = {
            score: fm.discover(model, DATA, losses(model), units="both", density=0.5, score=score)
            for score in ("gradient", "relative")
        }
        overlap = {score: float(subnets.overlap()[0, 1]) for score, subnets in found.items()}
        assert overlap["relative"] < overlap["gradient"]
        assert found["relative"].neurons.sum((1, 2)).tolist() == found["gradient"].neurons.sum((1, 2)).tolist()
        with pytest.raises(ValueError, match="expected two or more, given a"):
            fm.discover(model, {"a": DATA["a"]}, losses(model), density=0.5, score="relative")


@pytest.mark.parametrize("score", COMPARING)
def test_processes_that_share_the_languages(score):
    """Each measures its own languages and gets what the others measured: the masks are those of one process."""
    model, measured = made(), {}

    def found(batches, gather):
        options = {"units": "both", "density": 0.5, "score": score}
        return fm.discover(model, batches, losses(model), gather=gather, **options)

    def alone(mine):
        measured.update(mine)
        return mine

    def beside_others(mine):
        for name, scores in mine.items():
            assert all(torch.equal(scores[kind], measured[name][kind]) for kind in ("heads", "neurons"))
        assert len(mine) == 1
        return measured

    whole = found(DATA, alone)
    assert whole == found(DATA, None)
    for name in LANGUAGES:
        assert found({name: DATA[name]}, beside_others) == whole.select([name])
    with pytest.raises(ValueError, match="expected two or more, given a"):
        found({"a": DATA["a"]}, alone)
