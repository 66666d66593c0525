"""Translation by encoder-decoders (T5, BART, Marian, mBART, NLLB, M2M100), scored by chrF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask.settings import ConfigError, setting
from fastmask.tasks.pretrained import without_progress_bars
from fastmask.tasks.task import TaskSettings
from fastmask.tasks.transformers_task import IGNORE, LABELS, Examples, TransformersTask


@dataclass
class TranslationSettings(TaskSettings):
    """Settings of translation."""

    source_column: str = setting("source", "column with the text to translate")
    target_column: str = setting("target", "column with its translation")
    source_code: str | None = setting(
        None, "the tokenizer's code for the source language (eng_Latn, en_XX), or the column that holds it"
    )
    target_code: str | None = setting(None, "the same for the target language")
    beams: int = setting(1, "number of beams in generation", low=1)
    max_new_tokens: int = setting(128, "maximum length of a translation, in pieces", low=1)


class Translation(TransformersTask):
    """Target text of source text. Subnetworks cover encoder and decoder."""

    name, metric, auto = "translation", "chrf", "AutoModelForSeq2SeqLM"
    settings, inputs = TranslationSettings, ("source_column",)
    options: TranslationSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        import sacrebleu  # noqa: F401 - whoever does not have it hears so before training

        super().__init__(*args, **kwargs)
        codes = self.options.source_code, self.options.target_code
        self.has_codes = hasattr(self.tokenizer, "src_lang") and hasattr(self.tokenizer, "tgt_lang")
        if any(codes) and not self.has_codes:
            raise ConfigError(
                f"source_code is {codes[0]!r} and target_code {codes[1]!r}, and the tokenizer, a "
                f"{type(self.tokenizer).__name__}, knows no language codes (expected none)"
            )

    def features(self, row: Mapping[str, Any]) -> dict[str, Any]:
        self._set("src_lang", row, self.options.source_code)
        found = self.encoded(row, self.options.source_column)
        if row.get(self.options.target_column) is None:
            return found
        self._set("tgt_lang", row, self.options.target_code)
        target = self.text(row, self.options.target_column)
        labels = self.tokenizer(text_target=target, truncation=True, max_length=self.max_length, verbose=False)
        return {**found, LABELS: list(labels["input_ids"])}

    def _code(self, row: Mapping[str, Any], given: str | None) -> str | None:
        """The tokenizer's code of a language: `given`, or what a column of that name says."""
        if not given:
            return None
        code = row.get(given, given)
        if code is None:  # else that of the row before would count
            raise ValueError(f"{given} says nothing of the language of {row!r:.100} (expected a code in every row)")
        self._number(code)
        return str(code)

    def _number(self, code: str) -> int:
        """The piece of a language code.

        Raises:
            ValueError: there is none.
        """
        get = getattr(self.tokenizer, "get_lang_id", None)
        try:
            number = get(code) if get else self.tokenizer.convert_tokens_to_ids(code)
        except KeyError:
            number = None
        if number is None or (not get and code not in self.tokenizer.get_added_vocab()):  # else any piece would do
            raise ValueError(f"{code!r} is neither a column nor a language code of the {type(self.tokenizer).__name__}")
        return int(number)

    def _set(self, name: str, row: Mapping[str, Any], given: str | None) -> None:
        code = self._code(row, given)
        if code is not None and getattr(self.tokenizer, name) != code:
            setattr(self.tokenizer, name, code)

    def collate(self, examples: Examples, language_ids: Tensor | None = None) -> Any:
        """Pad, and shift the labels to be what the decoder reads."""
        batch = super().collate(examples, language_ids)
        if LABELS in batch:
            batch["decoder_input_ids"] = self._shifted(batch[LABELS])
        return batch

    def _shifted(self, labels: Tensor) -> Tensor:
        if hasattr(self.model, "prepare_decoder_input_ids_from_labels"):
            return self.model.prepare_decoder_input_ids_from_labels(labels=labels.clone())
        start = torch.full_like(labels[:, :1], self.model.config.decoder_start_token_id)
        before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, self.model.config.pad_token_id)
        return torch.cat([start, before], 1)

    def answers(self, batch: Any, examples: Examples) -> list[str]:
        codes = [self._code(row, self.options.target_code) for row in examples.rows]
        found = [""] * len(codes)
        for code in dict.fromkeys(codes):
            rows = [i for i, own in enumerate(codes) if own == code]
            inputs = {name: batch[name][rows] for name in ("input_ids", "attention_mask")}
            with without_progress_bars():  # it also warns of settings that the model was saved with
                made = self.model.generate(
                    **inputs,
                    **self._beginning(code),
                    num_beams=self.options.beams,
                    do_sample=False,
                    max_new_tokens=self.options.max_new_tokens,
                )
            texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                found[row] = text.strip()
        return found

    def _beginning(self, code: str | None) -> dict[str, int]:
        """What a translation into a language begins with: mBART has the code where others have an end of sequence."""
        if code is None:
            return {}
        if self.tokenizer.tgt_lang != code:
            self.tokenizer.tgt_lang = code
        number = self._number(code)
        stands_last = self.tokenizer(text_target="a")["input_ids"][-1] == number
        return {"decoder_start_token_id" if stands_last else "forced_bos_token_id": number}

    def score(self, examples: Examples, predictions: Sequence[str]) -> dict[str, float]:
        """ChrF of the whole, percent, by sacrebleu; of the rows that have a translation."""
        from sacrebleu.metrics import CHRF

        column = self.options.target_column
        pairs = [
            (guess, self.text(row, column))
            for row, guess in zip(examples.rows, predictions, strict=True)
            if row.get(column) is not None
        ]
        if not pairs:
            raise ValueError(f"no row has a translation to score against (column {column!r})")
        guesses, references = zip(*pairs, strict=True)
        return {"chrf": float(CHRF().corpus_score(list(guesses), [list(references)]).score)}
