"""A task of your own, whole: how similar two sentences are, a number, scored by its correlation with people's.

    fastmask train --task own_task:Similarity --data pairs --model intfloat/multilingual-e5-small --out runs/similarity

`pairs` is a folder with train.jsonl, dev.jsonl and test.jsonl, whose lines have "language", "first", "second" and
"similarity". Run by itself, this file makes a tiny model and data, and trains on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastmask.settings import setting
from fastmask.tasks import Loss, TaskSettings
from fastmask.tasks.pretrained import load_model
from fastmask.tasks.task import Splits
from fastmask.tasks.transformers_task import Examples, TransformersTask


@dataclass
class SimilaritySettings(TaskSettings):
    """Every field is an option of the command: ``--first-column``."""

    first_column: str = setting("first", "column with a sentence")
    second_column: str = setting("second", "column with another one")
    similarity_column: str = setting("similarity", "column with a number, from 0 to 5")


class Similarity(TransformersTask):
    """What `fastmask` asks of it; batches, padding, saving and the rest are those of `TransformersTask`."""

    name, metric, auto = "similarity", "correlation", "AutoModelForSequenceClassification"
    settings = SimilaritySettings
    example_word = "pairs"

    @classmethod
    def new_model(cls, name: str, options: Any, datasets: Splits) -> nn.Module:
        """A pretrained encoder with a head of one number."""
        return load_model(cls.auto, name, num_labels=1)

    def features(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the model sees of a row, and the number to learn."""
        found = self.encoded(row, self.options.first_column, self.options.second_column)
        number = row.get(self.options.similarity_column)
        return found if number is None else {**found, "labels": float(number)}

    def loss_of(self, logits: Tensor, labels: Tensor) -> Loss:
        """Squared error, of each pair and on average."""
        each = (logits[:, 0].float() - labels) ** 2
        return Loss(each.mean(), each, len(each))

    def answers(self, batch: Any, examples: Examples) -> list[float]:
        """One number for each pair of a batch."""
        return self.logits(batch)[:, 0].tolist()

    def score(self, examples: Examples, predictions: Sequence[float]) -> dict[str, float]:
        """Pearson's correlation, percent."""
        gold = [row.get(self.options.similarity_column) for row in examples.rows]
        pairs = np.array([pair for pair in zip(gold, predictions, strict=True) if pair[0] is not None], dtype=float)
        if len(pairs) < 2:
            raise ValueError("fewer than two pairs have a similarity to score against")
        spread = pairs.std(0).prod()
        return {"correlation": 100 * float(np.cov(pairs.T, bias=True)[0, 1] / spread) if spread else 0.0}


def tiny_data_and_model() -> None:
    """Made-up pairs in two languages, and a model of two layers that reads letters."""
    import json
    from pathlib import Path

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    random = np.random.default_rng(0)
    Path("pairs").mkdir(exist_ok=True)
    for split, size in (("train", 40), ("dev", 10), ("test", 10)):
        with open(f"pairs/{split}.jsonl", "w", encoding="utf-8") as file:
            for number in range(size):
                first, second = ("".join(random.choice(list("abcdef"), 6)) for _ in range(2))
                row = {"language": ("de", "fi")[number % 2], "first": first, "second": second}
                print(json.dumps({**row, "similarity": len({*first} & {*second})}), file=file)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdef", *(f"##{letter}" for letter in "abcdef")]
    pieces = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]").save_pretrained("tiny")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(names), pad_token_id=0, **size)).save_pretrained("tiny")


if __name__ == "__main__":
    import shutil
    import sys
    from pathlib import Path

    from fastmask.cli import main

    sys.path.append(str(Path(__file__).parent))  # where `own_task` is
    tiny_data_and_model()
    shutil.rmtree("runs/similarity", ignore_errors=True)
    options = "--data pairs --model tiny --steps 20 --batch-size 8 --encoder-lr 1e-3 --density 0.5 --score-sentences 8"
    raise SystemExit(main(["train", "--task", "own_task:Similarity", "--out", "runs/similarity", *options.split()]))
