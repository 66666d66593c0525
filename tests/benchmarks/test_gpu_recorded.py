"""What a layer runs on a GPU: launches and operations are counted, and never become more."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastmask_kernels.chips import CHIPS

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, packages: str = "") -> subprocess.CompletedProcess[str]:
    """A command in a process of its own: the recorder and Triton's interpreter exclude each other."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, str(ROOT), str(ROOT / "kernels")]))
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    """The table of `python -m benchmarks.gpu.recorded`, which it prints."""
    return counted()


def counted(packages: str = "") -> dict[str, Any]:
    """By layer and place: Triton launches and torch operations."""
    done = run("-m", "benchmarks.gpu.recorded", packages=packages)
    assert done.returncode == 0, done.stderr
    (_, head, *lines), found = done.stdout.splitlines(), {}
    for line in lines:
        name, *cells = re.split(r"  +", line)
        found[name] = {
            place: tuple(map(int, cell.split(" + "))) for place, cell in zip(head.split(), cells, strict=True)
        }
    return found


# (Triton launches, torch operations) of a forward and backward pass of the masked layers, at most; of the plan.
MOST = {
    "BERT layer, heads and neurons": ((12, 8), (3, 5)),
    "neurons, packed": ((3, 2), (3, 1)),
    "neurons": ((5, 2), (4, 1)),
    "neuron-inputs, packed": ((3, 3), (3, 1)),
    "neuron-inputs": ((6, 3), (4, 1)),
    "heads, packed": ((3, 0), (3, 1)),
    "heads": ((5, 0), (4, 1)),
    "head-inputs, packed": ((3, 1), (3, 1)),
    "head-inputs": ((6, 1), (4, 1)),
    "blocks64": ((5, 2), (2, 1)),
    "weights": ((3, 1), (2, 1)),
}


def test_the_table_has_these_layers(counts: dict[str, Any]) -> None:
    """A layer is counted that has no bound."""
    assert counts.keys() == MOST.keys()


@pytest.mark.parametrize("layer", MOST)
def test_a_pass_launches_no_more_than_it_did(layer: str, counts: dict[str, Any]) -> None:
    """The host spends longer on launching a layer; whoever lowers a count lowers the bound here."""
    found = counts[layer]
    masked = [sum(both) for both in zip(found["forward"], found["backward"], strict=True)]
    assert (tuple(masked), tuple(found["plan"])) == MOST[layer]


# Prints what a pass of each kind of mask runs, with float32 weights under bfloat16, and where biases alone are trained.
NEEDLESS = """
import json, torch
import fastmask as fm
from benchmarks.gpu.recorded import _mask, layer_pass, origin, randn, record
from torch import nn

def ran(run):
    events = [event for event in record(run).events if origin(event) == "masked"]
    return [event.name.split(".")[0] for event in events]

def biases_alone(mask, ids):
    mask = mask.to("meta")
    weight, bias = randn(mask.out_features, mask.in_features, dtype=torch.bfloat16), nn.Parameter(
        randn(mask.out_features, dtype=torch.bfloat16)
    )
    x = randn(len(ids), 64, mask.in_features, dtype=torch.bfloat16)
    def run():
        y = fm.masked_linear(x, weight, mask, ids.to("meta"), bias)
        torch.autograd.grad(y, [bias], [torch.empty_like(y)])
    return run

found, ids = {}, torch.tensor([1, 0])
for kind, unit in (("rows", 1), ("rows", 64), ("columns", 1), ("blocks", 64), ("weights", 1)):
    mask = _mask(kind, unit, 2, 256, 256)
    master = layer_pass([mask], ids, 64, torch.bfloat16, torch.float32)
    found[f"{kind} of {unit}"] = ran(master), ran(biases_alone(mask, ids))

def of_a_slice():
    x = randn(2, 64, 1024, dtype=torch.bfloat16)[:, :, 256:512].requires_grad_()
    y = fm.masked_linear(x, weight, mask, ids.to("meta"))
    torch.autograd.grad(y, [x], [randn(2, 64, 1024, dtype=torch.bfloat16)[:, :, 512:768]])

for kind in ("rows", "blocks"):
    mask, weight = _mask(kind, 64, 2, 256, 256).to("meta"), randn(256, 256, dtype=torch.bfloat16)
    found[f"slices, {kind}"] = ran(of_a_slice), ["sum"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def needless() -> dict[str, Any]:
    """By kind of mask: what master weights run, and what biases alone do."""
    done = run("-c", NEEDLESS)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_kernels_read_float32_parameters_as_they_are(needless: dict[str, Any]) -> None:
    """No pass casts a weight or bias, or copies slices of wider tensors; W^T of columns is one copy."""
    for kind, (master, _) in needless.items():
        assert "_to_copy" not in master, kind
        copies = 1 if kind.startswith("columns") else 0
        assert master.count("copy_") + master.count("clone") - master.count("row_turn_grad_kernel") <= copies, kind


def test_biases_alone_take_no_weight_gradient(needless: dict[str, Any]) -> None:
    """Where only biases are trained no pass multiplies for a gradient that nobody asked for."""
    for kind, (_, alone) in needless.items():
        assert not [name for name in alone if "grad" in name], kind
        assert "sum" in alone, kind


# ---- the gate

# Prints, for each chip given, what is shipped and not launched by the gate's problems: table entries, tiles and turns.
NOT_LAUNCHED = """
import json, sys, torch
from benchmarks.gpu import recorded
from benchmarks.gpu.recorded import forced
from fastmask_kernels import configs, tile_matmul
from fastmask_kernels.recorder import Recorder
from fastmask_kernels.program_order import TURN_CHIPS

