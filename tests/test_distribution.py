"""No text tells anybody to install somebody else's package, and there is one version number."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastmask as fm
from fastmask.cli import main

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "train|tensorboard|typology|test"


def texts():
    """(file, line number, line) of everything that is kept in the repository and is text."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: its files cannot be listed")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".safetensors") and path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                yield name, number, line


def installed(line):
    """What a line tells people to install from an index: the words after ``pip install`` that are no option or path."""
    found = []
    for _, _, rest in (line.partition(f"{pip} install") for pip in ("pip", "pip3", "uv pip", "pipx")):
        words = re.split(r"[`;,)\s]", rest.split("#")[0])
        found += [word.strip("'\"") for word in words if re.match(r"['\"]?[A-Za-z]", word)]
    return found


def test_what_counts_as_installing():
    """The search below must see a name with and without extras, quotes and options, and let paths pass."""
    assert "fastmask[typology]" in installed("makes it fast: `pip install -U 'fastmask[typology]'`")
    assert "fastmask" in installed("pip3 install fastmask")
    assert not any("fastmask" in word for word in installed("pip install -e '.[typology]'"))


def test_nobody_is_told_to_install_a_package_of_other_people():
    """No line of code or prose may install `fastmask`, or any name that we do not hold on an index."""
    wrong = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, number, line in texts()
        if any(re.match(r"fastmask\b", word) for word in installed(line))
        or re.search(rf"\bfastmask(-subnetworks)?\[({EXTRAS})", line)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_distribution_is_not_called_as_the_package_of_other_people():
    """Requirements and lock files name the distribution: under the old name they would fetch a stranger's code."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    name = re.search(r'(?m)^name = "([^"]+)"$', project)
    assert name is not None
    assert name[1] == "fastmask-subnetworks"
    assert re.search(r'(?m)^fastmask = "fastmask.cli:main"$', project)  # the command keeps its name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`{name[1]}`" in readme


def test_one_version(capsys):
    """`fastmask --version` must print the version of the package, which is the only place where it is written."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fastmask {fm.__version__}\n"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"(?m)^version =", project)


LIGHT = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in sys.argv[1].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

sys.meta_path.insert(0, Blocked())
import fastmask
"""


def light(code, *blocked):
    """Run code where some modules are not installed."""
    return subprocess.run(
        [sys.executable, "-c", LIGHT + code, " ".join(blocked)], capture_output=True, text=True, check=False
    )


def extra(name):
    """The modules of an extra's distributions."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(rf"(?ms)^{name} = \[(.*?)^\]", project)
    assert listed is not None
    names = re.findall(r'"([\w.-]+)', listed[1])
    return [{"pillow": "PIL", "ufal.chu-liu-edmonds": "ufal"}.get(name, name) for name in names]


def test_the_core_needs_no_extra():
    """Every name of the package can be had without what only the command needs, and without transformers."""
    run = light("print([getattr(fastmask, name) for name in fastmask.__all__])", *extra("train"), "transformers")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("arguments", "says"), [(["--help"], "discover"), (["--version"], fm.__version__)])
def test_general_help_does_not_wait_for_torch(arguments, says):
    """General help is printed without importing torch."""
    run = light(f"from fastmask.cli import main; main({arguments})", *extra("train"), "torch", "numpy", "transformers")
    assert run.returncode == 0, run.stderr
    assert says in run.stdout


def test_a_missing_extra_is_named():
    run = light("from fastmask.cli import main; sys.exit(main(['train', '--out', 'x']))", *extra("train"))
    assert run.returncode == 1
    assert "is not installed: the command needs the extra `train`" in run.stderr
    assert "Traceback" not in run.stderr
