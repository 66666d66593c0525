"""Copies, pickles and other processes get an attached model that works, and is their own."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from processes import FORKSERVER
from tiny_models import batch, multiplied, tiny

import fastmask as fm
from fastmask.models.layers import AttachedLinear

LANGUAGES = ["aa", "bb", "cc"]
IDS = [1, 0, -1, 2]


def subnetworks(model):
    return fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both")


def run(model):
    return model(**batch(len(IDS)), language_ids=torch.tensor(IDS))[0]


@pytest.fixture
def model():
    model = tiny("bert", "tokens")
    return fm.attach(model, subnetworks(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle of a copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "torch.save": by_torch,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_model_of_its_own(model, how):
    """A copy answers as the original does, with masks, languages and weights of its own, and can be detached."""
    expected, copied = run(model), COPIES[how](model)
    assert type(copied) is type(model)
    assert torch.equal(run(copied), expected)
    of_each = [{m for m in one.modules() if isinstance(m, AttachedLinear)} for one in (model, copied)]
    assert len(of_each[0]) == len(of_each[1]) == 12
    assert len({layer.router for layer in of_each[0]} | {layer.router for layer in of_each[1]}) == 2
    with fm.language(model, "bb"), pytest.raises(ValueError, match="no language was given"):
        copied(**batch(2))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not run(copied).any()
    fm.detach(copied)
    assert not any(isinstance(module, AttachedLinear) for module in copied.modules())
    assert not copied(**batch(2))[0].any()
    assert torch.equal(run(model), expected)


def test_places_are_looked_after_in_a_copy(model):
    """A layer that is replaced in a copy is noticed there, and the original still runs."""
    copied = copy.deepcopy(model)
    copied.bert.encoder.layer[0].output.dense = torch.nn.Linear(20, 24).double()
    with pytest.raises(ValueError, match=r"masked layer 'bert\.encoder\.layer\.0\.output\.dense' was replaced"):
        run(copied)
    run(model)


def test_tables_stay_behind(model):
    """What products keep of the masks is not copied or sent along."""
    before = len(pickle.dumps(model))
    run(model).sum().backward()
    model.zero_grad()
    assert len(pickle.dumps(model)) == before


def test_old_weights_are_let_go(model):
    """Weights that loading or sharding has replaced would stay in memory, and in every pickle."""
    linear = fm.detach(model).bert.encoder.layer[0].output.dense
    fm.attach(model, subnetworks(model))
    size = len(pickle.dumps(model))
    before = [weakref.ref(parameter) for parameter in model.parameters()]
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    gc.collect()
    assert linear.weight is model.get_parameter("bert.encoder.layer.0.output.dense.weight")
    assert not [ref for ref in before if ref() is not None]
    assert len(pickle.dumps(model)) == size
    expected, parameters = model.state_dict(), {id(parameter) for parameter in model.parameters()}
    fm.detach(model)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_shallow_copy_shares_everything(model):
    """`copy.copy` shares the modules: detached, they are no longer masked in either, and that is not hidden."""
    shallow = copy.copy(model)
    assert torch.equal(run(shallow), run(model))
    fm.detach(shallow)
    with pytest.raises(ValueError, match=r"query' was replaced by torch\.nn\.modules\.linear\.Linear after attach"):
        run(model)


def test_a_detached_model_is_found_under_its_own_class(model):
    """Nothing of fastmask is in the pickle of a model that was detached."""
    content = pickle.dumps(fm.detach(model))
    assert b"fastmask" not in content
    assert type(pickle.loads(content)).__module__.startswith("transformers.")


def answers(model):
    """Outputs for a mixed batch, and for each language alone, computed in another process."""
    torch.set_num_threads(1)
    alone = []
    for name in LANGUAGES:
        with fm.language(model, name), torch.no_grad():
            alone.append(model(**batch(1))[0].tolist())
    return run(model).tolist(), alone


def test_another_process(model):
    """A process that is sent the model answers in the languages it is asked for."""
    with ProcessPoolExecutor(1, FORKSERVER) as pool:
        mixed, alone = pool.submit(answers, model).result(120)
    plain = tiny("bert", "tokens")
    expected = multiplied(plain, subnetworks(plain), batch(len(IDS)), IDS)
    torch.testing.assert_close(torch.tensor(mixed).double(), expected, rtol=1e-5, atol=1e-5)
    for number, found in enumerate(alone):
        wanted = multiplied(plain, subnetworks(plain), batch(1), [number])
        torch.testing.assert_close(torch.tensor(found).double(), wanted, rtol=1e-5, atol=1e-5)


def test_masks_of_shared_memory(model):
    """`share_memory` is for parameters; masks are as they were."""
    expected = run(model)
    assert torch.equal(run(model.share_memory()), expected)
