"""Which languages a step is about: noticed in the backward pass, announced, or given."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from literal_adamw import Net, live_flags, random_gradients
from transformers import BertConfig, BertForTokenClassification, GPT2Config, GPT2LMHeadModel

import fastmask as fm
from fastmask.meta import Task
from fastmask.models.editing import set_subnetwork
from fastmask.optim import noticed


def moved(net, optimizer, **options):
    """The languages whose alone the moved weights are: flags of the masked weight that moved."""
    before = net.masked.weight.detach().clone()
    optimizer.step(**options)
    return net.masked.weight != before


def owned(net, *languages):
    return live_flags(net, list(languages))[2]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net("weights")


def optimizer_of(net):
    return fm.LiveAdamW(net.parameters(), lr=1e-2, model=net)


def backward(net, *languages):
    net(torch.randn(len(languages), 6), torch.tensor(languages)).square().sum().backward()


def test_the_batch_of_the_gradients_counts(net):
    """A step moves what the languages of its gradients' batch own."""
    optimizer = optimizer_of(net)
    for languages in ([0], [3], [0, 3], [-1], [1], [0]):
        optimizer.zero_grad()
        backward(net, *languages)
        assert torch.equal(moved(net, optimizer), owned(net, *languages))


def test_accumulated_batches_count_together(net):
    """With gradient accumulation the languages of all its batches move, and in the next step no more."""
    optimizer = optimizer_of(net)
    backward(net, 0)
    backward(net, 3)
    assert torch.equal(moved(net, optimizer), owned(net, 0, 3))
    backward(net, 1)  # gradients were not set to zero: they still hold those of 0 and 3
    assert torch.equal(moved(net, optimizer), owned(net, 0, 1, 3))
    optimizer.zero_grad()
    backward(net, 3)
    assert torch.equal(moved(net, optimizer), owned(net, 3))


def test_hooks_go_with_their_optimizer(net):
    """An optimizer for each phase of training leaves nothing behind on the model when the next takes its place."""

    def hooks():
        parameters = list(net.parameters())
        on_tensors = [p._backward_hooks or {} for p in parameters] + [
            p._post_accumulate_grad_hooks or {} for p in parameters
        ]
        return sum(map(len, [*(module._forward_hooks for module in net.modules()), *on_tensors]))

    optimizer = optimizer_of(net)
    of_one = hooks()
    assert of_one == 3
    for language in (0, 3):
        optimizer = optimizer_of(net)
        gc.collect()
        assert hooks() == of_one
        backward(net, language)
        assert torch.equal(moved(net, optimizer), owned(net, language))
        optimizer.zero_grad()
    del optimizer
    gc.collect()
    assert hooks() == 0
    backward(net, 0)


def test_ids_on_a_device_that_are_written_again_are_an_error(net, monkeypatch):
    """One buffer for the ids of all batches: those of an earlier batch are not taken for those of the last."""
    optimizer, ids = optimizer_of(net), torch.zeros(2, dtype=torch.int64)
    # As on a GPU: read when the step is taken.
    monkeypatch.setattr(noticed, "ids_of_pass", lambda layer, args, kwargs: noticed.Later(args[1]))
    for language in (0, 3):
        ids.fill_(language)
        net(torch.randn(2, 6), ids).square().sum().backward()
    with pytest.raises(RuntimeError, match="were written to between a forward pass and the optimizer's step"):
        optimizer.step()
    assert torch.equal(moved(net, optimizer, languages=[0, 3]), owned(net, 0, 3))


@pytest.mark.parametrize("how", ["optimizer", "model", "in place"])
def test_a_skipped_step_leaves_nothing(net, how):
    """After a step that a GradScaler skips, the skipped batch's languages do not move in the next."""
    optimizer = optimizer_of(net)
    backward(net, 0)
    # The loop of the trainer: forward, zero_grad, backward.
    loss = net(torch.randn(1, 6), torch.tensor([3])).square().sum()
    {"optimizer": optimizer.zero_grad, "model": net.zero_grad, "in place": lambda: optimizer.zero_grad(False)}[how]()
    loss.backward()
    assert torch.equal(moved(net, optimizer), owned(net, 3))


