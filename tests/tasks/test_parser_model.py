"""The parser's scores, losses, predictions and files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_parser_features import tokenizer
from toy_parser import SENTENCES, small_parser
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from fastmask.tasks.parsing.features import Features
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.vocabulary import IGNORE, Vocabulary


def batch_of(parser: Parser, sentences: list[dict]):
    """Encode and collate."""
    features: Features = parser.features
    return features.collate(features.encode(sentences, parser.vocabulary))


def pretrained_folder(path, kind: str = "bert"):
    """Save a tiny encoder and tokenizer as they come from the Hub."""
    made = tokenizer("wordpiece")
    torch.manual_seed(1)
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertModel(BertConfig(vocab_size=len(made), max_position_embeddings=24, **sizes))
    else:
        model = DistilBertModel(
            DistilBertConfig(
                vocab_size=len(made), dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=24
            )
        )
    model.save_pretrained(path)
    made.save_pretrained(path)
    return path


def test_arc_scores_do_not_depend_on_padding_or_neighbours() -> None:
    """A sentence's scores do not depend on what else is in its batch."""
    parser = small_parser().eval()
    together = parser(batch_of(parser, SENTENCES))
    assert together.arc_scores.shape == (3, 4, 5)
    for row, sentence in enumerate(SENTENCES):
        alone = parser(batch_of(parser, [sentence]))
        n = len(sentence["words"])
        torch.testing.assert_close(together.arc_scores[row, :n, : n + 1], alone.arc_scores[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.loss_per_sentence[row], alone.loss_per_sentence[0], rtol=1e-5, atol=1e-5)
    assert (together.arc_scores[1, 0, 1:] < -1e8).all()  # padding, and the word itself


def test_loss_equals_the_definition() -> None:
    """The loss of a sentence is the mean over its words of arc plus label cross entropy."""
    parser = small_parser().eval()
    batch = batch_of(parser, SENTENCES)
    out = parser(batch)
    for row, sentence in enumerate(SENTENCES):
        total = 0.0
        for word, (head, deprel) in enumerate(zip(sentence["heads"], sentence["deprels"], strict=True)):
            label = torch.tensor([parser.vocabulary.deprels.index(deprel.split(":")[0])])
            arc = torch.tensor([row]), torch.tensor([word + 1]), torch.tensor([head])
            total += F.cross_entropy(out.arc_scores[row, word][None], torch.tensor([head])).item()
            total += F.cross_entropy(parser.labels(out.states, *arc), label).item()
        assert out.loss_per_sentence[row].item() == pytest.approx(total / len(sentence["words"]), rel=1e-4)
    lengths = batch.lengths
    over_words = (out.loss_per_sentence * lengths).sum() / lengths.sum()
    torch.testing.assert_close(out.loss, over_words)


def test_label_scores_equal_a_loop_over_labels() -> None:
    """The score of a label is the biaffine form d' U_r h, with a 1 appended to d and h."""
    parser = small_parser().eval()
    states = torch.randn(2, 4, 16)
    rows, words, heads = torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1])
    scores = parser.labels(states, rows, words, heads)
    for i in range(3):
        d = F.pad(parser.labels.dependent(states[rows[i], words[i]]), (0, 1), value=1.0)
        h = F.pad(parser.labels.head(states[rows[i], heads[i]]), (0, 1), value=1.0)
        for r in range(len(parser.vocabulary.deprels)):
            torch.testing.assert_close(scores[i, r], d @ parser.labels.forms[r] @ h, rtol=1e-4, atol=1e-5)


def test_words_without_gold_add_nothing() -> None:
    """Words with an unseen label or without a head add nothing to the loss."""
    parser = small_parser().eval()
    batch = batch_of(parser, [SENTENCES[0]])
    full = parser(batch).loss_per_sentence.item()
    arcs_only, nothing = copy.copy(batch), copy.copy(batch)
    arcs_only.deprels = torch.full_like(batch.deprels, IGNORE)
    nothing.heads = torch.full_like(batch.heads, IGNORE)
    arc_loss = F.cross_entropy(parser(batch).arc_scores[0], batch.heads[0]).item()
    assert parser(arcs_only).loss_per_sentence.item() == pytest.approx(arc_loss, rel=1e-5)
    assert arc_loss < full
    assert parser(nothing).loss is None


def test_predictions_are_trees_with_dropout_off() -> None:
    """Predictions are the same in every call, and dropout is on again afterwards."""
    parser = small_parser(dropout=0.5).train()
    batch = batch_of(parser, SENTENCES)
    state = torch.get_rng_state()
    first, second = parser.predict(batch), parser.predict(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert parser.training
    for (heads, labels, again), sentence in zip(zip(*first, second[0], strict=True), SENTENCES, strict=True):
        assert heads.tolist() == again.tolist()
        assert list(heads).count(0) == 1
        assert len(labels) == len(heads) == len(sentence["words"])
    assert first[1] == second[1]
    parser.encoder.eval()  # as a user keeps what is frozen
    parser.predict(batch)
    assert parser.training
    assert not parser.encoder.training


def test_parser_learns_three_sentences() -> None:
    """Every part gets a gradient: three sentences are learnt by heart."""
    torch.manual_seed(0)
    parser = small_parser()
    batch = batch_of(parser, SENTENCES)
    optimizer = torch.optim.Adam(parser.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        parser(batch).loss.backward()
        optimizer.step()
    without = [name for name, p in parser.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    heads, labels = parser.predict(batch)
    assert [h.tolist() for h in heads] == [sentence["heads"] for sentence in SENTENCES]
    assert labels[0] == SENTENCES[0]["deprels"]


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_pretrained_encoder_by_path_and_back_from_a_folder(kind: str, tmp_path) -> None:
    """An encoder on disk can be used, and a saved parser predicts what it did before."""
    folder = pretrained_folder(tmp_path / "hub", kind)
    parser = Parser.pretrained(folder, Vocabulary.build(SENTENCES)).eval()
    assert parser.features.max_positions == 24
    assert not any("pooler" in name for name, _ in parser.named_parameters())
    batch = batch_of(parser, SENTENCES)
    parser.save(tmp_path / "saved")
    again = Parser.load(tmp_path / "saved")
    torch.testing.assert_close(again(batch).arc_scores, parser(batch).arc_scores, rtol=0, atol=0)
    assert not list((tmp_path / "saved").rglob("*.bin")) + list((tmp_path / "saved").rglob("*.pkl"))


def test_small_parser_back_from_a_folder(tmp_path) -> None:
    """A saved parser predicts what it did before, and an incomplete file is refused."""
    parser = small_parser(dropout=0.3).eval()
    batch = batch_of(parser, SENTENCES)
    parser.save(tmp_path)
    again = Parser.load(tmp_path)
    assert not again.training
    torch.testing.assert_close(again(batch).loss, parser(batch).loss, rtol=0, atol=0)
    for name in ("deprels", "upos", "subtypes"):
        assert getattr(again.vocabulary, name) == getattr(parser.vocabulary, name)
    assert again.config == parser.config
    assert (again.features.buckets, again.features.max_positions, again.max_length) == (64, 32, None)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in parser.named_parameters() if p.requires_grad
    }
    with pytest.raises(FileNotFoundError, match="no parser in"):
        Parser.load(tmp_path / "encoder")
    text = (tmp_path / "parser.json").read_text()
    (tmp_path / "parser.json").write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(ValueError, match="version 99"):
        Parser.load(tmp_path)
