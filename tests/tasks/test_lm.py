"""Language modelling: what is masked when, what a perplexity is over, and long texts."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_tasks import CASES, config_of, rows_of

from fastmask.settings import ConfigError
from fastmask.tasks.lm import LanguageModelling
from fastmask.training.methods import draws_for


@pytest.fixture
def model(tiny, tmp_path):
    """A language model, masked or causal, with a new head where it had none."""

    def build(name, **changes):
        config = config_of(name, tiny(name), tmp_path / "run", **changes)
        data = LanguageModelling.load(config.data, config.languages, config.task_settings)
        return LanguageModelling.build(config, data)

    return build


def test_masks_are_drawn_in_training_and_fixed_otherwise(model):
    """Dev scores are repeatable, and training masks other tokens each time, by torch's random numbers."""
    task = model("masked")
    examples = task.examples(rows_of(CASES["masked"], "aa", "train"))

    def masked(part):
        batch = task.collate(part)
        return batch["input_ids"].tolist(), batch["labels"].tolist()

    task.model.eval()
    state = torch.get_rng_state()
    fixed = masked(examples.select([1, 2, 3]))
    assert fixed == masked(examples.select([1, 2, 3]))
    assert torch.equal(state, torch.get_rng_state())
    alone = task.collate(examples.select([2]))["labels"][0].tolist()
    assert fixed[1][1][: len(alone)] == alone  # whatever else is in the batch
    task.model.train()
    torch.manual_seed(1)
    first, second = masked(examples), masked(examples)
    torch.manual_seed(1)
    assert first == masked(examples) != second


def test_units_are_scored_on_the_same_masks_whoever_asks(model, tiny, tmp_path):
    """Subnetworks depend neither on torch's random numbers nor on which languages a process finds them for."""
    task, config = model("masked"), config_of("masked", tiny("masked"), tmp_path / "run")
    data = LanguageModelling.load(config.data, config.languages, config.task_settings)
    train = {name: task.training_examples(splits["train"], name) for name, splits in data.items()}
    task.model.train()
    found = []
    for only in (None, ["bb"], ["bb"]):
        torch.rand(1)
        found.append(draws_for(task, train, {}, config, only=only)[0].subnetworks.select(["bb"]))
    assert found[0] == found[1] == found[2]
    assert task.model.training


def test_the_share_that_is_masked(model):
    """The share asked for is masked, without special pieces and padding: 80% masks, 10% random, 10% kept."""
    task = model("masked")
    task.model.train()
    torch.manual_seed(0)
    words = [{"text": " ".join(f"aa{n % 8}" for n in range(20))}] * 400 + [{"text": "aa1"}]
    examples = task.examples(words)
    batch = task.collate(examples)
    chosen, true = batch["labels"] != -100, [item["input_ids"] for item in examples]
    assert chosen.sum(1).tolist() == [6] * 400 + [1]  # 30% of 20, and at least one
    kinds = {"mask": 0, "same": 0, "other": 0}
    for row, label, ids in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), true, strict=True):
        for place, original in enumerate(ids):
            if label[place] == -100:
                assert row[place] == original
                continue
            assert label[place] == original > 4
            kinds["mask" if row[place] == 4 else "same" if row[place] == original else "other"] += 1
    total = sum(kinds.values())
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.03)
    assert kinds["same"] / total == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_perplexity_is_over_all_tokens(name, model):
    """Perplexity is over all tokens of all texts, without padding and first tokens."""
    task = model(name)
    examples = task.examples(rows_of(CASES[name], "aa", "train"))
    found = task.predict(examples, 5)
    losses, tokens = [], 0
    task.model.double().eval()
    for row in range(len(examples)):
        batch = task.collate(examples.select([row]))
        with torch.no_grad():
            scores = task.logits(batch)[0].log_softmax(-1)
        labels = batch["labels"][0].tolist()
        if name == "causal":
            scores, labels = scores[:-1], labels[1:]
        own = [-scores[place, label].item() for place, label in enumerate(labels) if label != -100]
        assert found[row]["tokens"] == len(own)
        assert found[row]["perplexity"] == pytest.approx(math.exp(sum(own) / len(own)), rel=1e-4)
        losses += own
        tokens += len(own)
    assert task.score(examples, found) == {"perplexity": pytest.approx(math.exp(sum(losses) / tokens), rel=1e-4)}
    with pytest.raises(ValueError, match="no token to predict"):
        task.score(examples, [{"loss": 0.0, "tokens": 0, "perplexity": None}])


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_long_texts_are_trained_on_in_pieces(name, model):
    """All of a long text is trained on, and a text without tokens is not."""
    task = model(name, max_length=8)
    words = [f"aa{n % 8}" for n in range(20)]
    with pytest.warns(UserWarning, match="^aa: 1 of 2 training texts have no token to predict and are left out$"):
        examples = task.training_examples([{"text": " ".join(words)}, {"text": ""}], "aa")
    room = 8 if name == "causal" else 6
    assert examples.lengths.tolist() == [min(room, 20 - first) + 8 - room for first in range(0, 20, room)]
    ids = [i for item in examples for i in item["input_ids"] if i > 4]
    assert task.tokenizer.convert_ids_to_tokens(ids) == words
    with pytest.raises(ValueError, match="no training texts with a token to predict"):
        task.training_examples([{"text": ""}], "aa")


def test_the_kind_is_that_of_the_model_or_of_the_setting(model):
    """BERT is masked and GPT-2 causal, unless the setting says otherwise."""
    assert type(model("masked").model).__name__ == "BertForMaskedLM"
    assert type(model("causal").model).__name__ == "GPT2LMHeadModel"
    task = model("masked", task_options={"kind": "causal"})
    assert type(task.model).__name__ == "BertLMHeadModel"
    batch = task.collate(task.examples([{"text": "aa1 aa2 aa3"}]))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 3] = 9
    with torch.no_grad():
        assert torch.equal(task.logits(batch)[0, :3], task.logits(changed)[0, :3])  # nothing of what comes after


def test_masking_needs_a_mask(model, tiny, tmp_path):
    """A tokenizer without a mask piece is refused before training."""
    task = model("masked")
    task.tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no mask"):
        LanguageModelling(task.model, task.tokenizer, task.options)


@pytest.mark.parametrize("texts", [[""], ["", "aa1 aa2"]], ids=["alone", "beside another"])
def test_an_empty_text_has_no_perplexity(model, texts):
    """A causal tokenizer makes nothing at all of an empty line; a file that has one is predicted all the same."""
    task = model("causal")
    found = task.predict(task.examples([{"text": text} for text in texts]))
    assert found[0] == {"loss": 0.0, "tokens": 0, "perplexity": None}
    assert all(math.isfinite(one["loss"]) for one in found)
