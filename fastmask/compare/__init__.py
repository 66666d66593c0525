"""One comparison under one budget: methods x meta-learning x seeds, on the training languages and on unseen ones.

`plan` says which cells there are and in which order they may run, `engine` deals them out to processes, `cells` trains
one and `scoring` evaluates it, `tables` and `pictures` put all of them side by side.
"""
