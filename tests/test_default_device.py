"""Another default device: what fastmask makes for itself lies where the model's tensors do, or on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification, BertConfig

import fastmask as fm
from fastmask.subnetworks.controls import full_like, permuted_like, random_like, shared_like

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LANGUAGES = ["de", "fi"]
CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=5
)


class Bench:
    """A model with subnetworks, the same one without, and a batch."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = AutoModelForTokenClassification.from_config(CONFIG).eval()
        self.plain = copy.deepcopy(self.model)
        self.subnets = fm.Subnetworks.random(CONFIG, LANGUAGES, 0.5, seed=0, units="both")
        fm.attach(self.model, self.subnets)
        self.batch = {
            "input_ids": torch.randint(50, (4, 12)),
            "attention_mask": torch.ones(4, 12, dtype=torch.int64),
            "labels": torch.randint(5, (4, 12)),
        }
        self.optimizer = fm.LiveAdamW(self.model.parameters(), model=self.model)
        self.dynamic = fm.DynamicSubnetworks(self.model, every=1)

    def each(self, batch, model=None):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = (model or self.model)(**inputs).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").mean(1)

    def discover(self, **options):
        data = {name: [self.batch] for name in LANGUAGES}
        return fm.discover(self.plain, data, lambda batch: self.each(batch, self.plain), density=0.5, **options)

    def step(self):
        self.model(**self.batch, languages=["de", "de", "fi", None]).loss.backward()
        self.optimizer.step()

    def update(self):
        scores = {name: fm.importance(self.model, [self.batch], self.each, name) for name in LANGUAGES}
        self.dynamic.update(1, scores)

    def episode(self):
        learner = fm.MetaLearner(self.model, lambda b: self.each(b).mean(), inner_steps=2, inner_learning_rate=1e-2)
        learner.episode([fm.meta.Task(name, support=[self.batch], query=self.batch) for name in LANGUAGES])
        self.optimizer.step()


WORK = {
    "steps": Bench.step,
    "updates": Bench.update,
    "episodes": Bench.episode,
    "gradients": lambda bench: bench.discover(units="both"),
    "entropy": lambda bench: bench.discover(units="both", score="entropy"),
    "shapley": lambda bench: bench.discover(score="shapley"),
    "choosing": lambda bench: fm.unseen.support_losses(bench.model, bench.batch, [0, 1, -1], bench.each),
    "languages": lambda bench: fm.add_language(bench.model, "et", bench.subnets.select(["fi"])),
    "controls": lambda bench: (
        [like(bench.subnets) for like in (shared_like, full_like)]
        + [like(bench.subnets, 0, CONFIG) for like in (random_like, permuted_like)]
    ),
    "one": lambda bench: (fm.merge(bench.model, "de"), fm.extract(bench.model, "fi"), fm.summary(bench.model)),
}


@pytest.mark.parametrize("what", WORK)
def test_it_changes_nothing(what):
    """Under `torch.set_default_device` (here of a device that cannot compute) everything works as without."""
    first, second = Bench(), Bench()
    wanted = WORK[what](first)
    with torch.device("meta"):
        found = WORK[what](second)
    if isinstance(wanted, fm.Subnetworks):
        assert found == wanted
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
