"""`transformers.Trainer` on a model with subnetworks: a `language` column and a collator are all it needs."""

import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification, BertConfig, Trainer, TrainingArguments, default_data_collator

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
        "language": ["de", "fi"] * 32,
    }
)
arguments = TrainingArguments("trainer-run", num_train_epochs=2, report_to=[], use_cpu=True, logging_steps=4)
collator = fm.LanguageCollator(default_data_collator, subnets)
Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
