"""`fastmask.language` holds in the task, thread or generator that enters it, and wherever a masked layer is reached."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import batch, multiplied, tiny
from torch._dynamo.testing import CompileCounterWithBackend

import fastmask as fm

LANGUAGES = ["aa", "bb", "cc", "dd", "ee", "ff", "gg", "hh"]
INPUTS = batch(2)
SECONDS = 60  # until a thread that waits for another gives up


def attached(seed=3, head="bare", **changes):
    model = tiny("bert", head, **changes)
    return fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed, units="both"))


def answers_of(model):
    """What W * mask gives for INPUTS, by language."""
    plain, subnets = fm.detach(copy.deepcopy(model)), model._fastmask.subnets
    return {name: multiplied(plain, subnets, INPUTS, [i] * 2) for i, name in enumerate(subnets.languages)}


@pytest.fixture
def model():
    return attached()


@pytest.fixture
def answers(model):
    return answers_of(model)


def assert_answer(y, wanted):
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)


def assert_no_language(model):
    with pytest.raises(ValueError, match="no language was given"):
        model(**INPUTS)


class TestTasks:
    def test_two_servers_of_200_interleaved_requests(self):
        """Each answer is in the language of its own request, across tasks, event loops and threads."""
        models = [attached(3), attached(4)]
        wanted = [answers_of(model) for model in models]
        together = threading.Barrier(2)

        async def request(model, number):
            name = LANGUAGES[number * 5 % 8]
            with fm.language(model, name):
                await asyncio.sleep(number % 7 * 1e-4)
                first = model(**INPUTS)[0]
                await asyncio.sleep(number % 3 * 1e-4)
                with fm.language(model, LANGUAGES[number % 8]):
                    await asyncio.sleep(0)
                    inner = model(**INPUTS)[0]
                return name, first, LANGUAGES[number % 8], inner, model(**INPUTS)[0]

        async def serve(model):
            together.wait(SECONDS)
            done = await asyncio.gather(*[request(model, number) for number in range(100)])
            assert_no_language(model)
            return done

        with ThreadPoolExecutor(2) as pool:
            servers = list(pool.map(lambda model: asyncio.run(serve(model)), models))
        for done, answers in zip(servers, wanted, strict=True):
            for name, first, other, inner, last in done:
                assert_answer(first, answers[name])
                assert_answer(inner, answers[other])
                assert_answer(last, answers[name])

    def test_two_loops_share_one_model(self, model, answers):
        """Event loops of two threads do not see each other's languages."""

        async def request(name):
            with fm.language(model, name):
                await asyncio.sleep(1e-3)
                return name, model(**INPUTS)[0]

        async def serve():
            return await asyncio.gather(*[request(LANGUAGES[number % 8]) for number in range(24)])

        with ThreadPoolExecutor(3) as pool:
            for done in pool.map(lambda _: asyncio.run(serve()), range(3)):
                for name, y in done:
                    assert_answer(y, answers[name])

    def test_a_task_keeps_the_language_it_was_started_in(self, model, answers):
        """A task, or a thread of `asyncio.to_thread`, keeps its language when the block that started it is left."""

        async def answer(go):
            await go.wait()
            return model(**INPUTS)[0], await asyncio.to_thread(lambda: model(**INPUTS)[0])

        async def main():
            go = asyncio.Event()
            with fm.language(model, "aa"), fm.language(model, "bb"):
                task = asyncio.create_task(answer(go))
            go.set()
            assert_no_language(model)
            return await task

        for y in asyncio.run(main()):
            assert_answer(y, answers["bb"])


class TestThreads:
    def test_three_threads_with_blocks_that_overlap(self, model, answers):
        """What one thread enters or leaves changes no other's language."""
        together = threading.Barrier(3)

        def run(names):
            found = []
            for name in names:
                together.wait(SECONDS)
                with fm.language(model, name):
                    together.wait(SECONDS)
                    found.append((name, model(**INPUTS)[0]))
            return found

        orders = [LANGUAGES, LANGUAGES[::-1], LANGUAGES[3:] + LANGUAGES[:3]]
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(run, orders):
                for name, y in found:
                    assert_answer(y, answers[name])
        assert_no_language(model)


