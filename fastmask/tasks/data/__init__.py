"""Data of tasks: CoNLL-U and treebanks, artificial languages, codes of languages."""
