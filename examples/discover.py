"""Finding each language's subnetwork in a model of your own: any loss, any metric."""

import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification, BertConfig

import fastmask as fm

config = BertConfig(vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=128)
model = AutoModelForTokenClassification.from_config(config)  # fine-tuned, in real life


def sentences(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(500, (16, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens % 2}


batches = {"de": [sentences(0), sentences(1)], "fi": [sentences(2), sentences(3)]}


def loss_of_each_sentence(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"]).logits  # no language_ids: `discover` says which language runs
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").mean(1)


def accuracy(language: str) -> float:
    batch = batches[language][0]  # held-out sentences, in real life
    with torch.no_grad():
        return (model(input_ids=batch["input_ids"]).logits.argmax(-1) == batch["labels"]).float().mean().item()


subnets = fm.discover(model, batches, loss_of_each_sentence, accuracy, units="both", tau=0.95, on_round=print)
print(subnets)
print("overlap (Jaccard) of the heads:", subnets.overlap()[0, 1].item())