class TestGenerators:
    def answering(self, model, name, times=3):
        with fm.language(model, name):
            for _ in range(times):
                yield model(**INPUTS)[0]

    def test_a_suspended_generator_has_no_hold_on_its_caller(self, model, answers):
        """While a generator is suspended, its caller has its own language."""
        for y in self.answering(model, "aa"):
            assert_answer(y, answers["aa"])
            assert_no_language(model)
        with fm.language(model, "bb"):
            for y in self.answering(model, "aa"):
                assert_answer(y, answers["aa"])
                assert_answer(model(**INPUTS)[0], answers["bb"])
        assert_no_language(model)

    def test_generators_that_take_turns(self, model, answers):
        """Each generator resumes in its own language, and may end before the others."""
        for first, second in zip(self.answering(model, "aa"), self.answering(model, "bb", times=5), strict=False):
            assert_answer(first, answers["aa"])
            assert_answer(second, answers["bb"])
        gc.collect()
        assert_no_language(model)

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("how", ["close", "collect"])
    def test_generators_that_are_dropped(self, model, answers, first, how):
        """A generator that is closed or collected takes its language with it, and no other's."""
        generators = [self.answering(model, name) for name in ("aa", "bb")]
        for generator in generators:
            next(generator)
        dropped = generators.pop(first)
        if how == "close":
            dropped.close()
        del dropped, generator
        gc.collect()
        assert_answer(next(generators[0]), answers[("aa", "bb")[1 - first]])
        generators.clear()
        gc.collect()
        assert_no_language(model)

    def test_closed_in_another_context(self, model):
        """A generator may be closed in another context than the one that began it."""
        generator = self.answering(model, "aa")
        next(generator)
        contextvars.copy_context().run(generator.close)
        assert_no_language(model)

    def test_async_generators(self, model, answers):
        """As with others: the task that takes the items is not in the language that makes them."""

        async def answering(name):
            with fm.language(model, name):
                for _ in range(2):
                    await asyncio.sleep(0)
                    yield model(**INPUTS)[0]

        async def main():
            async for y in answering("aa"):
                assert_answer(y, answers["aa"])
                assert_no_language(model)
                async for z in answering("bb"):
                    assert_answer(z, answers["bb"])

        asyncio.run(main())

    def test_context_managers_made_of_generators(self, model, answers):
        """The language that a context manager enters holds inside of it."""

        @contextlib.contextmanager
        def inner(name):
            with fm.language(model, name):
                yield

        @contextlib.contextmanager
        def outer(name):
            with contextlib.ExitStack() as stack:
                stack.enter_context(inner(name))
                yield

        @contextlib.asynccontextmanager
        async def waiting(name):
            with fm.language(model, name):
                await asyncio.sleep(0)
                yield

        async def main():
            async with waiting("cc"):
                return model(**INPUTS)[0]

        with outer("aa"):
            assert_answer(model(**INPUTS)[0], answers["aa"])
            with outer("bb"):
                assert_answer(model(**INPUTS)[0], answers["bb"])
        assert_answer(asyncio.run(main()), answers["cc"])

        def taking_turns(name):
            with outer(name):
                yield model(**INPUTS)[0]
                yield model(**INPUTS)[0]

        for first, second in zip(taking_turns("aa"), taking_turns("bb"), strict=True):
            assert_answer(first, answers["aa"])
            assert_answer(second, answers["bb"])
            assert_no_language(model)

    @pytest.fixture
    def in_cc(self, model):
        with fm.language(model, "cc"):
            yield

    def test_fixtures(self, model, answers, in_cc):
        """A pytest fixture is a context manager, too."""
        assert_answer(model(**INPUTS)[0], answers["cc"])


