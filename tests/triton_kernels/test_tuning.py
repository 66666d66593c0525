"""Measured block sizes: kept on disk, taken by later launches, chosen by time."""

from __future__ import annotations

import json

import pytest
import torch
import triton
from fastmask_kernels import autotune, configs, row_owned_grad
from fastmask_kernels import row_matmul as row_matmul_module
from fastmask_kernels import row_matmul_t as row_matmul_t_module
from fastmask_kernels import tile_matmul as tile_matmul_module
from fastmask_kernels.configs import Config
from fastmask_kernels.plan import Plan
from fastmask_kernels.row_matmul import row_matmul, row_matmul_kernel
from fastmask_kernels.row_matmul_t import row_matmul_t
from fastmask_kernels.row_weight_grad import row_weight_grad
from fastmask_kernels.tile_layout import TileLayout
from fastmask_kernels.tile_matmul import tile_matmul

SMALL = Config((("BM", 16), ("BN", 16), ("BK", 16), ("GROUP", 2)), 4, 2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs._remembered.cache_clear()
    yield
    configs._remembered.cache_clear()


def setting(rows=4, tokens=8):
    plan = Plan(torch.tensor([0, 1, 0, 1])[:rows], tokens, 2)
    return torch.randn(plan.n_rows, 32), plan


def test_kept_on_disk_and_read_by_another_process():
    """What was measured comes back as it was, in another process, too."""
    x, plan = setting()
    assert configs.tuned("row_matmul", x, torch.float32, [16], [32], plan, False) is None
    configs.remember(configs.problem("row_matmul", x, torch.float32, [16], [32], plan, False), SMALL)
    configs._remembered.cache_clear()  # as another process would start
    assert configs.tuned("row_matmul", x, torch.float32, [16], [32], plan, False) == SMALL
    assert configs.tuned("row_matmul", x, torch.float32, [16], [48], plan, False) is None
    assert configs.tuned("row_matmul", x, torch.float32, [16], [32], plan, True) is None


def test_another_number_of_tokens_is_another_problem_only_if_far_off():
    """Similar numbers of tokens share a config; far larger ones have their own."""
    x, plan = setting(tokens=8)
    near, far = setting(tokens=9)[1], setting(tokens=80)[1]
    name = configs.problem("k", x, None, [], [1], plan, False)
    assert configs.problem("k", x, None, [], [1], near, False) == name
    assert configs.problem("k", x, None, [], [1], far, False) != name


def test_another_width_is_another_problem_only_if_far_off_or_odd():
    """Packed widths are those of the batch's largest language: what was measured for one serves those near it."""
    x, plan = setting()

    def name(*widths):
        return configs.problem("k", x, None, widths, [32], plan, False)

    assert name(2048) == name(1936) == name(2080)
    assert name(2048) != name(1024)
    assert name(2048) != name(2051), "which no 16-byte copies reach"
    assert name(384, 384, 384) == name(400, 384, 368) != name(384)
    assert len({name(width) for width in range(16, 4097, 16)}) < 20


BROKEN = ["", "{", "[]", "3", '{"format": 99, "configs": {}}', '{"format": 2, "configs": [1]}', "[" * 100_000, "\xff"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_counts_as_none(content):
    """A broken cache stops no launch."""
    configs.cache_file().parent.mkdir(parents=True)
    configs.cache_file().write_text(content, encoding="latin-1")
    x, plan = setting()
    assert configs.tuned("row_matmul", x, torch.float32, [16], [32], plan, False) is None
    configs.remember("other", SMALL)
    assert json.loads(configs.cache_file().read_text())["configs"].keys() == {"other"}


def test_it_is_written_whole(tmp_path, monkeypatch):
    """A link to the file stays one, and a write that fails leaves what was there and nothing else."""
    (tmp_path / "real.json").touch()
    configs.cache_file().parent.mkdir(parents=True)
    configs.cache_file().symlink_to(tmp_path / "real.json")
    configs.remember("a", SMALL)
    assert configs.cache_file().is_symlink()
    before = (tmp_path / "real.json").read_text()
    assert '"a"' in before
    monkeypatch.setattr(json, "dump", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        configs.remember("b", SMALL)
    assert (tmp_path / "real.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fastmask", "real.json"]


def test_a_launch_takes_it(monkeypatch):
    """A launch uses the config that was measured."""
    x, plan = setting()
    arguments = (x, [torch.randn(16, 32)], [torch.arange(16).expand(2, 16).contiguous()], [torch.tensor([16, 8])])
    plainly = row_matmul(*arguments, plan, [16])[0]
    configs.remember(configs.problem("row_matmul", x, torch.float32, [16], [32], plan, False), SMALL)
    seen = {}
    original = type(row_matmul_kernel).__getitem__

    def spying(kernel, grid):
        launch = original(kernel, grid)

        def launched(*args, **kwargs):
            seen.update(kwargs)
            return launch(*args, **kwargs)

        return launched

    monkeypatch.setattr(type(row_matmul_kernel), "__getitem__", spying)
    torch.testing.assert_close(row_matmul(*arguments, plan, [16])[0], plainly)
    assert seen["BM"] == 16
    assert seen["BN"] == 16


def test_block_sizes_of_large_heads_are_not_those_of_small_ones(monkeypatch):
    """What was measured for heads of 128 serves their dW, and leaves that of heads of 64 alone."""
    plan = Plan(torch.tensor([0, 1]), 8, 2)
    x, dy, index = torch.randn(16, 32), torch.randn(16, 128), torch.arange(128).expand(2, 128).contiguous()
    counts, measured = torch.tensor([128, 128]), Config((("BM", 16), ("BN", 128), ("BK", 16)), 4, 2)
    with monkeypatch.context() as patch:
        patch.setitem(configs.ROW_OWNED_GRAD, ("sm_90", "ieee"), [measured])
        patch.setattr(triton.testing, "do_bench", lambda run, return_mode: run() and 1.0)
        autotune.tune_rows(x, [torch.randn(128, 32)], index, counts, plan, 128)
    taken = []
    monkeypatch.setattr(row_owned_grad, "Prepared", lambda *_, **options: taken.append(options["BN"]))
    for unit in (128, 64):
        row_weight_grad([dy], x, [index], [counts], plan, [128], weight_dtype=x.dtype, units=[unit])
    assert taken[0] == 128
    assert 64 % taken[1] == 0


def test_three_projections_are_measured_and_taken(monkeypatch):
    """Q, K and V go in one launch, which has block sizes of its own."""
    plan = Plan(torch.tensor([0, 1]), 8, 2)
    x, weights, index = torch.randn(16, 32), [torch.randn(16, 32)] * 3, torch.arange(16).expand(2, 16).contiguous()
    rows = [index] * 3, [torch.tensor([16, 8])] * 3, plan
    assert autotune.PROJECTIONS == (1, 3)
    with monkeypatch.context() as patch:
        for table in (configs.ROW_MATMUL, configs.ROW_MATMUL_T, configs.ROW_TURN_GRAD):
            patch.setitem(table, ("sm_90", "ieee"), [SMALL])
        patch.setattr(triton.testing, "do_bench", lambda run, return_mode: run() is None or 1.0)
        found = autotune.tune_rows(x, weights, index, rows[1][0], plan)
    assert [config for _, config in found] == [SMALL] * 3
    taken = []
    monkeypatch.setattr(row_matmul_module, "choose", lambda *_, **__: taken.append("chosen") or SMALL)
    row_matmul(x, weights, *rows, [16] * 3)
    assert not taken
    row_matmul(x, weights[:1], [index], rows[1][:1], plan, [16])
    assert taken == ["chosen"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_way_to_launch_is_measured(dtype, monkeypatch):
    """Weights of autocast, which stay float32, and products with TF32 take what was measured, not the tables."""
    plan = Plan(torch.tensor([0, 1]), 16, 2)
    x, index, counts = torch.randn(32, 64, dtype=dtype), torch.arange(32).expand(2, 32).contiguous(), [32, 32]
    rows, layout = ([index], [torch.tensor(counts)], plan), TileLayout.from_blocks(torch.ones(2, 1, 1).bool(), (64, 64))
    with monkeypatch.context() as patch:
        patch.setattr(triton.testing, "do_bench", lambda run, return_mode: 1.0)
        autotune.tune(x, 64, plan, 0.5, 64)
    taken = []
    for module, name in (
        (row_matmul_module, "choose"),
        (row_matmul_t_module, "choose"),
        (tile_matmul_module, "_choose"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: taken.append("chosen") or 1 / 0)
    for weight, tf32 in ((torch.randn(64, 64, dtype=dtype), False), (torch.randn(64, 64), dtype == torch.float32)):
        (y,) = row_matmul(x, [weight], *rows, [32], allow_tf32=tf32)
        row_matmul_t([y], [weight], *rows, allow_tf32=tf32)
        tile_matmul(x, weight, layout, plan, allow_tf32=tf32)
        tile_matmul(x, weight, layout, plan, transposed=True, allow_tf32=tf32)
    assert not taken


def test_the_fastest_that_runs_is_chosen():
    """The fastest config wins, and one that does not fit the chip is passed over."""
    times = {2: 3.0, 3: 1.0, 4: 2.0}
    candidates = [Config((("BM", 16),), 4, stages) for stages in (1, 2, 3, 4)]

    def launch(config):
        if config.num_stages == 1:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return config

    assert autotune.fastest(launch, candidates, lambda run: times[run().num_stages]) == candidates[2]
    with pytest.raises(RuntimeError, match="no config runs here"):
        autotune.fastest(launch, candidates[:1], lambda run: times[run().num_stages])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    """Where there is nothing to measure, the command says so, without a traceback."""
    assert autotune.main([]) == 2
    assert "there is none here" in capsys.readouterr().err
