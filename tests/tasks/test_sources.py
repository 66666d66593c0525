"""Where rows come from: every kind of source gives the same, and what is wrong is named before anything is read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import datasets
import pytest
from tiny_tasks import write_rows
from toy_parser import SENTENCES, conllu

from fastmask.tasks.data.sources import languages_of, load, read_file
from fastmask.tasks.data.treebanks import preparing
from fastmask.tasks.task import treebanks_of, warn_of_pooling

LANGUAGES = ("en", "de")
pytestmark = pytest.mark.usefixtures("datasets_cache")


def rows(language, split, count=3):
    return [{"language": language, "text": f"{language} {split} {i}", "label": i % 2} for i in range(count)]


def in_columns(folder, ending=".jsonl"):
    """A file for each split; a column says the language."""
    for split in ("train", "validation", "test"):
        of_all = [row for language in LANGUAGES for row in rows(language, split)]
        path = folder / f"mine-{split}{ending}"
        if ending == ".jsonl":
            write_rows(path, of_all)
        else:
            folder.mkdir(exist_ok=True)
            found = datasets.Dataset.from_list(of_all)
            found.to_csv(path) if ending == ".csv" else found.to_parquet(path)
    return folder


def in_folders(folder):
    """A folder for each language; one split in two files."""
    for language in LANGUAGES:
        for split in ("train", "dev"):
            write_rows(folder / language / f"{split}.jsonl", rows(language, split))
        write_rows(folder / language / "test-0.jsonl", rows(language, "test")[:2])
        write_rows(folder / language / "test-1.jsonl", rows(language, "test")[2:])
    return folder


def saved(folder):
    """A DatasetDict."""
    splits = {s: [row for language in LANGUAGES for row in rows(language, s)] for s in ("train", "validation", "test")}
    datasets.DatasetDict({s: datasets.Dataset.from_list(found) for s, found in splits.items()}).save_to_disk(folder)
    return folder


def test_cells_of_a_csv_file_are_what_they_say(tmp_path):
    """A class or language called NA, nan or None is no empty cell; an empty one is, and its row has no language."""
    path = tmp_path / "train.csv"
    rows = "nan,one,None\nnan,two,NA\nnan,three,\n,four,null\nnan,5,01\nnan,6,1\nnan,7.0,1.0\n"
    path.write_text(f"language,text,label\n{rows}", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"train: 1 of 7 rows have no language and are left out"):
        found = load(path, "nan", splits=["train"])
    assert list(found["nan"]["train"]["label"]) == ["None", "NA", None, "01", "1", "1.0"]
    assert list(found["nan"]["train"]["text"])[3:] == ["5", "6", "7.0"]
    assert read_file(path)[3] == {"language": None, "text": "four", "label": "null"}
    with pytest.warns(UserWarning, match="have no language"):
        assert languages_of(path, "language") == ["nan"]


@pytest.mark.parametrize(
    "make",
    [in_columns, lambda f: in_columns(f, ".csv"), lambda f: in_columns(f, ".parquet"), in_folders, saved],
    ids=["jsonl", "csv", "parquet", "folders", "saved"],
)
def test_every_kind_of_source(make, tmp_path, capfd):
    """Every kind of source gives the same rows, languages and splits, without progress bars and logs."""
    data = make(tmp_path / "data")
    capfd.readouterr()
    assert languages_of(data, "language") == ["de", "en"]
    found = load(data, "German,EN")  # both have other names
    assert list(found) == ["de", "en"]
    for language, splits in found.items():
        assert list(splits) == ["train", "dev", "test"]
        for split, of in splits.items():
            name = "validation" if split == "dev" and make is not in_folders else split
            cells = str if data.joinpath("mine-train.csv").exists() else int  # a CSV file says nothing of types
            assert list(of) == [{**row, "label": cells(row["label"])} for row in rows(language, name)]
    assert capfd.readouterr() == ("", "")


def test_one_file_is_one_split(tmp_path):
    """A file is the split that its name says, else train."""
    path = write_rows(tmp_path / "mine.jsonl", rows("en", "train"))
    assert list(load(path, "en", splits=("train",))["en"]["train"]) == rows("en", "train")
    path = write_rows(tmp_path / "my_test.jsonl", rows("en", "test"))
    assert list(load(path, "en", splits=("test",))["en"]) == ["test"]
    assert read_file(path) == rows("en", "test")


def test_classes_have_names(tmp_path):
    """Classes are shown by name, and -1 is not a class."""
    kind = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"language": datasets.Value("string"), "a": kind, "b": datasets.List(kind)})
    columns = {"language": ["en"] * 3, "a": [1, 0, -1], "b": [[0, 1], [], [1]]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    (found,) = load(tmp_path / "saved", "en", splits=("train",))["en"].values()
    assert found["a"] == ["yes", "no", None]
    assert found["b"] == [["no", "yes"], [], ["yes"]]


def test_treebanks_are_a_source(tmp_path):
    """A folder of treebanks, or a single file, can be read."""
    for split in ("train", "dev"):
        path = tmp_path / "UD_English-X" / f"{split}.conllu"
        path.parent.mkdir(exist_ok=True)
        path.write_text(conllu(SENTENCES[0]) + "\n\n")
    assert languages_of(tmp_path, "language") == ["en"]
    found = load(tmp_path, "English", splits=("train", "test"), optional=("test",))
    assert list(found["en"]) == ["train"]
    (row,) = read_file(path)
    assert list(row["words"]) == found["en"]["train"][0]["words"]


def test_a_configuration_for_each_language_on_the_hub(monkeypatch):
    """Configurations are languages, and only those that are asked for are loaded."""
    loaded = []

    def load_dataset(name, configuration):
        loaded.append(configuration)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows(configuration, "train"))})

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["de", "en", "fi"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load("owner/name", "en", splits=("train",))["en"]["train"]) == rows("en", "train")
    assert loaded == ["en"]


def test_what_is_wrong_is_named(tmp_path, monkeypatch):
    """The error says what was given and what there is."""
    columns, folders = in_columns(tmp_path / "columns"), in_folders(tmp_path / "folders")

    def said(*arguments, **options):
        with pytest.raises((ValueError, KeyError, OSError)) as error:
            load(*arguments, **options)
        return str(error.value)

    assert said(tmp_path / "nothing", "en") == (
        f"no data at {tmp_path / 'nothing'} (expected a folder, a file or a name on the Hub)"
    )
    assert "unknown column 'languages'; did you mean 'language'" in said(columns, "en", "languages")
    assert said(columns, "dee") == "unknown language 'dee'; did you mean 'de' or 'en'? Known: de, en"
    assert "unknown split 'tset'; did you mean 'test'" in said(columns, "en", splits=("tset",))
    assert "no languages given" in said(columns, " ,")
    (folders / "de" / "dev.jsonl").unlink()
    assert said(folders, "en,de") == f"language 'de' has no dev split in {folders} (it has train, test)"
    (tmp_path / "empty").mkdir()
    assert "no data in" in said(tmp_path / "empty", "en")
    broken = tmp_path / "train.jsonl"
    broken.write_text('{"language": "en"}\n{oops}\n')
    assert f"{broken}: cannot be read as JSON" in said(broken, "en")
    broken.write_text("")
    assert f"{broken}: is empty" in said(broken, "en")
    assert ".txt: is of an unknown kind" in said(write_rows(tmp_path / "a.txt", rows("en", "train")), "en")
    (tmp_path / "a.jsonl.gz").touch()
    assert ".gz: is of an unknown kind" in said(tmp_path / "a.jsonl.gz", "en")
    assert said(tmp_path / "a.jsonl.gz", "en").endswith(".parquet: unpack it)")

    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_config_names", refuse)
    assert "no data at owner/name" in said("owner/name", "en")
    assert "the Hub says: no network" in said("owner/name", "en")


def test_a_path_is_no_pattern(tmp_path):
    """A folder with brackets or a star in its name is that folder, and not others that it would match as a pattern."""
    for name in ("x*", "xy", "my [data] v1"):
        write_rows(tmp_path / name / "train.jsonl", [{"text": name, "language": "en"}])
    for name in ("x*", "my [data] v1"):
        assert [row["text"] for row in read_file(str(tmp_path / name / "train.jsonl"))] == [name]


def test_a_full_disk_is_not_taken_for_a_bad_file():
    """Where the cache cannot be written, the error names the cache, and not the data."""

    def write(number):
        with preparing():
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    for number in (errno.ENOSPC, errno.EFBIG):
        with pytest.raises(OSError, match="the cache of datasets") as raised:
            write(number)
        assert raised.value.errno == number


def test_standard_input():
    """JSON lines, as `fastmask adapt --support -` reads them."""
    code = "from fastmask.tasks.data.sources import read_file; print(read_file('/dev/stdin'))"
    lines = '{"text": "one"}\n\n{"text": "two"}\n'
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[{'text': 'one'}, {'text': 'two'}]"


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    """Also where its time is what it was, as after unpacking an archive."""
    path = tmp_path / "train.jsonl"
    for text in ("old", "new", "a longer one"):
        write_rows(path, [{"text": text}])
        os.utime(path, (1e9, 1e9))
        assert [row["text"] for row in read_file(path)] == [text]


def test_a_language_without_a_split(tmp_path):
    """That the data have no such split of a language does not make it unknown."""
    write_rows(tmp_path / "train.jsonl", [*rows("en", "train"), *rows("fi", "train")])
    write_rows(tmp_path / "test.jsonl", rows("en", "test"))
    for language, split in (("en", "dev"), ("fi", "test")):
        with pytest.raises(ValueError, match=rf"{language}.* has no {split} split"):
            load(tmp_path, language, splits=[split])


def test_treebanks_of_rows():
    """Of a data set or of rows; what has none, or no name, does not count."""
    named = [{"treebank": name} for name in ("b", None, "a", "b")]
    assert treebanks_of(named) == treebanks_of(datasets.Dataset.from_list(named)) == ["b", "a"]
    assert treebanks_of([{"text": "x"}]) == treebanks_of(datasets.Dataset.from_list([{"text": "x"}])) == []
    with pytest.warns(UserWarning, match="xx: b, a are scored together"):
        warn_of_pooling("xx", named)
