"""Exported graphs: a mixed batch in core ATen operators, and one language in ONNX."""

from __future__ import annotations

import pytest
import torch
from covering import covering
from every_model import LANGUAGES, first_of, tiny_model
from torch import Tensor

import fastmask as fm
from fastmask.models.proof import working_inputs

pytestmark = pytest.mark.filterwarnings("ignore")


class First(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, language_ids: Tensor) -> Tensor:
        return first_of(self.model(input_ids=input_ids, language_ids=language_ids, use_cache=False))


MODELS = {"bert": "BertForMaskedLM", "llama": "LlamaForCausalLM", "bloom": "BloomForCausalLM"}


@pytest.mark.parametrize(
    ("names", "masks"), covering({names[0]: names for names in MODELS.items()}, ["units", "weights"])
)
def test_a_mixed_batch_in_core_aten(names, masks):
    """An exported graph runs without fastmask, for any languages, with the same results."""
    model = tiny_model(*names)
    model.config.use_cache = False
    inputs, _ = working_inputs(model)
    if masks == "units":
        subnets = fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1, units="both")
    else:
        linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
        name = next(name for name in linears if ".0." in name)
        keep = torch.rand(3, *model.get_submodule(name).weight.shape) < 0.5
        subnets = fm.Subnetworks(LANGUAGES, weights={name: keep})
    fm.attach(model, subnets)
    words, ids = inputs["input_ids"], torch.tensor([2, 0, 1])
    whole = First(model)
    program = torch.export.export(whole, (words, ids)).run_decompositions(fm.decompositions())
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "fastmask" in target]
    for other in ([2, 0, 1], [1, 1, 0]):
        want = whole(words, torch.tensor(other))
        torch.testing.assert_close(program.module()(words, torch.tensor(other)), want, rtol=1e-6, atol=1e-6)
    for wrong in ([0, 3, 1], [0, -2, 1]):
        with pytest.raises(IndexError):
            program.module()(words, torch.tensor(wrong))


@pytest.mark.slow
@pytest.mark.parametrize("make", [fm.merge, fm.extract])
def test_one_language_in_onnx(make, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny_model("bert", "BertForMaskedLM").float()
    inputs, _ = working_inputs(model)
    fm.attach(model, fm.Subnetworks.random(model, LANGUAGES, 0.5, seed=1, units="both"))
    with fm.language(model, "bb"):
        want = first_of(model(**inputs))
    one = {"input_ids": inputs["input_ids"]}
    torch.onnx.export(make(model, "bb"), (), kwargs=one, dynamo=True).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {name: value.numpy() for name, value in one.items()})[0]
    torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-4, atol=1e-4)
