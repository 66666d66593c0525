"""Files of users and of runs: read with messages that name them, written whole or not at all, deleted only if ours.

Every other module reads JSON, YAML and safetensors, replaces files and removes folders through this one.
"""

from fastmask.files.folders import remove_leftovers, remove_tree, write_folder
from fastmask.files.locking import LOCK_FILES, HeldError, held
from fastmask.files.reading import (
    FileError,
    Record,
    check,
    descriptor_of,
    parse_json,
    read_json,
    read_json_lines,
    read_text,
    sha256_of,
)
from fastmask.files.settings import read_yaml, write_yaml
from fastmask.files.tensors import read_metadata, read_sealed, read_tensors, write_sealed
from fastmask.files.writing import (
    check_writable,
    is_leftover,
    named_errors,
    partial_name,
    replace_file,
    sync,
    write_text,
)

__all__ = [
    "LOCK_FILES",
    "FileError",
    "HeldError",
    "Record",
    "check",
    "check_writable",
    "descriptor_of",
    "held",
    "is_leftover",
    "named_errors",
    "parse_json",
    "partial_name",
    "read_json",
    "read_json_lines",
    "read_metadata",
    "read_sealed",
    "read_tensors",
    "read_text",
    "read_yaml",
    "remove_leftovers",
    "remove_tree",
    "replace_file",
    "sha256_of",
    "sync",
    "write_folder",
    "write_sealed",
    "write_text",
    "write_yaml",
]
