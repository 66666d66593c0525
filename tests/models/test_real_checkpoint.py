"""A real multilingual encoder through save, load, merge, extract and ONNX: nothing changes but its size."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import fastmask as fm
from fastmask.models.attach import attached

TEXTS = ["query: Das ist gut.", "query: Tämä on hyvä asia.", "query: this"]
IDS = torch.tensor([0, 1, -1])


@pytest.fixture(scope="module")
def encoder(encoder_dir):
    """The attached encoder, and a batch of three languages."""
    model = AutoModel.from_pretrained(encoder_dir).float().eval()
    subnets = fm.Subnetworks.random(model, ["de", "fi"], density=0.5, seed=0, units="both")
    batch = dict(AutoTokenizer.from_pretrained(encoder_dir)(TEXTS, return_tensors="pt", padding=True))
    batch.pop("token_type_ids", None)
    return fm.attach(model, subnets), batch


def states(model, batch, **languages):
    """What the encoder says of every token that is none of padding."""
    with torch.no_grad():
        return model(**batch, **languages)[0][batch["attention_mask"].bool()]


def bytes_of_encoder(model):
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embeddings" not in name)


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_save_and_load(encoder, tmp_path):
    model, batch = encoder
    model.save_pretrained(tmp_path)
    again = fm.from_pretrained(tmp_path).eval()
    assert attached(again).subnets == attached(model).subnets
    assert_same(states(again, batch, language_ids=IDS), states(model, batch, language_ids=IDS))


def test_merge_and_extract(encoder, tmp_path):
    model, batch = encoder
    wanted = states(model, batch, language="fi")
    assert_same(states(fm.merge(model, "fi"), batch), wanted)
    small = fm.extract(model, "fi")
    assert_same(states(small, batch), wanted)
    assert bytes_of_encoder(small) <= 0.62 * bytes_of_encoder(model)
    fm.save_pretrained(small, tmp_path)
    assert_same(states(fm.from_pretrained(tmp_path).eval(), batch), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("make", [fm.merge, fm.extract])
def test_onnx(make, encoder, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batch = encoder
    wanted = states(model, batch, language="fi")
    torch.onnx.export(make(model, "fi"), (), kwargs=batch, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {each.name: batch[each.name].numpy() for each in session.get_inputs()})[0]
    assert_same(torch.from_numpy(found)[batch["attention_mask"].bool()], wanted)
