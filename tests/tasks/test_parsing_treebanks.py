"""Finding and loading treebanks: the right files, each read once, every wrong name answered with the right ones."""

from __future__ import annotations

import csv
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
from processes import FORKSERVER, start_process

from fastmask.errors import FastmaskKeyError
from fastmask.tasks.data.conllu import ConlluError
from fastmask.tasks.data.treebanks import FEATURES, SPLITS, find_treebanks, load_treebanks, select_treebanks


def sentences(*names: str) -> str:
    return "".join(
        f"# sent_id = {name}\n1-2\t{name}b\t_\t_\t_\t_\t_\t_\t_\t_\n"
        f"1\t{name}\t_\tNOUN\t_\t_\t2\tnsubj\t_\t_\n2\tb\t_\tVERB\t_\t_\t0\troot\t_\t_\n\n"
        for name in names
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three Czech treebanks (one with official names), one English, one of a language in no table."""
    files = {
        "UD_Czech-CAC/train.conllu": sentences("c1", "c2"),
        "UD_Czech-CAC/dev.conllu": sentences("c3"),
        "UD_Czech-PUD/test.conllu": sentences("p1"),
        "UD_Czech-PDT/cs_pdt-ud-train-a.conllu": sentences("t1"),
        "UD_Czech-PDT/cs_pdt-ud-train-b.conllu": sentences("t2"),
        "UD_Czech-PDT/cs_pdt-ud-test.conllu": sentences("t3"),
        "UD_English-EWT/train.conllu": sentences("e1"),
        "UD_English-EWT/dev.conllu": sentences("e2"),
        "UD_English-EWT/test.conllu": sentences("e3"),
        "UD_Klingon-KTB/test.conllu": sentences("k1"),
    }
    for name, text in files.items():
        path = tmp_path / "ud" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "ud" / "MANIFEST.tsv").write_text("not read\n")
    return tmp_path / "ud"


def ids(dataset: datasets.Dataset) -> list[str]:
    return list(dataset["sent_id"])


def test_withheld_words_are_refused(data: Path, tmp_path: Path) -> None:
    """A corpus that is sold apart from its trees has _ for words; nothing can be learnt from that."""
    sold = data / "UD_Arabic-NYUAD" / "train.conllu"
    sold.parent.mkdir()
    sold.write_text("".join(re.sub(r"(?m)^(\d)\t\S+", r"\1\t_", sentences(name)) for name in "ab") + sentences("c"))
    with pytest.raises(ConlluError, match=r"train\.conllu:1: 4 of 6 words are _.*name other treebanks"):
        load_treebanks(data, "ar", splits=("train",), cache_dir=tmp_path / "cache")
    sold.write_text(sentences("_", "c"))  # an underscore is a word, too
    assert len(load_treebanks(data, "ar", splits=("train",), cache_dir=tmp_path / "cache")["ar"]["train"]) == 2


def test_rows_have_the_promised_columns(data: Path, tmp_path: Path) -> None:
    """Each row has the promised columns, of the promised types."""
    loaded = load_treebanks(data, "en", cache_dir=tmp_path / "cache")
    assert list(loaded) == ["en"]
    assert list(loaded["en"]) == list(SPLITS)
    train = loaded["en"]["train"]
    assert train.features == FEATURES
    assert train[0] == {
        "language": "en",
        "treebank": "UD_English-EWT",
        "sent_id": "e1",
        "words": ["e1", "b"],
        "upos": ["NOUN", "VERB"],
        "heads": [2, 0],
        "deprels": ["nsubj", "root"],
    }


def test_a_code_joins_the_treebanks_that_have_the_split(data: Path, tmp_path: Path) -> None:
    """`cs` is all treebanks of Czech that have the split; a treebank's name is that one alone."""
    cache = tmp_path / "cache"
    czech = load_treebanks(data, "cs", cache_dir=cache)["cs"]
    assert ids(czech["train"]) == ["c1", "c2", "t1", "t2"]
    assert ids(czech["dev"]) == ["c3"]
    assert ids(czech["test"]) == ["t3", "p1"]
    assert ids(load_treebanks(data, "UD_Czech-CAC", ["train"], cache_dir=cache)["cs"]["train"]) == ["c1", "c2"]
    named = load_treebanks(data, ["UD_Czech-PUD", "en", "UD_Czech-PDT"], ["test"], cache_dir=cache)
    assert list(named) == ["cs", "en"]
    assert ids(named["cs"]["test"]) == ["p1", "t3"]
    both = load_treebanks(data, " UD_Czech-PUD, cs,", ["test"], cache_dir=cache)
    assert ids(both["cs"]["test"]) == ["p1", "t3"]  # nothing twice


def test_the_folder_above_and_a_single_treebank_are_found_too(data: Path, tmp_path: Path) -> None:
    """An unpacked release and a single treebank can be given as they are."""
    expected = find_treebanks(data)
    assert find_treebanks(data.parent) == expected
    release = tmp_path / "UD_releases" / "UD_2.14"
    shutil.copytree(data, release)
    for folder in (release, release.parent):
        assert list(find_treebanks(folder)) == list(expected)
    assert find_treebanks(data / "UD_Czech-PUD") == {"UD_Czech-PUD": expected["UD_Czech-PUD"]}


def test_codes_come_from_file_names_first(data: Path) -> None:
    """A treebank's language is what the prefix of its files says."""
    (data / "UD_Czech-PUD" / "test.conllu").rename(data / "UD_Czech-PUD" / "xcz_pud-ud-test.conllu")
    codes = {name: treebank.code for name, treebank in find_treebanks(data).items()}
    assert codes["UD_Czech-PUD"] == "xcz"
    assert codes["UD_Czech-CAC"] == "cs"
    assert codes["UD_Klingon-KTB"] == "klingon"


def test_codes_of_real_treebanks(ud_dir: Path) -> None:
    """Each real treebank has its official language code."""
    found = find_treebanks(ud_dir)
    with open(ud_dir / "MANIFEST.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {name: treebank.code for name, treebank in found.items()} == {row["treebank"]: row["code"] for row in rows}
    assert {(name, split) for name, treebank in found.items() for split in treebank.files} == {
        (row["treebank"], row["split"]) for row in rows
    }


def test_unknown_names_are_answered_with_known_ones(data: Path) -> None:
    """A misspelt name is answered with the nearest known one."""
    with pytest.raises(
        FastmaskKeyError, match="unknown language or treebank 'UD_Czech-CAK'; did you mean 'UD_Czech-CA"
    ):
        load_treebanks(data, "en,UD_Czech-CAK")
    with pytest.raises(FastmaskKeyError, match=r"Known: UD_Czech-CAC, .*, cs, en"):
        load_treebanks(data, "xx")
    with pytest.raises(FastmaskKeyError, match="unknown split 'validation'"):
        load_treebanks(data, "en", ["validation"])
    with pytest.raises(ValueError, match="no languages given"):
        select_treebanks(find_treebanks(data), " , ")


def test_missing_folders_are_named(tmp_path: Path) -> None:
    """A wrong path to the data is named in the error."""
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_treebanks(tmp_path / "nowhere", "en")
    with pytest.raises(FileNotFoundError, match="no treebank in"):
        load_treebanks(tmp_path, "en")


def test_a_missing_split_is_an_error_unless_optional(data: Path, tmp_path: Path) -> None:
    """A language without training data is an error that says so."""
    with pytest.raises(ValueError, match="language 'klingon' has no train split") as error:
        load_treebanks(data, "en,klingon", cache_dir=tmp_path / "cache")
    for part in ("train.conllu or *-ud-train.conllu", str(data / "UD_Klingon-KTB"), "(has test)"):
        assert part in str(error.value)
    assert not (tmp_path / "cache").exists()  # complained before reading anything
    loaded = load_treebanks(data, "klingon", optional=("train", "dev"), cache_dir=tmp_path / "cache")
    assert list(loaded["klingon"]) == ["test"]


def test_a_bad_file_is_reported_as_itself(data: Path, tmp_path: Path) -> None:
    """The error is ours, with file and line, and is not wrapped in one of the `datasets` library."""
    with open(data / "UD_English-EWT" / "dev.conllu", "a") as file:
        file.write("1\tx\n\n")
    with pytest.raises(ConlluError, match=r"UD_English-EWT/dev\.conllu:6: 2 columns"):
        load_treebanks(data, "en", cache_dir=tmp_path / "cache")


def arrow_files(cache: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}


def test_a_file_is_read_again_only_if_its_content_changed(data: Path, tmp_path: Path) -> None:
    """An unchanged treebank comes from the cache; an edited file is read again."""
    cache, path = tmp_path / "cache", data / "UD_English-EWT" / "train.conllu"
    load_treebanks(data, "en", cache_dir=cache)
    first = arrow_files(cache)
    assert len(first) == 3
    path.touch()
    load_treebanks(data, "en", cache_dir=cache)
    assert arrow_files(cache) == first
    stat = path.stat()
    path.write_text(sentences("x1"))  # as long as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ids(load_treebanks(data, "en", cache_dir=cache)["en"]["train"]) == ["x1"]
    second = arrow_files(cache)
    assert len(second) == 4
    assert {path: second[path] for path in first} == first


def test_loading_leaves_the_settings_of_datasets_alone(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Loading shows no progress bars, and leaves other people's on."""
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    load_treebanks(data, "en", cache_dir=tmp_path / "cache")
    assert datasets.are_progress_bars_disabled() is False
    assert datasets.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")


def load_in_process(data: Path, cache: Path, queue: Any) -> None:
    loaded = load_treebanks(data, "cs,en", cache_dir=cache)
    queue.put({(code, split): ids(rows) for code, splits in loaded.items() for split, rows in splits.items()})


def test_two_processes_at_once_read_the_same(data: Path, tmp_path: Path) -> None:
    """Two processes that fill one cache at the same time read the same."""
    queue = FORKSERVER.Queue()
    processes = [start_process(load_in_process, data, tmp_path / "cache", queue) for _ in range(2)]
    results = [queue.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert results[0] == results[1]
    assert results[0]["cs", "train"] == ["c1", "c2", "t1", "t2"]


def test_threads_at_once_read_the_same(data: Path, tmp_path: Path) -> None:
    """Threads that load at the same time read the same."""
    results: list[list[str]] = []

    def load() -> None:
        results.append(ids(load_treebanks(data, "cs", cache_dir=tmp_path / "cache")["cs"]["train"]))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [["c1", "c2", "t1", "t2"]] * 4


def test_a_copy_of_the_data_elsewhere_loads_the_same(data: Path, tmp_path: Path) -> None:
    """Data that was moved loads as before, cached or not."""
    cache = tmp_path / "cache"
    first = ids(load_treebanks(data, "cs", cache_dir=cache)["cs"]["test"])
    shutil.move(data, tmp_path / "moved")
    assert ids(load_treebanks(tmp_path / "moved", "cs", cache_dir=cache)["cs"]["test"]) == first


@pytest.mark.slow
def test_all_real_treebanks_load(ud_dir: Path, tmp_path: Path) -> None:
    """Every real treebank goes through the cache without losing a sentence."""
    codes = {treebank.code for treebank in find_treebanks(ud_dir).values()}
    loaded = load_treebanks(ud_dir, sorted(codes), optional=SPLITS, cache_dir=tmp_path)
    with open(ud_dir / "MANIFEST.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for code, splits in loaded.items():
        for split in splits:
            wanted = sum(int(row["sentences"]) for row in rows if (row["code"], row["split"]) == (code, split))
            assert len(splits[split]) == wanted, (code, split)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("en-ud-train.conllu", "en"),  # as in the first releases
        ("en_ewt_extra-ud-train.conllu", "en"),
        ("en_EWT-ud-train.conllu", "en"),
        ("English-ud-train.conllu", "cs"),  # no code: the folder's language
    ],
)
def test_every_file_that_messages_tell_to_look_for_is_found(data: Path, tmp_path: Path, name: str, code: str) -> None:
    """A message says that *-ud-train.conllu was looked for; a file of such a name must not be passed over."""
    (data / "UD_Czech-PUD" / name).write_text(sentences("old"))
    assert find_treebanks(data)["UD_Czech-PUD"].code == code
    loaded = load_treebanks(data, "UD_Czech-PUD", ["train"], cache_dir=tmp_path / "cache")
    assert ids(loaded[code]["train"]) == ["old"]


@pytest.mark.parametrize(
    "names",
    [
        ("train.conllu", "cs_pud-ud-train.conllu"),
        ("cs_pud-ud-train.conllu", "cs_old-ud-train.conllu"),
        ("cs_pud-ud-train.conllu", "cs_pud-ud-train-a.conllu"),
        ("cs_pud-ud-train-a.conllu", "cs_old-ud-train-b.conllu"),
    ],
)
def test_several_files_that_are_not_parts_of_one(data: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    """Which of two treebanks in one folder is meant must not be guessed, nor one be added to the other."""
    for name in names:
        (data / "UD_Czech-PUD" / name).write_text(sentences("x"))
    with pytest.raises(ValueError, match="UD_Czech-PUD has several files for train: ") as error:
        load_treebanks(data, "cs", ["train"], cache_dir=tmp_path / "cache")
    assert all(name in str(error.value) for name in names)
    assert ids(load_treebanks(data, "UD_Czech-PUD", ["test"], cache_dir=tmp_path / "cache")["cs"]["test"]) == ["p1"]


def test_a_folder_or_a_pipe_is_no_treebank_file(data: Path, tmp_path: Path) -> None:
    """It must be named, and a pipe not be waited for."""
    (data / "UD_Czech-PUD" / "train.conllu").mkdir()
    os.mkfifo(data / "UD_Czech-PUD" / "dev.conllu")
    for split in ("train", "dev"):
        with pytest.raises(ValueError, match=rf"{split}\.conllu is not a regular file"):
            load_treebanks(data, "UD_Czech-PUD", [split], cache_dir=tmp_path / "cache")


def test_a_relation_with_white_space_is_found_when_the_data_is_read(data: Path, tmp_path: Path) -> None:
    """It cannot be written to a file, so it must not be trained on first."""
    path = data / "UD_Czech-PUD" / "test.conllu"
    path.write_text(sentences("a", "b").replace("nsubj", "nsubj x"))
    with pytest.raises(ConlluError, match=r"test\.conllu:3: DEPREL 'nsubj x' holds white space"):
        load_treebanks(data, "UD_Czech-PUD", ["test"], cache_dir=tmp_path / "cache")
