"""One more language for a finished run, by changing little: LAS, seconds and bytes of six ways to adapt.

    python examples/sparse_language.py RUN UD_FOLDER --languages fi,vi --sentences 20,100,500 --csv sparse.csv

RUN is a run of `fastmask train` on treebanks (its full network is taken). Each way takes the same steps of AdamW on the
same sentences: everything (`all`), 5% of the encoder's weights (`weights`), 10% of its heads and neurons (`units`),
its biases and norms (`norms`), or LoRA of as many numbers as `weights` (`lora`; needs peft). `none` changes nothing.
Weights and units are those with the largest gradients on the sentences; the full network runs (`forward="full"`).
"""

import argparse
import csv
import statistics
import time

import numpy as np
import torch
from torch import nn

import fastmask as fm
from fastmask.tasks.data.treebanks import load_treebanks
from fastmask.training.run_folder import load_run

WAYS = ("none", "all", "weights", "units", "norms", "lora")
RATES = {"all": 1e-4, "weights": 3e-4, "units": 3e-4, "norms": 1e-3, "lora": 1e-3}

options = argparse.ArgumentParser()
options.add_argument("run", help="folder of a finished run on treebanks")
options.add_argument("data", help="folder of UD_* treebanks")
options.add_argument("--languages", required=True, help="codes or treebanks with a train split, as in fi,vi")
options.add_argument("--sentences", default="20,100,500")
options.add_argument("--ways", default=",".join(WAYS))
options.add_argument("--rates", default="", help="other learning rates, as in all=3e-5,lora=3e-3")
options.add_argument("--steps", type=int, default=60)
options.add_argument("--seeds", type=int, default=3, help="draws of the sentences")
options.add_argument("--test", type=int, default=150, help="test sentences")
options.add_argument("--precision", default="no", choices=("no", "bf16"))
options.add_argument("--csv", default="sparse.csv")
options = options.parse_args()
given = (item.partition("=") for item in options.rates.split(",") if item)
rates = RATES | {name: float(rate) for name, _, rate in given}
ways = options.ways.split(",")


def linear_layers(encoder):
    """The encoder's linear layers inside its blocks, which are what masks and adapters are about."""
    return {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Linear) and "layer" in name}


def largest_gradients(task, batches, language):
    """5% of the weights, those whose gradients on the sentences are largest."""
    layers = linear_layers(task.encoder)
    sizes = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    task.model.eval()
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
    """A tenth of the heads and neurons, those that the loss depends on most."""
    scores = {}

    def loss(batch):
        return task.loss(batch).each

    fm.discover(task.encoder, {language: batches}, loss, units="both", density=0.5, on_scores=scores.__setitem__)
    found = scores[language]
    keeps = {}
    for kind in ("heads", "neurons"):
        score = found[kind]
        least = score.flatten().kthvalue(int(0.9 * score.numel())).values
        keep = score > least
        keep[torch.arange(len(keep)), score.argmax(1)] = True
        keeps[kind] = keep[None]
    return fm.Subnetworks([language], **keeps)


def adapt(way, task, batches, language, size_of_weights):
    """Take the steps; returns the numbers that changed hands, in bytes."""
    base = {name: value.clone() for name, value in task.encoder.state_dict().items()}
    parameters = list(task.model.parameters())
    if way in ("weights", "units"):
        subnets = (largest_gradients if way == "weights" else units_of)(task, batches, language)
        fm.attach(task.encoder, subnets, forward="full")
        fm.freeze_unmasked(task.encoder)
        fm.set_language(task.encoder, language)
    elif way == "lora":
        from peft import LoraConfig, get_peft_model

        layers = linear_layers(task.encoder)
        rank = max(1, round(size_of_weights / sum(sum(layer.weight.shape) for layer in layers.values())))
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers))
        get_peft_model(task.encoder, config)
    if way in ("weights", "units", "lora"):
        trained = [p for p in task.encoder.parameters() if p.requires_grad]
    elif way == "norms":
        trained = [p for name, p in task.encoder.named_parameters() if p.ndim == 1]
    else:
        trained = [p for p in parameters if p.requires_grad]
    if way in ("weights", "units"):
        optimizer = fm.LiveAdamW(trained, lr=rates[way], weight_decay=0.0, model=task.encoder)
    else:
        optimizer = torch.optim.AdamW(trained, lr=rates[way], weight_decay=0.0)
    task.model.eval()  # without dropout, as `fastmask adapt`
    for step in range(options.steps):
        optimizer.zero_grad()
        task.loss(batches[step % len(batches)]).mean.backward()
        optimizer.step()
    if way in ("weights", "units"):
        return fm.Delta.of(task.encoder, base, language).nbytes
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


splits = load_treebanks(options.data, options.languages, ["train", "test"])
names = ("language", "sentences", "seed", "way", "las", "seconds", "bytes")
rows = []
for language, of in splits.items():
    order = np.random.default_rng(0).permutation(len(of["test"]))[: options.test]
    test = [of["test"][int(row)] for row in order]
    for count in map(int, options.sentences.split(",")):
        for seed in range(options.seeds):
            drawn = np.random.default_rng([seed, count]).permutation(len(of["train"]))[:count]
            support = [of["train"][int(row)] for row in drawn]
            for way in ways:
                task = load_run(options.run, attached=False).task
                layers = linear_layers(task.encoder)
                few = 0.05 * sum(layer.weight.numel() for layer in layers.values())
                half = options.precision == "bf16"  # copies of weights are not kept: they change
                with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                    began = time.perf_counter()
                    size = 0 if way == "none" else adapt(way, task, batches_of(task, support, language), language, few)
                    seconds = time.perf_counter() - began
                    las = score(task, task.examples(test))
                rows.append([language, count, seed, way, round(las, 2), round(seconds, 1), size])
                print(f"{language}, {count} sentences, seed {seed}, {way}: LAS {las:.2f}, {seconds:.0f} s, {size:,} B")
                with open(options.csv, "w", newline="") as file:
                    csv.writer(file).writerows([names, *rows])
for count in dict.fromkeys(row[1] for row in rows):
    means = {way: statistics.mean(row[4] for row in rows if row[1] == count and row[3] == way) for way in ways}
    print(f"{count} sentences, mean LAS: {', '.join(f'{way} {mean:.2f}' for way, mean in means.items())}")
