"""A small parser with subnetworks of three languages, and support sentences, for the tests of this folder."""

from __future__ import annotations

import torch

import fastmask as fm
from fastmask.tasks.parsing.features import Encoded
from fastmask.tasks.parsing.parser import Parser
from fastmask.unseen import with_union
from tests.tasks.toy_parser import SENTENCES, small_parser

LANGUAGES = ["aa", "bb", "cc"]


def parser_with_subnets(dropout: float = 0.0, density: float = 0.5) -> tuple[Parser, fm.Subnetworks]:
    """A random parser in float64 whose encoder has subnetworks and their union attached."""
    parser = small_parser(dropout).double().eval()
    for name, parameter in parser.encoder.named_parameters():  # biases start at zero and would hide what is gated
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    subnets = with_union(fm.Subnetworks.random(parser.encoder.config, LANGUAGES, density, seed=1, units="both"))
    fm.attach(parser.encoder, subnets)
    return parser, subnets


def support_of(parser: Parser, times: int = 1) -> Encoded:
    """The toy sentences, of different lengths."""
    return parser.features.encode(SENTENCES * times, parser.vocabulary)


def bits_of(parser: Parser) -> dict[str, torch.Tensor]:
    """All parameters and buffers, copied."""
    return {name: value.clone() for name, value in parser.state_dict().items()}


def assert_same_bits(parser: Parser, before: dict[str, torch.Tensor]) -> None:
    """Nothing has changed by a bit."""
    for name, value in parser.state_dict().items():
        kind = {8: torch.int64, 4: torch.int32}[value.element_size()]
        assert torch.equal(value.view(kind), before[name].view(kind)), name
