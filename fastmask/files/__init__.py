"""Files of users and of runs: read with messages that name them, written whole or not at all."""

from fastmask.files.reading import FileError, Record, check, parse_json, read_json, read_yaml, sha256_of
from fastmask.files.tensors import read_metadata, read_sealed, read_tensors, write_sealed, write_tensors
from fastmask.files.writing import (
    LOCK_FILES,
    STDOUT,
    HeldError,
    check_writable,
    held,
    is_leftover,
    partial_name,
    remove_leftovers,
    remove_tree,
    replace_file,
    write_folder,
    write_text,
    write_yaml,
)

__all__ = [
    "LOCK_FILES", "STDOUT", "FileError", "HeldError", "Record", "check", "check_writable", "held", "is_leftover",
    "parse_json", "partial_name", "read_json", "read_metadata", "read_sealed", "read_tensors", "read_yaml",
    "remove_leftovers", "remove_tree", "replace_file", "sha256_of", "write_folder", "write_sealed", "write_tensors",
    "write_text", "write_yaml",
]  # fmt: skip
