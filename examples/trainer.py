"""The same task with `transformers.Trainer`: a `language` column and a collator are all that subnetworks need.

    python examples/trainer.py UD_FOLDER ENCODER --languages en,hi,ko --steps 300

Trains the full network, finds each language's subnetwork, trains through these (which change meanwhile, by a callback),
and saves a checkpoint that `fm.from_pretrained` loads.
"""

import argparse

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
from fastmask.tasks.data.treebanks import load_treebanks

options = argparse.ArgumentParser()
options.add_argument("data", help="folder of UD_* treebanks")
options.add_argument("encoder", help="any encoder with a fast tokenizer, on disk or on the Hub")
options.add_argument("--languages", default="en,hi,ko")
options.add_argument("--steps", type=int, default=300, help="of each of the two parts")
options.add_argument("--out", default="trainer-run")
options = options.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.encoder)
splits = load_treebanks(options.data, options.languages, ["train", "test"])
tags = sorted({tag for of in splits.values() for row in of["train"] for tag in row["upos"]})


def tokenised(row):
    pieces = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=96)
    of_word = pieces.word_ids()
    first = [word is not None and word != of_word[place - 1] for place, word in enumerate(of_word)]
    known = [tags.index(tag) if tag in tags else -100 for tag in row["upos"]]
    pieces["labels"] = [known[word] if is_first else -100 for word, is_first in zip(of_word, first, strict=True)]
    return pieces


columns = ["input_ids", "attention_mask", "labels", "language"]
data = {
    name: {split: rows.map(tokenised, load_from_cache_file=False).select_columns(columns) for split, rows in of.items()}
    for name, of in splits.items()
}
model = AutoModelForTokenClassification.from_pretrained(options.encoder, num_labels=len(tags), dtype=torch.float32)
train = concatenate_datasets([of["train"] for of in data.values()])
plain = DataCollatorForTokenClassification(tokenizer)


def arguments(**more):
    return TrainingArguments(
        options.out, max_steps=options.steps, per_device_train_batch_size=24, learning_rate=2e-4, report_to=[],
        logging_steps=max(1, options.steps // 5), remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
        **more,
    )  # fmt: skip


def without_language(examples):
    return plain([{name: value for name, value in example.items() if name != "language"} for example in examples])


def accuracy(predictions):
    right = predictions.predictions.argmax(-1) == predictions.label_ids
    return {"accuracy": float(right[predictions.label_ids != -100].mean())}


# 1. The full network.
Trainer(model, arguments(save_strategy="no"), train_dataset=train, data_collator=without_language).train()

# 2. Each language's half of the heads and neurons.
model.eval().cpu()


def loss_of_each(batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none")
    return losses.sum(1) / (batch["labels"] != -100).sum(1).clamp(min=1)


def some(name, count):
    rows = data[name]["train"].shuffle(seed=0).select(range(min(count, len(data[name]["train"]))))
    return without_language(list(rows))


subnets = fm.discover(model, {name: [some(name, 32)] for name in data}, loss_of_each, units="both", density=0.5)

# 3. Through the subnetworks; examples of all languages stand in one batch.
fm.attach(model, subnets)


class Dynamic(TrainerCallback):
    """Swaps the least important live units for random dead ones; without it the subnetworks are static."""

    def __init__(self):
        self.dynamic = fm.DynamicSubnetworks(model, every=max(1, options.steps // 4), until=options.steps * 3 // 4)

    def on_step_end(self, args, state, control, **kwargs):
        if self.dynamic.due(state.global_step):
            batches = {name: [{key: value.to(args.device) for key, value in some(name, 16).items()}] for name in data}
            scores = {name: fm.importance(model, batch, loss_of_each, name) for name, batch in batches.items()}
            self.dynamic.update(state.global_step, scores)


trainer = Trainer(
    model,
    arguments(save_strategy="no"),
    train_dataset=train,
    data_collator=fm.LanguageCollator(plain, model),
    compute_metrics=accuracy,
    callbacks=[Dynamic()],
)
trainer.train()
for name, of in data.items():
    print(f"{name}: accuracy {100 * trainer.evaluate(of['test'])['eval_accuracy']:.1f}")

# 4. Masks beside the weights.
trainer.save_model(options.out)
print(fm.Subnetworks.load(options.out))
again = fm.from_pretrained(options.out)