def test_passes_that_leave_no_gradient_do_not_count(net):
    """Evaluation, inner loops and importance scores make no language live."""
    optimizer = optimizer_of(net)
    x = torch.randn(1, 6)
    backward(net, 0)
    with torch.no_grad():
        net(x, torch.tensor([3]))
    net(x, torch.tensor([3])).sum()  # never differentiated
    torch.autograd.grad(net(x, torch.tensor([3])).sum(), list(net.parameters()))
    torch.autograd.grad(net(x.requires_grad_(), torch.tensor([3])).sum(), x)
    assert torch.equal(moved(net, optimizer), owned(net, 0))


def test_several_uses_in_one_backward_pass(net):
    """Of several forward passes behind one loss, all count."""
    optimizer = optimizer_of(net)
    (net(torch.randn(1, 6), torch.tensor([0])).sum() + net(torch.randn(1, 6), torch.tensor([3])).sum()).backward()
    assert torch.equal(moved(net, optimizer), owned(net, 0, 3))


def test_frozen_weights_and_later_ones(net):
    """A layer whose bias alone is trained, or that is unfrozen later, is noticed."""
    net.masked.weight.requires_grad_(False)
    optimizer = optimizer_of(net)
    backward(net, 0)
    assert not moved(net, optimizer).any()
    optimizer.zero_grad()
    net.masked.weight.requires_grad_(True)
    optimizer.zero_grad()
    backward(net, 3)
    assert torch.equal(moved(net, optimizer), owned(net, 3))


def test_given_and_announced_languages(net):
    """What the caller says comes first, and holds for one step."""
    optimizer = optimizer_of(net)
    backward(net, 0)
    assert torch.equal(moved(net, optimizer, languages=torch.tensor([3, 3])), owned(net, 3))
    optimizer.announce([1, 3])
    assert torch.equal(moved(net, optimizer), owned(net, 1, 3))
    assert torch.equal(moved(net, optimizer), owned(net, 0))


def test_gradients_from_nowhere(net):
    """Gradients written by hand are refused unless the languages are given."""
    optimizer = optimizer_of(net)
    random_gradients(net, 0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"'masked'.*languages="):
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(moved(net, optimizer, languages=0), owned(net, 0))


def test_layers_that_have_no_gradient_do_not_count():
    """A layer that is not used any more keeps no language alive."""
    torch.manual_seed(0)
    nets = torch.nn.ModuleList([Net("weights"), Net("weights")])
    optimizer = fm.LiveAdamW(nets.parameters(), lr=1e-2, model=nets)
    backward(nets[0], 0)
    nets.zero_grad()
    backward(nets[1], 3)
    assert torch.equal(moved(nets[1], optimizer), owned(nets[1], 3))


def test_a_gradient_that_took_another_way(net):
    """A gradient that came through no masked layer is not taken for one of an earlier pass."""
    optimizer = optimizer_of(net)
    x = torch.randn(1, 6, requires_grad=True)
    torch.autograd.grad(net(x, torch.tensor([3])).sum(), x)
    net.masked.weight.square().sum().backward()
    with pytest.raises(RuntimeError, match="languages="):
        optimizer.step()


def test_a_parameter_that_takes_anothers_place(net):
    """After loading with `assign=True` the new weight moves where the old one did."""
    optimizer = optimizer_of(net)
    backward(net, 0)
    optimizer.step()
    net.masked.weight = torch.nn.Parameter(net.masked.weight.detach().clone())
    optimizer.add_param_group({"params": [net.masked.weight]})
    optimizer.zero_grad()
    backward(net, 0)
    assert torch.equal(moved(net, optimizer), owned(net, 0))


@pytest.mark.parametrize(
    ("languages", "error", "text"),
    [
        (4, ValueError, "expected 0 to 3"),
        ([-2], ValueError, "expected 0 to 3"),
        ([], ValueError, "at least one"),
        (torch.zeros(2), ValueError, "int64"),
        ([True], ValueError, "True"),
        (["de"], ValueError, "no subnetworks with names: give a number"),
    ],
)
def test_bad_languages(net, languages, error, text):
    """A wrong language is refused before anything moves."""
    optimizer = optimizer_of(net)
    backward(net, 0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=text):
        optimizer.step(languages=languages)
    with pytest.raises(error, match=text):
        optimizer.announce(languages)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


