"""A parser as `fastmask train` makes it from scratch, and random sentences of several languages for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import fastmask as fm
from benchmarks.setting import Setting
from fastmask.tasks.parsing.batch import Encoded
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.vocabulary import Vocabulary

__all__ = ["ParserBed"]

UPOS = ("NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "AUX", "PUNCT")
RELATIONS = ("nsubj", "obj", "obl", "nmod", "amod", "advmod", "det", "case", "aux", "cc", "conj", "punct")
SPREAD = 0.5  # of the logarithm of a sentence's length


class ParserBed:
    """The parser, its data by language, and random subnetworks; nothing is attached.

    Sentences have `setting.tokens` words on average and vary as those of treebanks do (log-normal, at most four times
    as many), so that hardly two batches are equally long. Letters, heads and relations are drawn at random: only sizes
    matter to time.

    Args:
        setting: shape, layers, languages, tokens, density, unit.
        sentences: of each language.
        seed: of sentences and weights.
    """

    def __init__(self, setting: Setting, sentences: int, seed: int = 0) -> None:
        self.setting = setting
        self.languages = [f"language {i}" for i in range(setting.languages)]
        rows = {
            name: [_sentence(np.random.default_rng([seed, number, i]), setting.tokens) for i in range(sentences)]
            for number, name in enumerate(self.languages)
        }
        vocabulary = Vocabulary.build((row for own in rows.values() for row in own), "drop")
        sizes = setting.sizes
        torch.manual_seed(seed)
        self.parser = Parser.small(
            vocabulary, setting.layers, sizes.heads, sizes.hidden // sizes.heads, sizes.ffn,
            max_positions=max(64, 4 * setting.tokens + 2),
        )  # fmt: skip
        # The scorers start at zero, and would hand no gradient down.
        for weight in (self.parser.arcs.bilinear.weight, self.parser.labels.forms):
            torch.nn.init.normal_(weight, std=0.02)
        self.data: dict[str, Encoded] = {
            name: self.parser.features.encode(own, vocabulary) for name, own in rows.items()
        }
        config = self.parser.encoder.config
        self.subnets = fm.Subnetworks.random(config, self.languages, setting.density, seed=0, units=setting.unit)


def _sentence(random: np.random.Generator, words: int) -> dict[str, Any]:
    """One sentence as a treebank has it: a random tree whose heads stand before their dependents."""
    length = min(1 + int(words * random.lognormal(-(SPREAD**2) / 2, SPREAD)), 4 * words)
    letters = [chr(ord("a") + int(i)) for i in random.integers(0, 26, size=6 * length)]
    relations = random.integers(len(RELATIONS), size=length)
    return {
        "words": ["".join(letters[6 * i : 6 * i + int(random.integers(2, 7))]) for i in range(length)],
        "upos": [UPOS[int(i)] for i in random.integers(len(UPOS), size=length)],
        "heads": [int(random.integers(0, i)) if i > 1 else i for i in range(length)],
        "deprels": ["root" if i == 0 else RELATIONS[int(relations[i])] for i in range(length)],
    }