class TestBlocks:
    def test_nested_blocks_of_several_models(self, model, answers):
        """Blocks of one model do not change another's language, in whatever order they are left."""
        other = attached(4)
        wanted = answers_of(other)
        mine, its = fm.language(model, "aa"), fm.language(other, "bb")
        mine.__enter__()
        its.__enter__()
        assert_answer(model(**INPUTS)[0], answers["aa"])
        mine.__exit__(None, None, None)
        assert_no_language(model)
        assert_answer(other(**INPUTS)[0], wanted["bb"])
        its.__exit__(None, None, None)
        assert_no_language(other)

    def test_left_in_another_order(self, model, answers):
        """Leaving blocks in the wrong order is an error, and a block that was left stays left."""
        first, second = fm.language(model, "aa"), fm.language(model, None)
        first.__enter__()
        second.__enter__()
        with pytest.raises(RuntimeError, match=r"language\(model, 'aa'\)` is left while None, entered after it"):
            first.__exit__(None, None, None)
        full = fm.detach(copy.deepcopy(model))
        assert_answer(model(**INPUTS)[0], full(**INPUTS)[0])
        second.__exit__(None, None, None)
        assert_no_language(model)
        with fm.language(model, "bb"):
            assert_answer(model(**INPUTS)[0], answers["bb"])
        assert_no_language(model)

    def test_an_error_inside_is_the_one_that_is_seen(self, model):
        """An error inside the block is the one that is raised, and the language ends with it."""
        with pytest.raises(ZeroDivisionError), fm.language(model, "aa"):
            raise ZeroDivisionError
        assert_no_language(model)

    def test_copies_begin_without_a_language(self, model, answers):
        """A copy made inside a block has no language, and blocks of its own."""
        with fm.language(model, "aa"):
            clone = copy.deepcopy(model)
            assert_no_language(clone)
            with fm.language(clone, "bb"):
                assert_answer(model(**INPUTS)[0], answers["aa"])
                assert_answer(clone(**INPUTS)[0], answers["bb"])

    def test_contexts_keep_nothing(self, model):
        """Contexts keep neither models nor blocks that were left."""
        before = dict(contextvars.copy_context())
        for seed in range(3):
            other = attached(seed)
            with fm.language(other, "aa"), fm.language(model, "bb"):
                pass
        assert dict(contextvars.copy_context()) == before


class TestAroundTheForward:
    """Calls that reach masked layers without the attached model's own forward."""

    def test_base_model(self):
        """The base model under a task head runs in the same language."""
        model = attached(head="tokens")
        plain = fm.detach(copy.deepcopy(model))
        for i, name in enumerate(LANGUAGES[:2]):
            with fm.language(model, name):
                logits = model.classifier(model.bert(**INPUTS)[0])
            assert_answer(logits, multiplied(plain, model._fastmask.subnets, INPUTS, [i] * 2))
        with pytest.raises(RuntimeError, match=r"outside the forward pass.*outside `with fastmask\.language"):
            model.bert(**INPUTS)

    def test_a_forward_that_was_kept(self):
        """A bound forward from before `attach` runs in the language around it."""
        model = tiny("bert")
        forward = model.forward
        fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, 3, units="both"))
        with fm.language(model, "dd"):
            assert_answer(forward(**INPUTS)[0], answers_of(model)["dd"])

    def test_gradients(self, model):
        """Layers that are reached one by one give the same gradients."""
        x = torch.randn(2, 5, 24).double()
        clone = copy.deepcopy(model)
        with fm.language(model, "aa"), fm.language(clone, "aa"):
            model.encoder(x)[0].square().sum().backward()
            with clone._fastmask.router.using(clone._fastmask.router.resolve(None)):
                clone.encoder(x)[0].square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), clone.parameters(), strict=True):
            assert (p.grad is None) is (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)

    def test_projections_are_not_computed_for_layers_that_do_not_ask(self, model, monkeypatch):
        """Q, K and V are computed once, and no activations stay behind."""
        from fastmask.models import layers as layers_module

        calls, run = [], layers_module.run
        monkeypatch.setattr(layers_module, "run", lambda layers, *args: calls.append(layers) or run(layers, *args))
        with fm.language(model, "aa"):
            model.encoder(torch.randn(2, 5, 24).double())
        assert all(len(layers.masks) == 1 for layers in calls)

    def test_a_new_block_inside_a_pass(self, model, answers):
        """A hook may call the model in another language without changing that of the running pass."""
        inner = []

        def ask(*_):
            handle.remove()
            with fm.language(model, "bb"):
                inner.append(model(**INPUTS)[0])

        handle = model.encoder.layer[0].register_forward_hook(ask)
        with fm.language(model, "aa"):
            assert_answer(model(**INPUTS)[0], answers["aa"])
        assert_answer(inner[0], answers["bb"])


