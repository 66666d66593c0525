"""Several threads run one attached model at the same time, each with languages of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import batch, tiny

import fastmask as fm

LANGUAGES = ["aa", "bb", "cc"]
SECONDS = 60  # until a thread that waits for another gives up


@pytest.fixture
def model():
    model = tiny("bert")
    return fm.attach(model, fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both"))


def in_threads(function, arguments):
    with ThreadPoolExecutor(len(arguments)) as pool:
        return [future.result() for future in [pool.submit(function, argument) for argument in arguments]]


def test_threads_with_languages_of_their_own(model):
    """Threads that are in one layer at the same time keep their own subnetworks and projections."""
    all_ids = [torch.tensor(ids) for ids in ([0, 0, 1, 2], [2, 1, 1, 0], [1, 1, 1, -1])]
    inputs = batch(4)
    expected = [model(**inputs, language_ids=ids)[0] for ids in all_ids]
    together = threading.Barrier(len(all_ids))
    attention = model.encoder.layer[0].attention

    def wait_for_the_others(*_):
        together.wait(SECONDS)

    for module in (model.embeddings, attention.self.query, attention.output.dense):
        module.register_forward_hook(wait_for_the_others)
    found = in_threads(lambda ids: model(**inputs, language_ids=ids)[0], all_ids)
    for y, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)


def test_a_language_holds_for_the_thread_that_enters_it(model):
    """`with fm.language` of one thread does not reach another."""
    inputs, together = batch(2), threading.Barrier(len(LANGUAGES))
    expected = [model(**inputs, language_ids=torch.tensor([i, i]))[0] for i in range(len(LANGUAGES))]

    def run(name):
        with fm.language(model, name):
            together.wait(SECONDS)
            y = model(**inputs)[0]
            together.wait(SECONDS)
        return y

    for y, wanted in zip(in_threads(run, LANGUAGES), expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    with fm.language(model, "aa"), pytest.raises(ValueError, match="for the thread, task or generator that enters it"):
        in_threads(lambda _: model(**inputs), [None])
