"""One comparison under one budget: methods x meta-learning x seeds, on the training languages and on unseen ones.

`plan` says which jobs there are and in which order they may run, and does them side by side; `scoring` evaluates a
model, and `tables` and `report` put all of them side by side.
"""
