"""An episode by the book, on full copies of the parser: what the meta-gradients of a run are compared with."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from toy_run import toy_data

import fastmask as fm
from fastmask.tasks.parsing.parser import Parser
from fastmask.tasks.parsing.task import Parsing
from fastmask.training.batches import episode_sampler
from fastmask.training.config import TrainConfig


def first_meta_gradient(parser: Parser, config: TrainConfig, subnetworks: Any = None) -> dict[str, Tensor]:
    """The meta-gradient of a run's first episode, by parameter name.

    FOMAML: mean of the languages' query gradients after K steps of SGD on one support batch. Reptile: mean of
    (theta - phi) / (K * inner learning rate) after K steps on K batches. A dead unit gets no gradient, so SGD on a
    copy of everything leaves it as it is.
    """
    task = Parsing(parser, config.max_length)
    data = {name: task.training_examples(splits["train"], name) for name, splits in toy_data().items()}
    draws = next(episode_sampler(config, data))
    total = {name: torch.zeros_like(p) for name, p in parser.named_parameters() if p.requires_grad}
    theta = {name: p.detach().clone() for name, p in parser.named_parameters()}

    def rate(name: str) -> float:
        of_encoder = name.split(".")[0] in ("encoder", "trigrams", "upos", "root")
        return config.inner_encoder_lr if of_encoder else config.inner_lr

    for draw in draws:
        phi = copy.deepcopy(parser)
        if subnetworks is not None:
            fm.attach(phi.encoder, subnetworks)
        language_id = -1 if subnetworks is None else subnetworks.index(draw.language)

        def gradient(rows: np.ndarray, draw: Any = draw, phi: Parser = phi, number: int = language_id) -> None:
            phi.zero_grad(set_to_none=True)
            batch = phi.features.collate(data[draw.language].select(rows))
            phi(replace(batch, language_ids=torch.full((len(rows),), number))).loss.backward()

        K = config.inner_steps
        batches = [draw.support] * K if config.meta == "fomaml" else np.split(draw.support, K)
        for rows in batches:
            gradient(rows)
            with torch.no_grad():
                for name, parameter in phi.named_parameters():
                    if parameter.grad is not None:
                        parameter -= rate(name) * parameter.grad
        if config.meta == "fomaml":
            gradient(draw.query)
        for name, parameter in phi.named_parameters():
            if name in total and config.meta == "fomaml":
                total[name] += parameter.grad / len(draws)
            elif name in total:
                total[name] += (theta[name] - parameter.detach()) / (K * rate(name)) / len(draws)
    return total
