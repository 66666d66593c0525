"""`transformers.Trainer` on a model with subnetworks: the `language_ids` column is all it needs."""

import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification, BertConfig, Trainer, TrainingArguments

import fastmask as fm

config = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
model = AutoModelForTokenClassification.from_config(config)
subnets = fm.Subnetworks.random(config, ["de", "fi"], density=0.5, seed=0, units="both")
fm.attach(model, subnets)

generator = torch.Generator().manual_seed(0)
tokens = torch.randint(1000, (64, 16), generator=generator)
data = Dataset.from_dict(
    {
        "input_ids": tokens.tolist(),
        "labels": (tokens % 2).tolist(),
        "language_ids": subnets.ids(["de", "fi"] * 32).tolist(),
    }
)
arguments = TrainingArguments("trainer-run", num_train_epochs=2, report_to=[], use_cpu=True, logging_steps=4)
Trainer(model, arguments, train_dataset=data).train()
