"""One report from finished runs: every analysis of `fastmask.analysis` over training runs and comparisons.

`folders` says what a given folder is, `sentences` and `loading` bring the runs' sentences and parsers. For each
analysis a function plans jobs that gather its inputs and call it (`masks`, `conflicts`, `along`, `crossing`,
`ablating`, `scores`); `analyses` lists them. `jobs` does the jobs in several processes, `page` makes ``report.html``,
`writing` puts the files in place, and `making` is the whole.
"""
