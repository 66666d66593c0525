"""One batch, three languages, three subnetworks of one multilingual encoder: the library from Python."""

import torch
from transformers import AutoModelForTokenClassification, BertConfig

import fastmask as fm

config = BertConfig(vocab_size=1000, num_hidden_layers=4, num_labels=17)
model = AutoModelForTokenClassification.from_config(config)  # or .from_pretrained("bert-base-multilingual-cased")

# Masks: here random ones of half the heads and half the neurons; `fm.discover` finds a language's own.
subnets = fm.Subnetworks.random(config, ["de", "fi", "hi"], density=0.5, seed=0, units="both")
fm.attach(model, subnets)

# A mixed-language batch: each example runs through, and updates, the subnetwork of its language.
batch = {"input_ids": torch.randint(1000, (6, 32)), "labels": torch.randint(17, (6, 32))}
loss = model(**batch, language_ids=subnets.ids(["de", "de", "fi", "fi", "hi", "hi"])).loss
loss.backward()

# One language for the whole batch, or the full network.
with fm.language(model, "fi"):
    finnish = model(**batch).logits
with fm.language(model, None):
    full = model(**batch).logits

subnets.save("masks.safetensors")
fm.detach(model).save_pretrained("model")  # the plain Hugging Face model again; its masks are in the file above
print(f"loss {loss.item():.2f}; overlap of the languages' heads:\n{subnets.overlap()}")
