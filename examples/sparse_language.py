"""One more language for a finished run, by changing little: LAS, seconds and bytes of several ways to adapt.

    python examples/sparse_language.py RUN UD --languages UD_Faroese-FarPaHC,UD_Vietnamese-VTB --sentences 20,100,500

RUN is a run of `fastmask train` on treebanks (its full network is taken), UD a folder of treebanks with a train and a
test split. Each way takes the same steps of AdamW on the same sentences, and leaves the parser on top of the encoder as
it is. Trained is all that the run trained of the encoder (`all`), 5% of its weights (`weights`), 10% of its heads and
neurons (`units`), as many random ones (`random`), its biases and norms (`norms`), or LoRA of as many numbers as
`weights` (`lora`; needs peft). `none` changes nothing. Weights and units are those with the largest gradients on the
sentences; the full network runs (`forward="full"`). Seconds are those of choosing and of all steps.
"""

import argparse
import csv
import statistics
import time

import numpy as np
import torch
from torch import nn

import fastmask as fm
from fastmask.subnetworks.controls import random_like
from fastmask.tasks.data.treebanks import load_treebanks
from fastmask.training.run_folder import load_run

# Starting points, which no search has chosen: `--rates` gives others.
RATES = {"none": 0.0, "all": 1e-4, "weights": 3e-4, "units": 3e-4, "random": 3e-4, "norms": 1e-3, "lora": 1e-3}
MASKED = ("weights", "units", "random")

parser = argparse.ArgumentParser()
parser.add_argument("run", help="folder of a finished run on treebanks")
parser.add_argument("data", help="folder of UD_* treebanks")
parser.add_argument("--languages", required=True, help="codes or treebanks, as in hy,UD_Faroese-FarPaHC")
parser.add_argument("--sentences", default="20,100,500")
parser.add_argument("--ways", default=",".join(RATES))
parser.add_argument("--rates", default="", help="other learning rates, as in all=3e-5,lora=3e-3")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--seeds", type=int, default=3, help="draws of the sentences")
parser.add_argument("--test", type=int, default=150, help="test sentences")
parser.add_argument("--precision", default="no", choices=("no", "bf16"))
parser.add_argument("--csv", default="sparse.csv")
options = parser.parse_args()
given = (item.partition("=") for item in options.rates.split(",") if item)
rates = RATES | {name: float(rate) for name, _, rate in given}
ways, counts = options.ways.split(","), [int(count) for count in options.sentences.split(",")]
if wrong := [name for name in (*ways, *rates) if name not in RATES]:
    parser.error(f"there is no way called {', '.join(wrong)} (expected some of {', '.join(RATES)})")
splits = load_treebanks(options.data, options.languages, ["train", "test"])
for language, of in splits.items():
    if len(of["train"]) < max(counts):
        parser.error(f"{language} has {len(of['train'])} training sentences (expected {max(counts)} or more)")


def linear_layers(encoder):
    """The encoder's linear layers inside its blocks, which are what masks and adapters are about."""
    return {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Linear) and "layer" in name}


def weights_of(task, batches, language):
    """5% of the weights, those whose gradients on the sentences are largest."""
    layers = linear_layers(task.encoder)
    sizes = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for batch in batches:
        task.model.zero_grad()
        task.loss(batch).mean.backward()
        for name, layer in layers.items():
            sizes[name] += layer.weight.grad.abs()
    task.model.zero_grad()
    every = torch.cat([size.flatten() for size in sizes.values()])
    least = every.kthvalue(int(0.95 * every.numel())).values
    return fm.Subnetworks([language], weights={name: (size > least)[None] for name, size in sizes.items()})


def units_of(task, batches, language):
    """A tenth of the heads and neurons, those that the loss depends on most, and one of each in every layer."""
    fm.attach(task.encoder, fm.Subnetworks.full(task.encoder, [language], units="both"))
    scores = fm.importance(task.encoder, batches, lambda batch: task.loss(batch).each, language)
    fm.detach(task.encoder)
    keeps = {}
    for kind, score in scores.items():
        keep = score > score.flatten().kthvalue(int(0.9 * score.numel())).values
        keep[torch.arange(len(keep)), score.argmax(1)] = True
        keeps[kind] = keep[None]
    return fm.Subnetworks([language], **keeps)


def subnetworks_of(way, task, batches, language):
    if way == "weights":
        return weights_of(task, batches, language)
    found = units_of(task, batches, language)
    return found if way == "units" else random_like(found, seed=0, model=task.encoder)


def adapt(way, task, batches, language):
    """Take the steps; returns the size of what changed, in bytes."""
    task.model.eval()  # without dropout, as `fastmask adapt`
    encoder, base = task.encoder, {name: value.clone() for name, value in task.encoder.state_dict().items()}
    if way in MASKED:
        fm.attach(encoder, subnetworks_of(way, task, batches, language), forward="full")
        fm.freeze_unmasked(encoder)
        fm.set_language(encoder, language)
    elif way == "lora":
        from peft import LoraConfig, get_peft_model

        layers = linear_layers(encoder)
        few = 0.05 * sum(layer.weight.numel() for layer in layers.values())
        rank = max(1, round(few / sum(sum(layer.weight.shape) for layer in layers.values())))
        get_peft_model(encoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers)))
    trained = [p for p in encoder.parameters() if p.requires_grad and (way != "norms" or p.ndim == 1)]
    of_live = {"model": encoder} if way in MASKED else {}
    kind = fm.LiveAdamW if way in MASKED else torch.optim.AdamW
    optimizer = kind(trained, lr=rates[way], weight_decay=0.0, **of_live)
    for step in range(options.steps):
        optimizer.zero_grad()
        task.loss(batches[step % len(batches)]).mean.backward()
        optimizer.step()
    if way in MASKED:
        return fm.Delta.of(encoder, base, language).nbytes
    return sum(p.numel() * p.element_size() for p in trained)


def score(task, examples):
    with torch.no_grad():
        return task.score(examples, task.predict(examples))["las"]


def batches_of(task, rows, language):
    examples = task.training_examples(rows, language, "support")
    return [
        task.collate(examples.select(np.arange(first, min(first + 16, len(examples)))))
        for first in range(0, len(examples), 16)
    ]


names = ("language", "sentences", "seed", "way", "rate", "las", "seconds", "bytes")
rows = []
for language, of in splits.items():
    order = np.random.default_rng(0).permutation(len(of["test"]))[: options.test]
    test = [of["test"][int(row)] for row in order]
    for count in counts:
        for seed in range(options.seeds):
            drawn = np.random.default_rng([seed, count]).permutation(len(of["train"]))[:count]
            support = [of["train"][int(row)] for row in drawn]
            for way in ways:
                task = load_run(options.run, attached=False).task
                half = options.precision == "bf16"  # copies of weights are not kept: they change
                with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                    began = time.perf_counter()
                    size = 0 if way == "none" else adapt(way, task, batches_of(task, support, language), language)
                    seconds = time.perf_counter() - began
                    las = score(task, task.examples(test))
                rows.append([language, count, seed, way, rates[way], round(las, 2), round(seconds, 1), size])
                print(f"{language}, {count} sentences, seed {seed}, {way}: LAS {las:.2f}, {seconds:.0f} s, {size:,} B")
                with open(options.csv, "w", newline="") as file:
                    csv.writer(file).writerows([names, *rows])
for count in counts:
    means = {way: statistics.mean(row[5] for row in rows if row[1] == count and row[3] == way) for way in ways}
    print(f"{count} sentences, mean LAS: {', '.join(f'{way} {mean:.2f}' for way, mean in means.items())}")
