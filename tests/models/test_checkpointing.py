"""Gradient checkpointing recomputes a pass under the languages of its forward pass, whatever holds by then."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from tiny_models import batch, tiny
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import fastmask as fm
from fastmask.models import contexts
from fastmask.models.routing import Route

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")

LANGUAGES = ["aa", "bb", "cc"]
INPUTS, LONGER = batch(2), batch(2, 9)


def without_reentry(function, x):
    return checkpoint(function, x, use_reentrant=False)


def with_reentry(function, x):
    return checkpoint(function, x, use_reentrant=True)


class OwnCheckpoint(torch.autograd.Function):
    """As libraries write theirs."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


WAYS = {"non_reentrant": without_reentry, "reentrant": with_reentry, "own_function": OwnCheckpoint.apply}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def attached(**changes):
    model = tiny("bert", "tokens", **changes).train()
    return fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, 3, units="both"))


def embedded(model, inputs):
    return model.bert.embeddings.word_embeddings(inputs["input_ids"])


def loss(model, inputs, **options):
    return lambda x: model(inputs_embeds=x, attention_mask=inputs["attention_mask"], **options).logits.square().sum()


def hidden(output):
    """Of a layer, which returned a tuple in older releases of transformers."""
    return output[0] if isinstance(output, tuple) else output


def assert_gradients_of(model, *passes):
    """Those of passes (language, inputs), each without checkpointing."""
    clone = copy.deepcopy(model)
    clone.gradient_checkpointing_disable()
    clone.zero_grad()
    for language, inputs in passes:
        with fm.language(clone, language):
            loss(clone, inputs)(embedded(clone, inputs)).backward()
    for (name, p), q in zip(model.named_parameters(), clone.parameters(), strict=True):
        wanted = torch.zeros_like(q) if q.grad is None else q.grad
        found = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def backward_inside(model, language, y):
    with nullcontext() if language == "nothing" else fm.language(model, language):
        y.backward()


class TestWholeCalls:
    """The call of the model is checkpointed, inside `with fastmask.language`."""

    @pytest.mark.parametrize("later", ["nothing", "aa", "bb", None])
    def test_the_backward_pass_is_somewhere_else(self, way, later):
        """Gradients are of the forward pass's language, wherever the backward pass runs."""
        model = attached()
        with fm.language(model, "aa"):
            y = way(loss(model, INPUTS), embedded(model, INPUTS))
        backward_inside(model, later, y)
        assert_gradients_of(model, ("aa", INPUTS))

    def test_without_arguments(self):
        """A checkpointed function that takes no tensor."""
        model = attached()
        with fm.language(model, "aa"):
            y = checkpoint(lambda: model(**INPUTS).logits.square().sum(), use_reentrant=False)
        backward_inside(model, "bb", y)
        assert_gradients_of(model, ("aa", INPUTS))

    def test_passes_of_several_languages(self, way):
        """Of passes that one backward pass recomputes, each runs in its own language."""
        model, total = attached(), 0.0
        passes = [("aa", INPUTS), ("bb", LONGER), (None, INPUTS), ("cc", INPUTS), ("aa", LONGER)]
        for language, inputs in passes:
            with fm.language(model, language):
                total = total + way(loss(model, inputs), embedded(model, inputs))
        backward_inside(model, "bb", total)
        assert_gradients_of(model, *passes)

    def test_several_calls_in_one(self, way):
        """Two calls of one language in one checkpoint."""
        model = attached()
        with fm.language(model, "aa"):
            y = way(lambda x: loss(model, INPUTS)(x) + loss(model, INPUTS)(x), embedded(model, INPUTS))
        backward_inside(model, "bb", y)
        assert_gradients_of(model, ("aa", INPUTS), ("aa", INPUTS))

    def test_language_ids_inside(self, way):
        """Ids that the checkpointed function gives itself are used again."""
        model = attached()
        y = way(loss(model, INPUTS, language_ids=torch.tensor([2, 2])), embedded(model, INPUTS))
        backward_inside(model, "bb", y)
        assert_gradients_of(model, ("cc", INPUTS))

    def test_languages_entered_inside(self, way):
        """Languages that the checkpointed function enters itself come before those from outside."""
        model = attached()

        def both(x):
            with fm.language(model, "aa"):
                first = loss(model, INPUTS)(x)
            with fm.language(model, "bb"):
                return first + loss(model, INPUTS)(x)

        with fm.language(model, "cc"):
            y = way(both, embedded(model, INPUTS))
        backward_inside(model, "cc", y)
        assert_gradients_of(model, ("aa", INPUTS), ("bb", INPUTS))

    def test_one_from_outside_and_one_from_inside(self, way):
        """Where it cannot be told which call had which language, the backward pass raises an error."""
        model = attached()

        def both(x):
            first = loss(model, INPUTS)(x)
            with fm.language(model, "bb"):
                return first + loss(model, INPUTS)(x)

        with fm.language(model, "aa"):
            y = way(both, embedded(model, INPUTS))
        with pytest.raises(ValueError, match=r"called in a backward pass, and no language was given.*inside of it"):
            backward_inside(model, "aa", y)

    def test_under_checkpointed_layers(self, way):
        """A recomputed call that checkpoints its layers itself keeps the language."""
        model = attached()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with fm.language(model, "aa"):
            y = way(loss(model, INPUTS), embedded(model, INPUTS))
        backward_inside(model, "bb", y)
        assert_gradients_of(model, ("aa", INPUTS))