class TestCompiled:
    @pytest.fixture
    def model(self):
        """Each layer takes a second to trace, and there is nothing new in the next one."""
        return attached(num_hidden_layers=1)

    def test_contexts_are_looked_at_before_every_call(self, model, answers):
        """A compiled model follows the language, and is traced once for each."""
        torch._dynamo.reset()
        count = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, fullgraph=True, backend=count)

        def answer(name):
            with fm.language(model, name):
                return name, compiled(**INPUTS)[0]

        async def request(number):
            with fm.language(model, LANGUAGES[number % 3]):
                await asyncio.sleep(number % 2 * 1e-3)
                return LANGUAGES[number % 3], compiled(**INPUTS)[0]

        async def main():
            return await asyncio.gather(*[request(number) for number in range(9)])

        found = asyncio.run(main())
        assert count.frame_count == 3
        with ThreadPoolExecutor(1) as pool:
            found += list(pool.map(answer, LANGUAGES[:3]))
        found += [answer(name) for name in LANGUAGES[:3]]
        ids = torch.tensor([0, 1])
        before = compiled(**INPUTS, language_ids=ids)[0]
        with fm.language(model, "aa"):
            found.append(("aa", compiled(**INPUTS)[0]))
        assert_answer(compiled(**INPUTS, language_ids=ids)[0], before)
        assert count.frame_count == 4
        for name, y in found:
            assert_answer(y, answers[name])

    def test_blocks_inside_what_is_compiled(self, model, answers):
        """A compiled function can enter a language, and leaves it at the end."""
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="eager")
        def both(inputs):
            with fm.language(model, "aa"):
                first = model(**inputs)[0]
                with fm.language(model, "bb"):
                    second = model(**inputs)[0]
                return first, second, model(**inputs)[0]

        for _ in range(2):
            for y, name in zip(both(INPUTS), ("aa", "bb", "aa"), strict=True):
                assert_answer(y, answers[name])
            assert_no_language(model)

    def test_in_a_generator(self, model, answers):
        """A compiled model follows the language of a generator that is suspended."""
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")

        def answering(name):
            with fm.language(model, name):
                yield compiled(**INPUTS)[0]
                yield compiled(**INPUTS)[0]

        for first, second in zip(answering("aa"), answering("bb"), strict=True):
            assert_answer(first, answers["aa"])
            assert_answer(second, answers["bb"])
            with pytest.raises(ValueError, match="no language was given"):
                compiled(**INPUTS)

    def test_the_base_model(self, model, answers):
        """A compiled part of a model, called by itself, follows the language."""
        torch._dynamo.reset()
        encoder = torch.compile(model.encoder, fullgraph=True, backend="eager")
        for name in ("aa", "bb", "aa"):
            with fm.language(model, name):
                hidden = model.embeddings(INPUTS["input_ids"])
                mask = torch.where(INPUTS["attention_mask"].bool(), 0.0, -torch.inf).double()[:, None, None]
                assert_answer(encoder(hidden, mask)[0], answers[name])