def launched_on(chip, steps):
    launched, turns = set(), set()
    for step in steps:
        with Recorder(chip) as recorder:
            step()
        for variant in {launch.variant.key: launch.variant for launch in recorder.launches}.values():
            known, kinds = variant.constexprs, set(variant.source.signature.values()) & {"*bf16", "*fp16", "*fp32"}
            blocks = tuple(known.get(name) for name in ("BM", "BN", "BK", "OUT_TILE", "IN_TILE"))
            wide = known.get("PRECISION") == "tf32" and "tf32" or "ieee"
            kind = wide if kinds == {"*fp32"} else "half"
            if kind == "half" and "*fp32" in (variant.source.signature.get(name) for name in ("w0", "weight")):
                kind = "master"
            launched.add((variant.kernel, kind, blocks, variant.num_warps, variant.num_stages))
            turns.add((variant.kernel, known.get("TURNS"), kind == "half"))
    return launched, turns

def shipped_for(chip):
    wanted = set()
    def want(kernel, kind, config, *tile):
        sizes = dict(config.blocks)
        blocks = (*(sizes.get(name) for name in ("BM", "BN", "BK")), *(tile or (None, None)))
        wanted.add((kernel, kind, blocks, config.num_warps, config.num_stages))
    tables = {"row_matmul": configs.ROW_MATMUL, "row_matmul_t": configs.ROW_MATMUL_T}
    tables |= {"row_turn_grad": configs.ROW_TURN_GRAD, "row_owned_grad": configs.ROW_OWNED_GRAD}
    for name, table in tables.items():
        for (own, kind), entries in table.items():
            for config in entries if own == chip else ():
                want(f"{name}_kernel", kind, config)
    bf, fp = torch.bfloat16, torch.float32
    for kind, dtypes in {"half": (bf, bf), "master": (bf, fp), "ieee": (fp, fp), "tf32": (fp, fp)}.items():
        for config in tile_matmul.block_sizes(chip, *dtypes, (64, 64), True):
            want("pair_matmul_kernel", kind, config, 64, 64)
        for side in (64, 128):
            for config in tile_matmul.block_sizes(chip, *dtypes, (side, side), False):
                want("tile_matmul_kernel", kind, config, side, side)
    return wanted

found = {}
with forced():
    steps = list(recorded.gate())  # their masks are made once for all chips
    for chip in sys.argv[1:]:
        wanted, (launched, turns) = shipped_for(chip), launched_on(chip, steps)
        missing = sorted(map(str, wanted - launched))
        for kernel in ("row_turn_grad_kernel", "pair_weight_grad_kernel"):
            if (kernel, chip in TURN_CHIPS, True) not in turns:
                missing.append(f"{kernel} in turns")
        found[chip] = [len(wanted), missing]
print(json.dumps(found))
"""


@pytest.mark.parametrize("chips", [["sm_90"], pytest.param(list(CHIPS), marks=pytest.mark.slow)], ids=["one", "all"])
def test_the_gate_launches_everything_that_is_shipped(chips: list[str]) -> None:
    """Block sizes are timed, and used, that no test has ever run on a GPU."""
    done = run("-c", NOT_LAUNCHED, *chips)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found) == chips
    for chip, (wanted, missing) in found.items():
        assert wanted > 30, chip
        assert missing == [], chip


# ---- older packages

OLDER = ("triton==3.6.0", "transformers==5.17.0")


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with older packages, found before those that are installed.

    torch 2.11, which belongs to them, comes with gigabytes of CUDA: it is not tried here.
    """
    folder = str(tmp_path_factory.mktemp("older"))
    # With what that transformers needs, which is older too; Triton needs nothing.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, *OLDER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{' and '.join(OLDER)} cannot be installed: {done.stderr[-300:]}")
    return folder


@pytest.mark.slow
def test_older_packages_launch_the_same(older: str, counts: dict[str, Any]) -> None:
    """A layer costs more launches, or none are seen, with the oldest Triton and transformers that are supported."""
    versions = run(
        "-c", "import triton, transformers; print(triton.__version__, transformers.__version__)", packages=older
    )
    assert versions.stdout.split() == [package.partition("==")[2] for package in OLDER], versions.stderr
    assert counted(older) == counts


@pytest.mark.slow
def test_older_triton_compiles_them_well(older: str) -> None:
    """A launch in use spills registers or misses the tensor cores with the oldest Triton that is supported."""
    done = run("-m", "fastmask_kernels.compile_report", "--quick", "--target", "sm_90", packages=older)
    assert done.returncode == 0, done.stdout + done.stderr
