"""Files of users and of runs: read with messages that name them, written whole or not at all, deleted only if ours.

Every other module reads JSON, YAML and safetensors, replaces files and removes folders through this one.
"""

from fastmask.files.descriptors import descriptor_of
from fastmask.files.locking import HeldError, held
from fastmask.files.reading import (
    FileError,
    Record,
    check,
    read_json,
    read_json_lines,
    read_metadata,
    read_tensors,
    read_text,
    read_yaml,
    sha256_of,
)
from fastmask.files.writing import (
    check_writable,
    partial_name,
    remove_leftovers,
    remove_tree,
    replace_file,
    sync,
    write_text,
)

__all__ = [
    "FileError",
    "HeldError",
    "Record",
    "check",
    "check_writable",
    "descriptor_of",
    "held",
    "partial_name",
    "read_json",
    "read_json_lines",
    "read_metadata",
    "read_tensors",
    "read_text",
    "read_yaml",
    "remove_leftovers",
    "remove_tree",
    "replace_file",
    "sha256_of",
    "sync",
    "write_text",
]
