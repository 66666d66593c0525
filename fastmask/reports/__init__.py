"""One report from finished runs: every analysis of `fastmask.analysis` over training runs and comparisons.

`folders` says what a given folder is, `loading` brings parsers and sentences. For each analysis a function adds to what
was found (`scores`, `masks`, `conflicts`, `crossing`). `page` makes ``report.html``, and `making` is the whole.
"""
