"""What the compiler makes of the kernels that are launched, and whether the report would notice what must not be.

The report needs Triton's compiler, which these tests' process may have replaced by the interpreter: it runs in its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sample_kernels
import triton
from fastmask_kernels import compile_report
from fastmask_kernels.chips import CHIPS
from fastmask_kernels.compile_report import Row, collect, failures, report
from fastmask_kernels.compiling import Build, resident
from fastmask_kernels.configs import TABLES, expected_residents
from fastmask_kernels.recorder import Variant

HERE = Path(__file__).parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "fastmask_kernels.compile_report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# ---- the shipped kernels


@pytest.mark.parametrize(
    "arguments",
    [("--module", "main_kernels", "--quick", "--target", "sm_90"), pytest.param((), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_launched_kernels_compile_well(arguments: tuple[str, ...]) -> None:
    """No launch in use spills registers, misses the tensor cores, or asks for more memory than the chip has."""
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


# Prints of each loop of two kernels: whether it multiplies, and how many loads straight to shared memory it has.
SUMS = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from fastmask_kernels.plan import Plan
from fastmask_kernels.recorder import Recorder
from fastmask_kernels.row_weight_grad import row_weight_grad

def randn(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

found, options = [], {"weight_dtype": torch.bfloat16}
for of in ({"units": [64], "column_sums": True}, {"units": [1], "with_bias": True}):
    with Recorder("sm_90") as recorder:
        plan = Plan(randn(4, dtype=torch.int64), 64, 3)
        masks = [randn(3, 128, dtype=torch.int64)], [randn(3, dtype=torch.int64)]
        row_weight_grad([randn(256, 128)], randn(256, 128), *masks, plan, [128], **options, **of)
    variant = recorder.launches[-1].variant
    launch = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    made = triton.compile(variant.source, target=GPUTarget("cuda", 90, 32), options=launch)
    bodies = [loop.split("scf.yield")[0] for loop in made.asm["ttgir"].split("scf.for")[1:]]
    found.append([["dot" in body, body.count("async_copy_global_to_local")] for body in bodies])
print(json.dumps(found))
"""


def test_sums_over_tokens_are_read_ahead() -> None:
    """The longest walks over tokens, those of biases' gradients, do not wait for each step's loads."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", SUMS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for kernel in json.loads(done.stdout):
        assert {multiplies for multiplies, _ in kernel} == {True, False}
        assert all(loads > 0 for _, loads in kernel), kernel


# ---- the report notices


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report on `sample_kernels`, as it is written to a file."""
    file = tmp_path_factory.mktemp("report") / "rows.json"
    done = run("--module", "sample_kernels", "--target", "sm_90,gfx942", "--json", str(file))
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert all(f"FAILED {line}" in done.stdout for line in found["failures"])
    return found


def row(samples: dict[str, Any], kernel: str, target: str = "sm_90") -> dict[str, Any]:
    (found,) = (row for row in samples["rows"] if row["kernel"] == kernel and row["target"] == target)
    return dict(found)


def failures_of(samples: dict[str, Any], kernel: str, target: str = "sm_90") -> list[str]:
    return [line for line in samples["failures"] if line.startswith(f"{kernel} ") and f" on {target}: " in line]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_good_kernel_has_no_failure(samples: dict[str, Any], target: str) -> None:
    """Kernels that are as they should be pass."""
    assert failures_of(samples, "good", target) == []


def test_the_machine_code_is_read(samples: dict[str, Any]) -> None:
    """Tensor-core instructions and shared memory are those of the kernel."""
    made = row(samples, "good")["build"]
    # 128 x 128 x 64 with two warp groups of 64 rows: four instructions of depth 16.
    assert made["tensor"] == {"HGMMA.64x128x16": 4}
    assert made["shared"] == 3 * 2 * 128 * 64 * 2
    # Eight waves share 128 x 128: each has 64 x 32, two instructions wide and eight deep.
    assert row(samples, "good", "gfx942")["build"]["tensor"].keys() == {"v_mfma_f32_32x32x8_bf16"}


def build_of(registers: int, shared: int) -> Build:
    return Build(registers, 0, 0, 0, 0, shared, 0, {})


@pytest.mark.parametrize(
    ("chip", "registers", "shared_kib", "warps", "expected"),
    [
        ("sm_90", 126, 96, 8, 2),  # 227 KiB for one program, each takes one more: two of 97
        ("sm_90", 126, 128, 8, 1),
        ("sm_90", 129, 96, 8, 1),  # registers are given in portions of 256 to a warp: 136 x 32 x 8 x 2 are too many
        ("sm_90", 32, 0, 4, 16),  # 2048 threads
        ("sm_80", 126, 96, 8, 1),
        ("gfx942", 128, 32, 8, 2),
        ("gfx942", 256, 16, 8, 1),
        ("sm_90", 255, 227, 8, 1),
    ],
)
def test_programs_that_fit_a_multiprocessor(chip, registers, shared_kib, warps, expected) -> None:  # type: ignore[no-untyped-def]
    """Registers, shared memory and warps limit how many programs run at a time."""
    assert resident(build_of(registers, 1024 * shared_kib), warps, CHIPS[chip]) == expected


