"""A tiny parser and tiny treebanks for the tests of this folder."""

from __future__ import annotations

import torch

from fastmask.tasks.parsing.parser import Parser, ParserConfig
from fastmask.tasks.parsing.vocabulary import Vocabulary

SENTENCES = [
    {
        "words": ["the", "old", "dog", "barks"],
        "upos": ["DET", "ADJ", "NOUN", "VERB"],
        "heads": [3, 3, 4, 0],
        "deprels": ["det", "amod", "nsubj", "root"],
    },
    {"words": ["run"], "upos": ["VERB"], "heads": [0], "deprels": ["root"]},
    {
        "words": ["she", "was", "seen"],
        "upos": ["PRON", "AUX", "VERB"],
        "heads": [3, 3, 0],
        "deprels": ["nsubj:pass", "aux:pass", "root"],
    },
]


def conllu(sentence: dict) -> str:
    """Return the sentence as a CoNLL-U block."""
    columns = zip(sentence["words"], sentence["upos"], sentence["heads"], sentence["deprels"], strict=True)
    lines = [f"{i}\t{w}\t_\t{u}\t_\t_\t{h}\t{d}\t_\t_" for i, (w, u, h, d) in enumerate(columns, start=1)]
    return "\n".join(lines)


def rows() -> list[dict]:
    """Return the sentences with their blocks, as a treebank has them."""
    return [{**sentence, "conllu": conllu(sentence)} for sentence in SENTENCES]


def small_parser(dropout: float = 0.0, seed: int = 0) -> Parser:
    """Return a parser of two layers with two heads of 8."""
    torch.manual_seed(seed)
    config = ParserConfig(arc_size=16, label_size=8, dropout=dropout)
    parser = Parser.small(
        Vocabulary.build(SENTENCES), 2, 2, 8, 32, buckets=64, max_positions=32, encoder_dropout=dropout, config=config
    )
    # The scorers start at zero; random ones make every test of scores mean something.
    torch.nn.init.normal_(parser.arcs.bilinear.weight)
    torch.nn.init.normal_(parser.labels.forms)
    return parser
