"""The whole method in a plain PyTorch loop, on part-of-speech tags of Universal Dependencies treebanks.

    python examples/plain_loop.py UD_FOLDER ENCODER --languages en,hi,ko --unseen fo --steps 300

1. Train the full network in mixed batches. 2. Find each language's subnetwork. 3. Train through the subnetworks, which
may change meanwhile (dynamic). 4. Episodes of meta-learning. 5. Save and load. 6. A language that was never seen:
choose a subnetwork by the loss of 20 sentences, take a few steps through it.
"""

import argparse
import random

import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification, AutoTokenizer

import fastmask as fm
from fastmask.meta import Task
from fastmask.tasks.data.treebanks import load_treebanks

options = argparse.ArgumentParser()
options.add_argument("data", help="folder of UD_* treebanks")
options.add_argument("encoder", help="any encoder with a fast tokenizer, on disk or on the Hub")
options.add_argument("--languages", default="en,hi,ko")
options.add_argument("--unseen", default="fo")
options.add_argument("--steps", type=int, default=300, help="of each of the first two parts")
options.add_argument("--out", default="tagger")
options = options.parse_args()
torch.manual_seed(0)
draw = random.Random(0)

train = {name: list(of["train"]) for name, of in load_treebanks(options.data, options.languages, ["train"]).items()}
test = load_treebanks(options.data, f"{options.languages},{options.unseen}", ["test"])
test = {name: list(of["test"])[:100] for name, of in test.items()}
support, test[options.unseen] = test[options.unseen][:20], test[options.unseen][20:] or test[options.unseen]
tags = sorted({tag for rows in train.values() for row in rows for tag in row["upos"]})
tokenizer = AutoTokenizer.from_pretrained(options.encoder)
model = AutoModelForTokenClassification.from_pretrained(options.encoder, num_labels=len(tags), dtype=torch.float32)


def batch_of(rows):
    """Words of each sentence as pieces; a word's first piece carries its tag."""
    words = [row["words"] for row in rows]
    batch = tokenizer(
        words, is_split_into_words=True, truncation=True, max_length=96, padding=True, return_tensors="pt"
    )
    labels = torch.full_like(batch["input_ids"], -100)
    for number, row in enumerate(rows):
        of_word = batch.word_ids(number)
        for place, word in enumerate(of_word):
            if word is not None and word != of_word[place - 1] and row["upos"][word] in tags:
                labels[number, place] = tags.index(row["upos"][word])
    return {**batch, "labels": labels}


def some(name, count):
    """A batch of random training sentences of one language."""
    return batch_of(draw.sample(train[name], min(count, len(train[name]))))


def mixed(count):
    """A batch that mixes the languages, and the language of each of its sentences."""
    names = [name for name in train for _ in range(count)]
    return batch_of([draw.choice(train[name]) for name in names]), names


def loss_of_each(batch):
    """The loss of each sentence, [B]; the caller says which subnetwork runs, or `language_ids` in the batch do."""
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


@torch.no_grad()
def accuracy(name, rows=None):
    """Share of tags that are right, in percent."""
    batch = batch_of(rows or test[name])
    model.eval()
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    model.train()
    counted = batch["labels"] != -100
    return 100 * float((found == batch["labels"])[counted].float().mean())


def report(title):
    scores = []
    for name in train:
        with fm.language(model, name):
            scores.append(f"{name} {accuracy(name):.1f}")
    print(f"{title}: {', '.join(scores)}")


# 1. The full network.
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
for _ in range(options.steps):
    batch, _ = mixed(8)
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()
print("full network:", ", ".join(f"{name} {accuracy(name):.1f}" for name in train))

# 2. Drop heads and neurons, a fifth at a time, until half of them are left.
model.eval()
scored = {name: [some(name, 16) for _ in range(2)] for name in train}
subnets = fm.discover(model, scored, loss_of_each, units="both", density=0.5)
print("overlap of the languages (Jaccard):", subnets.overlap().tolist())

# 3. Each sentence of a mixed batch through the subnetwork of its language; every so often the least important live
# units are swapped for random dead ones. Without the last three lines the subnetworks are static.
fm.attach(model, subnets)
model.train()
optimizer = fm.LiveAdamW(model.parameters(), lr=2e-4, model=model)
dynamic = fm.DynamicSubnetworks(model, every=max(1, options.steps // 4), until=options.steps * 3 // 4)
for step in range(1, options.steps + 1):
    batch, names = mixed(8)
    optimizer.zero_grad()
    model(**batch, languages=names).loss.backward()
    optimizer.step()
    if dynamic.due(step):
        scores = {name: fm.importance(model, [some(name, 16)], loss_of_each, name) for name in train}
        dynamic.update(step, scores)
report("subnetworks")

# 4. Episodes: every language takes two steps on a support batch; its query batch says where to go from here.
learner = fm.MetaLearner(model, lambda batch: model(**batch).loss, inner_steps=2, inner_learning_rate=1e-3)
for _ in range(max(1, options.steps // 20)):
    optimizer.zero_grad()
    learner.episode([Task(name, [some(name, 8)], some(name, 8)) for name in train])
    optimizer.step()
report("after episodes")

# 5. Masks beside the weights.
model.save_pretrained(options.out)
tokenizer.save_pretrained(options.out)
model = fm.from_pretrained(options.out)

# 6. An unseen language: the subnetwork of the lowest support loss, of which only live parts then change.
few = batch_of(support)
candidates = list(range(len(train)))
losses = fm.unseen.support_losses(model, few, candidates, loss_of_each)
chosen = list(train)[int(losses.argmin())]
fm.add_language(model, options.unseen, dynamic.history.at(options.steps).select([chosen]))
with fm.language(model, options.unseen):
    before = accuracy(options.unseen)
    optimizer = fm.LiveAdamW(model.parameters(), lr=1e-4, model=model)
    for _ in range(5):
        optimizer.zero_grad()
        model(**few).loss.backward()
        optimizer.step()
    print(
        f"{options.unseen} by {chosen}: {before:.1f}, after five steps on 20 sentences {accuracy(options.unseen):.1f}"
    )
model.save_pretrained(options.out)
