"""The same task with `transformers.Trainer`: a `language` column and a collator are all that subnetworks need.

    python examples/trainer.py UD_FOLDER ENCODER --languages en,hi,ko --unseen fo --steps 300

1. Train the full network. 2. Find each language's subnetwork. 3. Train through the subnetworks, which may change
meanwhile, by a callback (dynamic). 4. Episodes of meta-learning, in a loop beside `Trainer`. 5. Save and load. 6. A
language that was never seen: choose a subnetwork by the loss of 20 sentences, take a few steps through it.
"""

import argparse
import random

import torch
import torch.nn.functional as F
from datasets import concatenate_datasets
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fastmask as fm
from fastmask.meta import Task
from fastmask.tasks.data.treebanks import load_treebanks

options = argparse.ArgumentParser()
options.add_argument("data", help="folder of UD_* treebanks")
options.add_argument("encoder", help="any encoder with a fast tokenizer, on disk or on the Hub")
options.add_argument("--languages", default="en,hi,ko")
options.add_argument("--unseen", default="fo")
options.add_argument("--steps", type=int, default=300, help="of each of the first two parts")
options.add_argument("--out", default="trainer-run")
options = options.parse_args()
torch.manual_seed(0)
draw = random.Random(0)

splits = load_treebanks(options.data, options.languages, ["train"])
tags = sorted({tag for of in splits.values() for row in of["train"] for tag in row["upos"]})
tokenizer = AutoTokenizer.from_pretrained(options.encoder)
model = AutoModelForTokenClassification.from_pretrained(options.encoder, num_labels=len(tags), dtype=torch.float32)
plain = DataCollatorForTokenClassification(tokenizer)


def tokenised(row):
    """Words as pieces; a word's first piece carries its tag."""
    pieces = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=96)
    of_word = pieces.word_ids()
    first = [word is not None and word != of_word[place - 1] for place, word in enumerate(of_word)]
    known = [tags.index(tag) if tag in tags else -100 for tag in row["upos"]]
    pieces["labels"] = [known[word] if is_first else -100 for word, is_first in zip(of_word, first, strict=True)]
    return pieces


def prepared(rows, count=None):
    """All rows or the first ones, as the model reads them; the language stays a column."""
    rows = rows if count is None else rows.select(range(min(count, len(rows))))
    columns = ["input_ids", "attention_mask", "labels", "language"]
    return rows.map(tokenised, load_from_cache_file=False).select_columns(columns)


train = {name: prepared(of["train"]) for name, of in splits.items()}
test = load_treebanks(options.data, f"{options.languages},{options.unseen}", ["test"])
test = {name: prepared(of["test"], 100) for name, of in test.items()}
unseen = test.pop(options.unseen).train_test_split(train_size=20, shuffle=False)
support, test_unseen = unseen["train"], {options.unseen: unseen["test"]}
mixed = concatenate_datasets(list(train.values()))


def arguments(steps=options.steps):
    return TrainingArguments(
        options.out, max_steps=steps, per_device_train_batch_size=24, learning_rate=2e-4, report_to=[],
        logging_steps=max(1, steps // 5), remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
    )  # fmt: skip


def without_language(examples):
    return plain([{name: value for name, value in example.items() if name != "language"} for example in examples])


def batch_of(rows):
    return {name: value.to(model.device) for name, value in without_language(list(rows)).items()}


def some(name, count):
    """A batch of random training sentences of one language."""
    rows = train[name]
    return batch_of(rows.select(draw.sample(range(len(rows)), min(count, len(rows)))))


def loss_of_each(batch):
    """The loss of each sentence, [B]; the caller says which subnetwork runs, or `language_ids` in the batch do."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none")
    return losses.sum(1) / (batch["labels"] != -100).sum(1).clamp(min=1)


def accuracy(predictions):
    right = predictions.predictions.argmax(-1) == predictions.label_ids
    return {"accuracy": float(right[predictions.label_ids != -100].mean())}


def trainer_of(rows, **more):
    """For batches of all languages, each sentence through its subnetwork."""
    collator = fm.LanguageCollator(plain, model)
    return Trainer(model, train_dataset=rows, data_collator=collator, compute_metrics=accuracy, **more)


def report(title, trainer, test=test):
    scores = {name: 100 * trainer.evaluate(rows)["eval_accuracy"] for name, rows in test.items()}
    print(f"{title}: {', '.join(f'{name} {score:.1f}' for name, score in scores.items())}")


# 1. The full network.
Trainer(model, arguments(), train_dataset=mixed, data_collator=without_language).train()

# 2. Each language's half of the heads and neurons.
model.eval()
subnets = fm.discover(model, {name: [some(name, 32)] for name in train}, loss_of_each, units="both", density=0.5)
print("overlap of the languages (Jaccard):", subnets.overlap().tolist())

# 3. Through the subnetworks; examples of all languages stand in one batch. Without the callback they are static.
fm.attach(model, subnets)


class Dynamic(TrainerCallback):
    """Swaps the least important live units for random dead ones."""

    def __init__(self):
        self.dynamic = fm.DynamicSubnetworks(model, every=max(1, options.steps // 4), until=options.steps * 3 // 4)

    def on_step_end(self, args, state, control, **kwargs):
        if self.dynamic.due(state.global_step):
            scores = {name: fm.importance(model, [some(name, 16)], loss_of_each, name) for name in train}
            self.dynamic.update(state.global_step, scores)


trainer = trainer_of(mixed, args=arguments(), callbacks=[Dynamic()])
trainer.train()
report("subnetworks", trainer)

# 4. Episodes: every language takes two steps on a support batch; its query batch says where to go from here. A step of
# `Trainer` is one loss of one batch, so they have a loop of their own.
model.train()
optimizer = fm.LiveAdamW(model.parameters(), lr=2e-4, model=model)
learner = fm.MetaLearner(model, lambda batch: model(**batch).loss, inner_steps=2, inner_learning_rate=1e-3)
for _ in range(max(1, options.steps // 20)):
    optimizer.zero_grad()
    learner.episode([Task(name, [some(name, 8)], some(name, 8)) for name in train])
    optimizer.step()
report("after episodes", trainer)

# 5. Masks beside the weights.
trainer.save_model(options.out)
saved = fm.Subnetworks.load(options.out)
print(saved)
model = fm.from_pretrained(options.out)

# 6. An unseen language: the subnetwork of the lowest support loss, of which only live parts then change.
losses = fm.unseen.support_losses(model, batch_of(support), list(range(len(train))), loss_of_each)
chosen = list(train)[int(losses.argmin())]
fm.add_language(model, options.unseen, saved.select([chosen]))
optimizer = fm.LiveAdamW(model.parameters(), lr=1e-4, model=model)
trainer = trainer_of(support, args=arguments(5), optimizers=(optimizer, None))
report(f"by the subnetwork of {chosen}", trainer, test_unseen)
trainer.train()
report("after five steps on 20 sentences", trainer, test_unseen)
trainer.save_model(options.out)
