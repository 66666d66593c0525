"""Experts' neurons: a mixed batch is what weights times masks give, and one language can be cut out."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from covering import covering
from every_model import LANGUAGES, assert_same, first_of, made, masked_parameters, multiplied, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastmask as fm
from fastmask.discovery import importance
from fastmask.models.attach import attached
from fastmask.models.editing import set_subnetwork
from fastmask.models.experts import AttachedExperts, Stacked
from fastmask.models.proof import working_inputs
from fastmask.models.structure import structure_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MODELS = [
    ("mixtral", "MixtralForCausalLM"),
    ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ("olmoe", "OlmoeForCausalLM"),
    ("deepseek_v3", "DeepseekV3ForCausalLM"),  # an FFN in the first layer, and shared experts
    ("gpt_oss", "GptOssForCausalLM"),  # gate and up interleaved, weights stored [in, out], biases
    ("aria_text", "AriaTextForCausalLM"),  # weights stored [in, out]
    ("nemotron_h", "NemotronHForCausalLM"),  # no gate
]
# The last one has layers with a state as well, which take as long as the experts of all the others.
every = pytest.mark.parametrize(
    "names", [*MODELS[:-1], pytest.param(MODELS[-1], marks=pytest.mark.slow)], ids=lambda names: names[0]
)


def neurons_of(model, *shares, seed=0):
    """Subnetworks whose languages own these shares of the neurons of every layer."""
    sizes = structure_of(model).sizes("neurons")
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(len(shares), len(sizes), max(sizes), dtype=torch.bool)
    for row, share in enumerate(shares):
        for layer, size in enumerate(sizes):
            keep[row, layer, torch.randperm(size, generator=generator)[: round(share * size)]] = True
    return fm.Subnetworks([f"l{row}" for row in range(len(shares))], neurons=keep)


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, AttachedExperts)]


def gradients_and_output(model, run):
    model.zero_grad(set_to_none=True)
    output = run()
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
    (output * upstream).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close(found, wanted, scale=1e-5):
    """Many models compute norms and routers' scores in float32, whatever their dtype."""
    torch.testing.assert_close(found, wanted, rtol=scale, atol=scale * float(wanted.abs().max().clamp(min=1)))