def test_fewer_residents_than_the_table_says_are_noticed() -> None:
    """A kernel fails if fewer of its programs fit than the model that chose its block sizes assumed."""
    fits = Row("a", "", "bf16", "sm_90", 16, False, build_of(126, 96 * 1024), num_warps=8, expected=2)
    assert failures([fits]) == []
    (line,) = failures([replace(fits, expected=3)])
    assert "lets a multiprocessor hold 2 programs, its table says 3" in line
    for name, table in TABLES.items():
        for (chip, _), configs in table.items():
            for config in configs:
                launch = (name, chip, dict(config.blocks), config.num_warps, config.num_stages)
                assert 1 <= expected_residents(*launch) <= config.resident
    assert expected_residents("other_kernel", "sm_90", {}, 4, 2) == 0


def test_block_sizes_of_a_target_fit_every_chip_that_takes_them() -> None:
    """A GPU of capability 8.6, 8.9 or 12.x takes the block sizes of 8.0, and has 99 KB for a program, not 163."""
    for kib, wrong in ((99, 0), (100, 1)):
        found = failures([Row("a", "", "bf16", "sm_80", 16, False, build_of(126, kib * 1024), num_warps=8)])
        assert len(found) == wrong
        assert all("the chip allows 101376" in line for line in found)


def test_spills_are_noticed(samples: dict[str, Any]) -> None:
    """A kernel that keeps its accumulator in slow memory fails."""
    made, lines = row(samples, "spilling")["build"], failures_of(samples, "spilling")
    assert made["stack"] > 0
    assert made["spill_stores"] > 0
    assert made["spill_loads"] > 0
    assert made["spill_instructions"] > 0
    assert any("spills" in line for line in lines)
    assert any("stack frame" in line for line in lines)
    assert any("serialized" in line for line in samples["warnings"]), "the warning of ptxas is lost"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_missing_tensor_cores_are_noticed(samples: dict[str, Any], target: str) -> None:
    """A kernel that does not use the chip's matrix units fails."""
    (line,) = failures_of(samples, "dotless", target)
    assert "has no" in line


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_too_much_shared_memory_is_noticed(samples: dict[str, Any], target: str) -> None:
    """A launch that every such chip refuses fails."""
    (line,) = failures_of(samples, "too_big", target)
    assert "shared memory" in line


def test_a_case_that_does_not_compile_is_a_failure(samples: dict[str, Any]) -> None:
    """A case that does not compile is reported, and hides no other."""
    (line,) = failures_of(samples, "misdescribed")
    assert "does not compile" in line


def stand_in(name: str, **constexprs: Any) -> Variant:
    """A variant of no kernel: these tests' process may have no compiler."""
    parameters = [SimpleNamespace(name=key, is_constexpr=True) for key in constexprs]
    constants = {(place,): value for place, value in enumerate(constexprs.values())}
    kernel = SimpleNamespace(__name__="row_matmul_kernel", params=[])
    source = SimpleNamespace(fn=kernel, signature={"x": "*bf16", "w0": "*bf16"}, constants=constants, attrs={})
    kernel.params = parameters
    source.signature |= dict.fromkeys(constexprs, "constexpr")
    return Variant(name, source, 4, 2, "sm_90")


def test_the_quick_form_takes_the_largest_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick form compiles every variant of a kernel, with its largest tiles: small ones never spill."""
    tiles = [("a", False, 64), ("a", False, 128), ("a", True, 64), ("b", True, 32)]
    variants = [stand_in(name, FLAG=flag, BM=size, BN=64, BK=64) for name, flag, size in tiles]
    monkeypatch.setattr(sample_kernels, "variants", lambda chip: [replace(v, chip=chip) for v in variants])
    found = collect(["sm_80", "sm_90"], "sample_kernels", quick=True)
    assert [(v.chip, v.kernel, v.constexprs["FLAG"], v.constexprs["BM"]) for v in found] == [
        (chip, *what) for chip in ("sm_80", "sm_90") for what in (("a", False, 128), ("a", True, 64), ("b", True, 32))
    ]


def test_a_crashing_compiler_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort inside the compiler costs its own kernel only, which is named."""

    def build(variant: Variant) -> None:
        if variant.kernel == "crash":
            os._exit(1)
        raise ValueError("wrong")

    monkeypatch.setattr(compile_report, "build", build)
    found = failures(report([stand_in(name, BM=64, BN=64, BK=64) for name in ("wrong", "crash")] * 2))
    assert ["crashed" in line for line in found] == [False, True] * 2


# ---- the command


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the interpreter, which compiles nothing, the report says so."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert compile_report.main(["--target", "sm_90"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_outside_of_a_checkout_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An installed wheel has no list of what is launched: one line says where it is."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for name in {name for name in sys.modules if name.partition(".")[0] == "benchmarks"} | {compile_report.LAUNCHED}:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]  # as if it were not there
    assert compile_report.main(["--target", "sm_90"]) == 2
    expected = (
        "There is no module benchmarks.gpu.recorded; it is part of a checkout of fastmask: run the report there.\n"
    )
    assert capsys.readouterr().err == expected


def test_an_empty_report_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt target or kernel is an error, not a report without failures."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(SystemExit) as stopped:
        compile_report.main(["--target", "sm_91"])
    assert stopped.value.code == 2
    assert "sm_91" in capsys.readouterr().err
    monkeypatch.setattr(sample_kernels, "variants", lambda chip: [stand_in("a", BM=64, BN=64, BK=64)])
    assert compile_report.main(["--module", "sample_kernels", "--kernel", "absent"]) == 2
    assert "absent" in capsys.readouterr().err
