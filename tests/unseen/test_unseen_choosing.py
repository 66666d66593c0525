"""Which subnetwork an unseen language takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastmask as fm
from fastmask.tasks.parsing.task import Parsing
from fastmask.unseen import UNION, Choice, choose, support_losses, with_language, with_union
from tests.models.tiny_models import batch, tiny
from tests.unseen.toy_unseen import LANGUAGES, parser_with_subnets, support_of


def per_sentence(parser):
    return lambda batch: parser(batch).loss_per_sentence


class TestUnion:
    """`with_union` and `with_language` keep every unit, and the languages that were there."""

    def test_every_unit_that_somebody_owns(self):
        heads = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 1, 0]]], dtype=torch.bool)
        weights = {"x": torch.tensor([[[1, 0]], [[0, 0]]], dtype=torch.bool)}
        union = with_union(fm.Subnetworks(["a", "b"], heads=heads, weights=weights))
        assert union.languages == ("a", "b", "union")
        assert union.heads[:2].equal(heads)
        assert union.heads[2].int().tolist() == [[1, 0, 0], [1, 1, 0]]
        assert union.weights["x"][2].int().tolist() == [[1, 0]]
        assert union.neurons is None

    def test_a_language_of_that_name(self):
        subnets = fm.Subnetworks(["union"], heads=torch.ones(1, 1, 2, dtype=torch.bool))
        with pytest.raises(ValueError, match="'union' has a subnetwork already"):
            with_union(subnets)

    def test_one_more_language(self):
        heads = torch.tensor([[[1, 0, 0]], [[0, 1, 0]]], dtype=torch.bool)
        subnets = fm.Subnetworks(["a", "b"], heads=heads)
        for choice, expected in (
            (Choice(1, "b"), [0, 1, 0]),
            (Choice(-1, "full"), [1, 1, 1]),
            (Choice(2, UNION), [1, 1, 0]),
        ):
            longer = with_language(subnets, "new", choice)
            assert longer.languages == ("a", "b", "new")
            assert longer.heads[:2].equal(heads)
            assert longer.heads[2, 0].int().tolist() == expected
        with pytest.raises(ValueError, match="has a subnetwork already"):
            with_language(subnets, "a", Choice(1, "b"))
        uneven = tiny("bert")
        first = torch.ones(1, *fm.Subnetworks.full(uneven, ["x"]).heads.shape[1:], dtype=torch.bool)
        first[0, 0, 1:] = False
        uneven = fm.extract(fm.attach(uneven, fm.Subnetworks(["x"], heads=first)), "x")
        longer = with_language(fm.Subnetworks.full(uneven, ["a"]), "new", Choice(-1, "full"), uneven)
        assert longer.heads[1].equal(first[0])
        fm.attach(uneven, longer)
        with pytest.raises(KeyError, match="unknown language 'c'"):
            with_language(subnets, "new", Choice(2, "c"))


class TestSupportLosses:
    """All candidates at once have the losses they have one at a time."""

    def test_parser(self):
        parser, subnets = parser_with_subnets()
        one = parser.features.collate(support_of(parser))
        candidates = [2, 0, -1, subnets.index(UNION)]
        found = support_losses(parser, one, candidates, per_sentence(parser))
        expected = []
        for number in candidates:
            name = None if number < 0 else subnets.languages[number]
            with torch.no_grad(), fm.language(parser.encoder, name):
                expected.append(parser(one).loss_per_sentence.mean())
        assert len({round(float(value), 6) for value in expected}) == 4
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("model_type", ["bert", "llama"])
    def test_any_hugging_face_model(self, model_type):
        """As in the README: a model with its own head, and a loss written by the user."""
        model = tiny(model_type, "tokens" if model_type == "bert" else "causal")
        subnets = with_union(fm.Subnetworks.random(model.config, LANGUAGES, 0.5, seed=3, units="both"))
        fm.attach(model, subnets)
        inputs = batch(4)
        inputs["labels"] = torch.randint(0, 2, inputs["input_ids"].shape)

        def loss(batch):
            labels = batch.pop("labels")
            logits = model(**batch).logits
            return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)

        found = support_losses(model, inputs, range(4), loss)
        assert "language_ids" not in inputs
        for number, name in enumerate(subnets.languages):
            ids = subnets.ids([name] * 4)
            with torch.no_grad():
                expected = loss({**inputs, "language_ids": ids}).mean()
            torch.testing.assert_close(found[number], expected, rtol=1e-12, atol=1e-12)

    def test_pieces(self):
        """Batches of subword pieces are repeated as those of trigrams are."""
        from fastmask.tasks.parsing.features import Batch

        parser, _ = parser_with_subnets()
        trigrams = parser.features.collate(support_of(parser))
        pieces = Batch(**{**vars(trigrams), "units": torch.arange(6).view(3, 2), "places": torch.arange(9).view(3, 3)})
        twice = pieces.tiled(2)
        assert twice.units.tolist() == pieces.units.tolist() * 2
        assert twice.places.tolist() == pieces.places.tolist() * 2
        assert twice.lengths_list == pieces.lengths_list * 2
        assert len(twice.word_mask) == 6

    def test_modes_and_gradients(self):
        """Dropout is off while candidates are scored, and modules come back in their mode."""
        parser, _ = parser_with_subnets(dropout=0.5)
        one = parser.features.collate(support_of(parser))
        parser.train()
        parser.arcs.eval()
        modes = [module.training for module in parser.modules()]
        first, second = (support_losses(parser, one, [0, 1], per_sentence(parser)) for _ in range(2))
        assert first.equal(second)
        assert not first.requires_grad
        assert [module.training for module in parser.modules()] == modes

    def test_what_is_wrong(self):
        parser, _ = parser_with_subnets()
        one = parser.features.collate(support_of(parser))
        with pytest.raises(ValueError, match="no candidate"):
            support_losses(parser, one, [], per_sentence(parser))
        with pytest.raises(ValueError, match="out of range: expected 0 to 3"):
            support_losses(parser, one, [4], per_sentence(parser))
        with pytest.raises(ValueError, match=r"one loss for each of the 6 sentences, given shape \(\)"):
            support_losses(parser, one, [0, 1], lambda batch: parser(batch).loss)
        with pytest.raises(ValueError, match="of one size B"):
            support_losses(parser, {"a": torch.zeros(2), "b": torch.zeros(3)}, [0], per_sentence(parser))
        fm.detach(parser.encoder)
        with pytest.raises(ValueError, match="no subnetworks attached"):
            support_losses(parser, one, [0], per_sentence(parser))


class TestChoose:
    """The subnetwork that is chosen is the one the numbers say."""

    def test_best(self):
        """The lowest support loss among the training languages; the union must be asked for."""
        parser, subnets = parser_with_subnets()
        support = support_of(parser)
        choice = choose(Parsing(parser), subnets, support, "best")
        assert list(choice.losses) == LANGUAGES
        assert choice.losses[choice.name] == min(choice.losses.values())
        assert subnets.languages[choice.language_id] == choice.name

    def test_nearest_and_ties(self):
        """The first of equals is taken; what is not a training language plays no part."""
        parser, subnets = parser_with_subnets()
        choice = choose(
            Parsing(parser), subnets, None, "nearest", similarity={"cc": 0.9, "bb": 0.9, "aa": 0.1, "zz": 1.0}
        )
        assert (choice.language_id, choice.name) == (1, "bb")
        assert choice.similarities == {"aa": 0.1, "bb": 0.9, "cc": 0.9}
        assert choice.losses is None

    def test_union_and_full(self):
        parser, subnets = parser_with_subnets()
        assert choose(Parsing(parser), subnets, None, "union") == Choice(3, "union")
        assert choose(Parsing(parser), subnets, None, "full") == Choice(-1, "full")

    def test_what_is_wrong(self):
        parser, subnets = parser_with_subnets()
        support = support_of(parser)
        with pytest.raises(KeyError, match="did you mean 'nearest'"):
            choose(Parsing(parser), subnets, support, "nearst")
        for nothing in (None, support.select(torch.zeros(0, dtype=torch.int64).numpy())):
            with pytest.raises(ValueError, match="needs support sentences, given none"):
                choose(Parsing(parser), subnets, nothing, "best")
        with pytest.raises(ValueError, match="needs the similarity"):
            choose(Parsing(parser), subnets, support, "nearest")
        with pytest.raises(KeyError, match="unknown language 'cc'"):
            choose(Parsing(parser), subnets, support, "nearest", similarity={"aa": 1.0, "bb": 1.0})
        with pytest.raises(ValueError, match="similarity of 'bb' is nan"):
            choose(Parsing(parser), subnets, support, "nearest", similarity={"aa": 1.0, "bb": float("nan"), "cc": 0.0})
        plain = fm.Subnetworks(LANGUAGES, subnets.heads[:3], subnets.neurons[:3])
        with pytest.raises(ValueError, match="hold no 'union'"):
            choose(Parsing(parser), plain, support, "union")
        with pytest.raises(ValueError, match=r"subnetworks of aa, bb, cc, union \(expected aa, bb, cc\)"):
            choose(Parsing(parser), plain, support, "best")
        for sentence in support:
            sentence.heads[:] = -100
        with pytest.raises(ValueError, match="have no heads"):
            choose(Parsing(parser), subnets, support, "best")