@pytest.mark.parametrize(
    ("names", "ids"),
    covering({names[0]: names for names in MODELS}, {"mixed": [3, 0, -1, 2, 1, 0], "one": [1, 1, 1, 1, 1, 1]}),
)
def test_output_and_every_gradient(names, ids):
    """A mixed batch, with the full network, a language without neurons, and two languages with the same ones."""
    model = tiny_model(*names)
    subnets = neurons_of(model, 0.5, 0.3, 0.0, 0.9)
    keep = subnets.neurons.clone()
    keep[3] = keep[0]
    subnets = fm.Subnetworks(subnets.languages, neurons=keep)
    words = torch.randint(4, 60, (len(ids), 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": words, "use_cache": False}
    want, grads = gradients_and_output(model, lambda: torch.cat(multiplied(model, subnets, inputs, ids)))
    fm.attach(model, subnets)
    assert experts_of(model)
    assert all(layer.packs for layer in experts_of(model))
    got, found = gradients_and_output(model, lambda: first_of(model(**inputs, language_ids=torch.tensor(ids))))
    assert_close(got, want)
    for name, grad in grads.items():
        if grad is None or not grad.any():
            assert found[name] is None or not found[name].any(), name
        else:
            assert_close(found[name], grad)


@every
def test_dead_neurons_are_not_computed(names):
    """Whatever the parameters of dead neurons hold, nothing reads them."""
    model = tiny_model(*names)
    subnets = neurons_of(model, 0.5)
    words = torch.randint(4, 60, (2, 7))
    fm.attach(model, subnets)
    with fm.language(model, "l0"), torch.no_grad():
        want = first_of(model(words, use_cache=False))
        for layer in experts_of(model):
            dead = ~layer.mask.to_dense()[0, 0]
            for stacked in layer.stacked:
                parameter = getattr(layer, stacked.name)
                parameter.masked_fill_(stacked.beside(dead, parameter), float("nan"))
        assert torch.equal(first_of(model(words, use_cache=False)), want)


def test_a_token_each():
    """Tokens of one row may have languages of their own."""
    model = tiny_model(*MODELS[0])
    subnets = neurons_of(model, 0.5, 0.25)
    words, ids = torch.randint(4, 60, (2, 5)), torch.tensor([[0, 1, 1, 0, -1], [1, 1, 0, -1, 0]])
    experts = model.model.layers[0].mlp.experts
    calls = {}
    experts.register_forward_pre_hook(lambda _, args: calls.update(args=args), with_kwargs=False)
    model(words, use_cache=False)
    want = torch.zeros_like(calls["args"][0])
    for language in (0, 1, -1):
        masked = masked_parameters(model, subnets, language)
        own = {"down_proj": masked["model.layers.0.mlp.experts.down_proj"]}
        output = torch.func.functional_call(experts, own, calls["args"])
        want = torch.where((ids.flatten() == language)[:, None], output, want)
    experts._forward_pre_hooks.clear()
    fm.attach(model, subnets)
    found = []
    layer = model.model.layers[0].mlp.experts
    layer.register_forward_hook(lambda _, args, output: found.append(output))
    model(words, use_cache=False, language_ids=ids)
    assert_close(found[0], want)


def sizes_of(model):
    structure = structure_of(model)
    return [[group.units for group in structure.groups(kind)] for kind in ("heads", "neurons")]


@every
def test_sizes(names):
    """A config says how many neurons there are, and so does an attached model."""
    model = tiny_model(*names)
    assert sizes_of(model.config) == sizes_of(model)
    assert sizes_of(fm.attach(model, neurons_of(model, 0.5))) == sizes_of(model)


@every
def test_unpacked(names):
    """Where nothing could be tried, all neurons are computed, and dead ones not read."""
    model, subnets, inputs = made(names)
    want = torch.cat(multiplied(model, subnets, inputs, [1, 0, -1]))
    with pytest.warns(UserWarning, match="neurons of .*experts are not packed .* and experts cost what they do in the"):
        fm.attach(model, subnets, example={"nothing": 1})
    assert not any(layer.packs for layer in experts_of(model))
    assert_close(first_of(model(**inputs, language_ids=torch.tensor([1, 0, -1]))), want)


@every
def test_merged_and_extracted(names, tmp_path):
    model, subnets, inputs = made(names)
    fm.attach(model, subnets)
    with torch.no_grad():
        want = first_of(model(**inputs, language="bb"))
        merged, small = fm.merge(model, "bb"), fm.extract(model, "bb")
        assert_close(first_of(merged(**inputs)), want)
        assert_close(first_of(small(**inputs)), want)
    assert [group.units for group in structure_of(small).ffns] == [
        max(1, int(subnets.neurons[1, layer].sum())) for layer in range(subnets.neurons.shape[1])
    ]
    if hasattr(small, "_fastmask_sizes"):
        fm.save_pretrained(small, tmp_path)
        again = fm.from_pretrained(tmp_path, experts_implementation="eager")
    else:
        small.save_pretrained(tmp_path)
        again = type(small).from_pretrained(tmp_path, experts_implementation="eager")
    assert_close(first_of(again.eval()(**inputs)).detach(), want)


@every
def test_saved_and_detached(names, tmp_path):
    model, subnets, inputs = made(names)
    plain, ids = copy.deepcopy(model), torch.tensor([2, -1, 0])
    state = list(model.state_dict())
    fm.attach(model, subnets)
    assert list(model.state_dict()) == state
    want = first_of(model(**inputs, language_ids=ids)).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(first_of(other(**inputs, language_ids=ids)), want)
    model.save_pretrained(tmp_path)
    again = fm.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert_same(first_of(again(**inputs, language_ids=ids)), want)
    fm.detach(model)
    assert not experts_of(model)
    assert_same(first_of(model(**inputs)), first_of(plain(**inputs)))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_other_subnetworks():
    """Set for one language, and a language more and one less."""
    model, subnets, inputs = made(MODELS[4])
    others = fm.Subnetworks.random(model, LANGUAGES, 0.4, seed=8, units="both")
    want = [multiplied(model, nets, inputs, [row] * 3) for nets, row in ((others, 1), (others, 2))]
    fm.attach(model, subnets)
    set_subnetwork(model, "bb", heads=others.heads[1], neurons=others.neurons[1])
    assert_close(first_of(model(**inputs, language="bb")), torch.cat(want[0]))
    fm.add_language(model, "new", others.select(["cc"]))
    fm.remove_language(model, "aa")
    assert_close(first_of(model(**inputs, language="new")), torch.cat(want[1]))


def test_what_learns():
    """`forward="full"`: the full network runs, and gradients reach what each example's language owns."""
    model, _, inputs = made(MODELS[4])
    subnets = neurons_of(model, 0.5, 0.25)
    ids = [0, -1, 1]
    want = first_of(model(**inputs)).detach()
    upstream = torch.randn(want.shape, dtype=want.dtype)
    grads = {}
    for row, language in enumerate(ids):
        model.zero_grad(set_to_none=True)
        example = {name: v[row : row + 1] if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        (first_of(model(**example)) * upstream[row : row + 1]).sum().backward()
        for layer, group in enumerate(structure_of(model).ffns):
            for stacked in group.stacked:
                name = f"{group.name}.{stacked.name}"
                parameter = model.get_parameter(name)
                keep = subnets.neurons[language, layer] if language >= 0 else torch.ones(group.units)
                own = parameter.grad * stacked.beside(keep.bool(), parameter)
                grads[name] = grads.get(name, 0) + own
    model.zero_grad(set_to_none=True)
    fm.freeze_unmasked(fm.attach(model, subnets, forward="full"))
    output = first_of(model(**inputs, language_ids=torch.tensor(ids)))
    assert_close(output.detach(), want)
    (output * upstream).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == grads.keys()
    for name, grad in grads.items():
        assert_close(trained[name], grad)


def test_summary():
    """A neuron lives in every expert; a token goes through two of four."""
    model = tiny_model(*MODELS[0])
    total = sum(p.numel() for p in model.parameters())
    subnets = neurons_of(model, 0.5)
    found = fm.summary(fm.attach(model, subnets))
    part = found.layers["model.layers.1.mlp.experts"]["l0"]
    assert (part.parameters, part.all_parameters) == (4 * 12 * 32 * 3, 4 * 24 * 32 * 3)
    assert part.flops == 2 * 2 * 12 * 32 * 3
    assert found.unmasked + found.languages["l0"].all_parameters == total


def test_scores_are_refused():
    model, subnets, inputs = made(MODELS[0])
    fm.attach(model, subnets)
    with pytest.raises(ValueError, match=r"neurons of experts cannot be scored \('model.layers.0.mlp.experts'\)"):
        importance(model, [inputs], lambda batch: first_of(model(**batch)).flatten(1).sum(1), "aa")


@every
def test_half_precision(names):
    """A router's choice that a rounding changes does not let the trial refuse the model."""
    model, subnets, _ = made(names)
    unpacked = attached(fm.attach(model.bfloat16(), subnets)).unpacked
    assert not any("experts" in place for place in unpacked)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_implementations(implementation):
    """Of transformers; grouped products read rows of widths that they can."""
    model = tiny_model(*MODELS[4]).float()
    model.config._experts_implementation = implementation
    subnets = neurons_of(model, 0.3, 0.2)
    inputs, _ = working_inputs(model)
    want = torch.cat(multiplied(model, subnets, inputs, [1, 0, -1]))
    fm.attach(model, subnets)
    assert_close(first_of(model(**inputs, language_ids=torch.tensor([1, 0, -1]))), want, 1e-4)


def test_threads():
    """Each with another language, at the same time."""
    model = tiny_model(*MODELS[0])
    words = torch.randint(4, 60, (4, 7))
    fm.attach(model, neurons_of(model, 0.5, 0.3, 0.8))
    names = attached(model).subnets.languages
    with torch.no_grad(), ThreadPoolExecutor(3) as pool:
        want = [first_of(model(words, use_cache=False, language=name)) for name in names]
        found = pool.map(lambda name: first_of(model(words, use_cache=False, language=name)), 10 * names)
        assert all(torch.equal(got, want[number % 3]) for number, got in enumerate(found))


def test_compiles():
    """The graph ends at the experts, and another one begins behind them; both serve every batch."""
    model = tiny_model("mixtral", "MixtralModel", num_hidden_layers=1)
    fm.attach(model, neurons_of(model, 0.5, 0.3))
    torch._dynamo.reset()
    count = CompileCounterWithBackend("eager")
    compiled, graphs = torch.compile(model, backend=count), []
    for ids in ([1, 0, 1], [0, 0, 1], [1, 1, 1]):
        given = {"input_ids": torch.randint(4, 60, (3, 7)), "use_cache": False, "language_ids": torch.tensor(ids)}
        torch.testing.assert_close(first_of(compiled(**given)), first_of(model(**given)))
        graphs.append(count.frame_count)
    assert graphs == 3 * graphs[:1]
    assert graphs[0] > 1


@pytest.mark.parametrize("before", [True, False])
def test_offloaded(before):
    """Experts work under accelerate's hooks, which replace a module's forward."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(*MODELS[0])
    subnets, ids = neurons_of(model, 0.5, 0.3), torch.tensor([0, 1, -1])
    words = torch.randint(4, 60, (3, 7))
    want = first_of(fm.attach(copy.deepcopy(model), subnets)(words, use_cache=False, language_ids=ids))
    if before:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    fm.attach(model, subnets)
    if not before:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert_close(first_of(model(words, use_cache=False, language_ids=ids)), want)


class TestRefused:
    def test_a_delta(self):
        """A delta of a model with experts is refused, as it would lose what they have learnt."""
        model = tiny_model(*MODELS[0])
        subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=0, units="both")
        base = copy.deepcopy(model)
        fm.attach(model, subnets, forward="full")
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[0, 0, 0] += 1
        with pytest.raises(ValueError, match=r"'model.layers.1.mlp.experts.down_proj' has changed, and holds experts"):
            fm.Delta.of(model, base, "aa")

    def test_another_layout(self):
        """Experts whose gate and up projections are interleaved are not packed as if they were not."""
        model = tiny_model(*MODELS[4])
        for layer in model.model.layers:
            layer.mlp.experts.is_concatenated = True
        subnets, ids = neurons_of(model, 0.5, 0.3), torch.tensor([0, 1, -1])
        inputs, _ = working_inputs(model)
        want = torch.cat(multiplied(model, subnets, inputs, ids.tolist()))
        with pytest.warns(UserWarning, match=r"neurons of model\.layers\.\*\.mlp\.experts are not packed"):
            fm.attach(model, subnets)
        assert_close(first_of(model(**inputs, language_ids=ids)), want)

    def test_tokens_in_another_order(self):
        """Experts that get tokens in another order, so that nobody knows whose they are, are refused."""
        model = tiny_model(*MODELS[0])

        class Shuffled(type(model.model.layers[0].mlp)):
            def forward(self, x):
                return super().forward(x.transpose(0, 1).contiguous()).transpose(0, 1)

        for layer in model.model.layers:
            layer.mlp.__class__ = Shuffled
        with pytest.raises(ValueError, match="its layers do not give what weights multiplied by masks would"):
            fm.attach(model, neurons_of(model, 0.5, 0.3))
        fm.attach(model, fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=0))

    def test_sorted_tokens(self):
        """No neurons are found in Llama 4, which sorts tokens before its experts are called."""
        model = tiny_model("llama4_text", "Llama4ForCausalLM")
        assert not any(group.stacked for group in structure_of(model).ffns)

    def test_hooks_and_adapters(self):
        model = tiny_model(*MODELS[0])
        experts = model.model.layers[1].mlp.experts
        handle = experts.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"cannot mask 'model.layers.1.mlp.experts': it has forward hooks"):
            fm.attach(model, neurons_of(model, 0.5))
        handle.remove()
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"its gate_up_proj is .* of torch.int8, and quantised or sharded experts"):
            fm.attach(model, neurons_of(model, 0.5), verify=False)


def test_entries():
    halves, turns = Stacked("x", 1, 2), Stacked("x", 1, 2, interleaved=True)
    live = torch.tensor([0, 2])
    assert halves.entries(live, 3).tolist() == [0, 2, 3, 5]
    assert turns.entries(live, 3).tolist() == [0, 1, 4, 5]
    keep = torch.tensor([True, False, True])
    for stacked in (halves, turns):
        flags = stacked.beside(keep, torch.zeros(4, 6, 2))
        assert flags.shape == (1, 6, 1)
        assert flags.flatten().nonzero().flatten().tolist() == sorted(stacked.entries(live, 3).tolist())