class TestLayers:
    """Layers are checkpointed inside a pass."""

    @pytest.mark.parametrize("later", ["nothing", "bb"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_as_transformers_does(self, use_reentrant, later):
        """A recomputed layer has the language of its own pass."""
        model, total = attached(), 0.0
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        passes = [("aa", INPUTS), ("cc", LONGER), (None, INPUTS)]
        for language, inputs in passes:
            with fm.language(model, language):
                total = total + loss(model, inputs)(embedded(model, inputs))
        backward_inside(model, later, total)
        assert_gradients_of(model, *passes)

    def test_with_a_wrapper_of_torch(self):
        """The wrapper that FSDP puts around layers."""
        model = attached()
        plain = copy.deepcopy(model)
        layers = model.bert.encoder.layer
        for index, layer in enumerate(layers):
            layers[index] = checkpoint_wrapper(layer)
        with fm.language(model, "aa"):
            y = loss(model, INPUTS)(embedded(model, INPUTS))
        backward_inside(model, "bb", y)
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        assert_gradients_of(plain, ("aa", INPUTS))

    def test_around_the_forward(self, way):
        """A layer that is called by itself, as in a model of one's own."""
        model = attached()

        def run(x, run_layer):
            for layer in model.bert.encoder.layer:
                x = run_layer(lambda x, layer=layer: hidden(layer(x)), x)
            return x.square().sum()

        x = embedded(model, INPUTS).detach().requires_grad_()
        with fm.language(model, "aa"):
            run(x, lambda layer, x: layer(x)).backward()
            wanted = x.grad.clone()
            x.grad = None
            y = run(x, way)
        backward_inside(model, "bb", y)
        torch.testing.assert_close(x.grad, wanted, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_threads(self, use_reentrant):
        """Threads recompute side by side, each in its own language."""
        model = attached()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        clone = copy.deepcopy(model)
        clone.gradient_checkpointing_disable()

        def gradients(model, number):
            found = []
            for step in range(4):
                x = embedded(model, INPUTS).detach().requires_grad_()
                with fm.language(model, LANGUAGES[(number + step) % 3]):
                    y = loss(model, INPUTS)(x)
                backward_inside(model, LANGUAGES[number], y)
                found.append(x.grad)
            return found

        wanted = [gradients(clone, number) for number in range(3)]
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                for found, of_one in zip(pool.map(lambda n: gradients(model, n), range(3)), wanted, strict=True):
                    for mine, its in zip(found, of_one, strict=True):
                        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


class TestNothingToGoBy:
    def test_a_call_in_a_backward_pass(self):
        """What runs inside a backward pass has its own language, not that from around it."""
        model, seen = attached(), []
        x = torch.ones(1, requires_grad=True)

        def hook(grad):
            for call in (lambda: model(**INPUTS), lambda: model.bert.encoder.layer[0](torch.zeros(1, 1, 24).double())):
                with pytest.raises(
                    (ValueError, RuntimeError), match="in a backward pass, and no language was given"
                ) as e:
                    call()
                seen.append(e.type)
            with fm.language(model, "aa"):
                seen.append(model(**INPUTS).logits)

        x.register_hook(hook)
        with fm.language(model, "bb"):
            (x * 2).backward()
        assert seen[:2] == [ValueError, RuntimeError]
        with fm.language(model, "aa"):
            assert torch.equal(seen[2], model(**INPUTS).logits)

    def test_a_call_in_the_backward_pass_of_what_was_recomputed(self, way):
        """What a hook runs does not take the language of the checkpoint that its backward pass began in."""
        model, seen = attached(), []

        def ask(grad):
            with pytest.raises(ValueError, match="in a backward pass, and no language was given"):
                model(**INPUTS)
            seen.append(grad)

        def run(x):
            y = loss(model, INPUTS)(x)
            if y.requires_grad:
                y.register_hook(ask)
            return y

        with fm.language(model, "aa"):
            y = way(run, embedded(model, INPUTS))
        backward_inside(model, "bb", y)
        assert seen
        assert_gradients_of(model, ("aa", INPUTS))

    def test_a_checkpoint_that_torch_has_changed(self, monkeypatch):
        """Where a checkpoint can no longer be found, recomputing is an error."""
        monkeypatch.setattr(contexts, "_checkpoint", lambda: None)
        model = attached()
        with fm.language(model, "aa"):
            y = without_reentry(loss(model, INPUTS), embedded(model, INPUTS))
        with pytest.raises(ValueError, match="called in a backward pass, and no language was given"):
            backward_inside(model, "aa", y)

    def test_nothing_stays_behind(self):
        """Neither a checkpoint nor its languages outlive the graph."""
        model = attached()
        of_others = {id(o): o for o in gc.get_objects() if type(o) is Route}  # what other tests have left
        with fm.language(model, "aa"):
            y = with_reentry(loss(model, INPUTS), embedded(model, INPUTS))
            z = without_reentry(loss(model, INPUTS), embedded(model, INPUTS))
        routes = [weakref.ref(o) for o in gc.get_objects() if type(o) is Route and id(o) not in of_others]
        assert len(routes) == 2
        assert isinstance(y.grad_fn, CheckpointFunction._backward_cls)
        del y, z
        gc.collect()
        assert not any(route() for route in routes)


class TestCompiled:
    @pytest.mark.parametrize("later", ["nothing", pytest.param("aa", marks=pytest.mark.slow), "bb"])
    def test_inside_a_checkpoint(self, later):
        """A compiled model is recomputed in the language of its forward pass."""
        torch._dynamo.reset()
        model = attached(num_hidden_layers=1)
        compiled = torch.compile(model, backend="aot_eager")
        with fm.language(model, "bb"):
            compiled(**INPUTS)
        with fm.language(model, "aa"):
            y = checkpoint(lambda: compiled(**INPUTS).logits.square().sum(), use_reentrant=False)
        if later == "bb":
            with pytest.raises(RuntimeError, match="compiled model is recomputed in a backward pass, inside another"):
                backward_inside(model, later, y)
        else:
            backward_inside(model, later, y)
            assert_gradients_of(model, ("aa", INPUTS))

    @pytest.mark.parametrize("later", [pytest.param("nothing", marks=pytest.mark.slow), "bb"])
    def test_around_a_checkpoint(self, later):
        """A checkpoint in what is compiled; layers that transformers checkpoints are such."""
        torch._dynamo.reset()
        model = attached(num_hidden_layers=1)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        compiled = torch.compile(model, backend="aot_eager")
        with fm.language(model, "aa"):
            y = compiled(**INPUTS).logits.square().sum()
        backward_inside(model, later, y)
        assert_gradients_of(model, ("aa", INPUTS))
