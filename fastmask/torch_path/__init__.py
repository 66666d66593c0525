"""The torch path of `masked_linear`: plain PyTorch, exact, and skipping what is dead.

`layers` runs a batch, whose languages lie side by side (`split`); each mask kind says what one language's tokens
compute (`units` for rows and columns, `tiles` for blocks and single weights) with the products of `gemm`, which may be
those of `onednn`. `packing` says what lies where on a packed side. `naive` is the oracle of every test.
"""
