"""The torch path of `masked_linear`: plain PyTorch, exact, and skipping what is dead.

`layers` runs a batch, language after language (`split`); each mask kind says what one language's tokens compute
(`units` for rows and columns; `tiles`: `blocks`, `weights`) with the products of `gemm`. `gated` takes all languages at
once where each has few tokens; `full` runs layers whose masks only say what may learn. `naive` is the oracle of every
test.
"""
