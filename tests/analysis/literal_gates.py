"""The oracle of the gates: the plain model, gates multiplied in by hooks, one example at a time."""

from __future__ import annotations

import torch

CONSUMERS = {
    "bert": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    "llama": ("layers.{}.self_attn.o_proj", "layers.{}.mlp.down_proj"),
}


def target_of(model):
    return torch.randn(24, generator=torch.Generator().manual_seed(2)).double()


def loss_of(model):
    """A loss for each example of a batch of inputs."""
    target = target_of(model)
    return lambda inputs: ((model(**inputs)[0] - target) ** 2).mean((1, 2))


def literal_gradients(model, inputs, masks):
    """dL_example / dgate of the plain `model`: {kind: [B, layers, units]}; `masks`: {kind: bool [layers, units]}."""
    target, per_example = target_of(model), []
    for position in range(len(inputs["input_ids"])):
        gates = {kind: keep.double().requires_grad_() for kind, keep in masks.items()}
        handles = []
        for kind, name in zip(("heads", "neurons"), CONSUMERS[model.config.model_type], strict=True):
            for layer in range(2) if kind in gates else ():
                gate = gates[kind][layer]
                handles.append(
                    model.get_submodule(name.format(layer)).register_forward_pre_hook(
                        lambda m, args, gate=gate: (args[0] * gate.repeat_interleave(args[0].shape[-1] // len(gate)),)
                    )
                )
        example = {name: value[position : position + 1] for name, value in inputs.items()}
        loss = ((model(**example)[0] - target) ** 2).mean()
        per_example.append(torch.autograd.grad(loss, list(gates.values())))
        for handle in handles:
            handle.remove()
    return {kind: torch.stack(grads) for kind, grads in zip(masks, zip(*per_example, strict=True), strict=True)}