# ---- attached models


CONFIG = BertConfig(
    vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20, num_labels=3,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
NAMES = ["de", "fi", "ko"]


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return BertForTokenClassification(CONFIG)


def subnets(seed=0):
    return fm.Subnetworks.random(CONFIG, NAMES, density=0.5, seed=seed, units="both")


def bert_loss(model, **options):
    ids = torch.arange(12).view(2, 6)
    return model(input_ids=ids, labels=ids % 3, **options).loss


def live_of(model, *languages):
    """Flags of every parameter, from the dense masks."""
    flags = {p: torch.ones_like(p, dtype=torch.bool) for p in model.parameters()}
    for layer in model.modules():
        if isinstance(layer, fm.MaskedLinear) and -1 not in languages:
            dense = layer.mask.to_dense()[list(languages)].any(0)
            flags[layer.weight] = dense
            if layer.mask.kind == "rows":
                flags[layer.bias] = dense[:, 0]
    return flags


def assert_only_moved(model, optimizer, *languages):
    before = {p: p.detach().clone() for p in model.parameters()}
    optimizer.step()
    for p, flags in live_of(model, *languages).items():
        assert torch.equal(p[~flags], before[p][~flags])
        if p.ndim == 2 and p.grad is not None and p.shape[0] != CONFIG.vocab_size and p.shape[0] != 16:
            assert (p != before[p])[flags].float().mean() > 0.5


def test_an_attached_model_under_accelerate(bert):
    """The languages of an attached model are known through `accelerate`, `fm.language` and mixed batches."""
    from accelerate import Accelerator

    fm.attach(bert, subnets())
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(bert, fm.LiveAdamW(bert.parameters(), lr=1e-2, model=bert))
    for languages in ([0, 0], [1, 2], [2, 2], [-1, 0]):
        optimizer.zero_grad()
        accelerator.backward(bert_loss(model, language_ids=torch.tensor(languages)))
        assert_only_moved(bert, optimizer, *languages)
    optimizer.zero_grad()
    with fm.language(bert, "fi"):
        accelerator.backward(bert_loss(model))
    assert_only_moved(bert, optimizer, 1)


@pytest.mark.parametrize("part", ["", "bert"])
def test_names_of_attached_languages(bert, part):
    """Languages can be given by name, also to an optimizer of a part of the model; a misspelt name is refused."""
    fm.attach(bert, subnets())
    model = bert.get_submodule(part)
    optimizer = fm.LiveAdamW(model.parameters(), lr=1e-2, model=model)
    bert_loss(bert, language_ids=torch.zeros(2, dtype=torch.int64)).backward()
    optimizer.announce(["fi", 2])
    assert_only_moved(model, optimizer, 1, 2)
    with pytest.raises(KeyError, match="did you mean 'ko'"):
        optimizer.step(languages="koo")


def test_subnetworks_that_come_go_and_change(bert):
    """Subnetworks attached, changed or detached later change what the optimizer moves."""
    optimizer = fm.LiveAdamW(bert.parameters(), lr=1e-2, model=bert)
    bert_loss(bert).backward()
    assert_only_moved(bert, optimizer, -1)
    fm.attach(bert, subnets())
    ids = torch.zeros(2, dtype=torch.int64)
    for step in range(3):
        optimizer.zero_grad()
        bert_loss(bert, language_ids=ids).backward()
        assert_only_moved(bert, optimizer, 0)
        if step == 0:
            heads, neurons = subnets(seed=1).heads[0], subnets(seed=1).neurons[0]
            set_subnetwork(bert, "de", heads=heads, neurons=neurons)
    fm.detach(bert)
    optimizer.zero_grad()
    bert_loss(bert).backward()
    assert_only_moved(bert, optimizer, -1)


@pytest.mark.parametrize("when", ["before the backward pass", "after it", "between two"])
def test_a_language_that_is_removed_before_the_step(bert, when):
    """If a language is removed before the step, no other is taken for it."""
    fm.attach(bert, subnets())
    optimizer = fm.LiveAdamW(bert.parameters(), lr=1e-2, model=bert)
    loss = bert_loss(bert, language_ids=torch.ones(2, dtype=torch.int64))
    if when == "before the backward pass":
        fm.remove_language(bert, "de")
    loss.backward()
    if when != "before the backward pass":
        fm.add_language(bert, "et", subnets().select(["ko"]))  # the others keep their numbers
        fm.remove_language(bert, "de")
    if when == "between two":
        bert_loss(bert, language_ids=torch.zeros(2, dtype=torch.int64)).backward()
    with pytest.raises(RuntimeError, match="a language was removed since"):
        optimizer.step()
    optimizer.step(languages="fi")
    optimizer.zero_grad()
    bert_loss(bert, language_ids=torch.zeros(2, dtype=torch.int64)).backward()
    fm.add_language(bert, "sv", subnets().select(["ko"]))
    assert_only_moved(bert, optimizer, 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("forward", ["masked", "full"])
@pytest.mark.parametrize("density", [0.75, 0.25], ids=["whole", "compact"])
def test_weights_that_are_stored_transposed(forward, density):
    """GPT-2's transposed weights are stepped, frozen and saved as deltas by their masks."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_head=4, n_layer=2, n_inner=24, vocab_size=30, n_positions=16)
    base = GPT2LMHeadModel(config).double().eval()
    model, masks = copy.deepcopy(base), fm.Subnetworks.random(base, ["de", "fi", "ko"], density, seed=0, units="both")
    fm.freeze_unmasked(fm.attach(model, masks, forward))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (4 + 2)  # all weights, and the biases of c_attn and c_fc
    optimizer = fm.LiveAdamW(trained.values(), lr=1e-2, model=model)
    tokens = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        with fm.language(model, "fi"):
            model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = [module for module in model.modules() if isinstance(module, fm.MaskedLinear)]
    for layer in layers:
        keep = layer.mask.to_dense()[1]
        for p, own in ((layer.weight, keep.t()), (layer.bias, keep[:, 0])):
            if name := next((name for name, other in trained.items() if other is p), None):
                moved = p != base.get_parameter(name)
                assert not moved[~own].any()
                assert moved[own].double().mean() > 0.9
    fm.Delta.of(model, base, "fi").add(base)
    assert all(torch.equal(p, base.get_parameter(name)) for name, p in model.named_parameters())
    states = [state["exp_avg"].numel() for state in optimizer.state.values()]
    assert (sum(states) < sum(p.numel() for p in trained.values())) == (density == 0.25)


def test_scores_and_episodes(bert):
    """An episode's languages move in the next step; those of scores or an inner loop alone do not."""
    fm.attach(bert, subnets())
    optimizer = fm.LiveAdamW(bert.parameters(), lr=1e-2, model=bert)
    learner = fm.MetaLearner(bert, lambda batch: bert_loss(bert), inner_steps=2)
    learner.episode([Task("de", [None], 0), Task("ko", [None], 0)])
    fm.importance(bert, [None], lambda batch: bert_loss(bert).expand(2), "fi")
    assert_only_moved(bert, optimizer, 0, 2)


def test_gradient_checkpointing(bert):
    """Layers that are computed again in the backward pass tell their languages."""
    fm.attach(bert, subnets())
    optimizer = fm.LiveAdamW(bert.parameters(), lr=1e-2, model=bert)
    for reentrant in (False, True):
        bert.gradient_checkpointing_enable({"use_reentrant": reentrant})
        bert.enable_input_require_grads()
        bert.train()
        optimizer.zero_grad()
        bert_loss(bert, language_ids=torch.tensor([1, 1])).backward()
        assert_only_moved(bert, optimizer, 1)


def test_copies_of_the_model_leave_the_optimizer_behind(net):
    """A copy of a watched model, or its file, holds nothing of the optimizer and is not watched."""
    size = len(pickle.dumps(net))
    optimizer = optimizer_of(net)
    backward(net, 0)
    optimizer.step()
    optimizer.zero_grad()
    backward(copy.deepcopy(net), 3)
    assert len(pickle.dumps(net)) < size + 5000
    backward(net, 0)
    assert torch.equal(moved(net, optimizer), owned(net, 0))


# ---- several processes


def one_of_two(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = Net("weights")
    optimizer = optimizer_of(net)
    backward(net, 0 if rank == 0 else 3)
    for p in net.parameters():
        distributed.all_reduce(p.grad)
    found = moved(net, optimizer)
    torch.save({"moved": found, "net": net.state_dict(), "owned": owned(net, 0, 3)}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_same_step(tmp_path):
    """Replicas stay equal: each moves the languages of all."""
    multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["moved"], first["owned"])
    torch.testing.assert_close(first["net"], second["net"], rtol=0, atol=0)


def optimizer_over(*layers):
    net = torch.nn.ModuleList(layers)
    return fm.LiveAdamW(net.parameters(), lr=1e-2, model=net)


def halves():
    return fm.Mask.rows(torch.tensor([[True, True, False, False], [False, False, True, True]]), 4)


def test_layers_that_share_a_weight_both_count():
    """Languages that come through either of two layers with one Parameter are those of its gradient."""
    first, second = fm.MaskedLinear(4, 4, halves(), bias=False), fm.MaskedLinear(4, 4, halves(), bias=False)
    second.weight = first.weight
    optimizer = optimizer_over(first, second)
    second(first(torch.randn(2, 4), torch.tensor([0, 0])), torch.tensor([1, 1])).sum().backward()
    before = first.weight.detach().clone()
    optimizer.step()
    assert (first.weight != before).any(1).all()


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4), (2, 3, 5, 4)])
def test_an_output_may_be_written_to(shape):
    """An activation in place of a masked layer's output does not hide its languages."""
    layer = fm.MaskedLinear(4, 4, halves())
    optimizer = optimizer_over(layer)
    torch.nn.ReLU(inplace=True)(layer(torch.randn(shape), torch.tensor([1, 1]))).sum().backward()
    before = layer.bias.detach().clone()
    optimizer.step()
    assert (layer.bias != before).tolist()[:2] == [False, False]


