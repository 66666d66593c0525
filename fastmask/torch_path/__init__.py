"""The torch path of `masked_linear`: plain PyTorch, exact, and skipping what is dead.

`segments` splits a mixed-language batch into one piece for each language; each mask kind then says what one language's
piece computes: `rows` and `columns` (`units` and `live_units` are what they share), `blocks`, `weights`. `looped` goes
from language to language, `gated` and `batched` take all of them at once where each has few tokens, and `choice` knows
what each costs. `naive` is the oracle of every test.
"""