def test_gradients_that_somebody_else_sets_to_zero_are_gone():
    """Zeroing gradients in place begins anew, as setting them to None does; scaling them does not."""
    layer = fm.MaskedLinear(4, 4, halves(), bias=False)
    optimizer = optimizer_over(layer)
    for language in (0, 1):
        layer(torch.ones(2, 4), torch.tensor([language] * 2)).sum().backward()
        before = layer.weight.detach().clone()
        optimizer.step()
        assert (layer.weight != before).any(1).tolist() == [language == 0] * 2 + [language == 1] * 2
        layer.zero_grad(set_to_none=False)
    optimizer.zero_grad()
    layer(torch.ones(2, 4), torch.tensor([0, 0])).sum().backward()
    layer.weight.grad.mul_(0.5)
    layer(torch.ones(2, 4), torch.tensor([1, 1])).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert (layer.weight != before).any(1).all()


def test_blocks_of_a_transposed_weight():
    """A weight whose rows do not lie together is stepped like one whose rows do."""
    keep = torch.zeros(1, 2, 4, dtype=torch.bool)
    keep[0, 0, 0] = keep[0, 1, 2] = True
    moved = []
    for transposed in (False, True):
        torch.manual_seed(0)
        layer = fm.MaskedLinear(8, 8, fm.Mask.blocks(keep, (4, 2)), bias=False)
        weight = layer.weight.detach()
        layer.weight = torch.nn.Parameter(weight.t().contiguous().t() if transposed else weight)
        optimizer = optimizer_over(layer)
        layer(torch.randn(2, 3, 8), torch.tensor([0, 0])).square().sum().backward()
        optimizer.step()
        moved.append(layer.weight.detach().clone())
    torch.testing.assert_close(*moved)
