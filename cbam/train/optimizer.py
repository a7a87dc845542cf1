"""Parameter groups by learning rate and weight decay, and the optimizer over them."""

import torch
from torch import nn

from cbam.surgery import attached
from cbam.train.recipe import Recipe


def parameter_groups(recipe: Recipe, model: nn.Module) -> list[dict]:
    """The trainable parameters, grouped by learning rate and weight decay."""
    gates = {id(p) for part in attached(model).values() for p in part.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            apart = recipe.attention_lr != 1 and id(parameter) in gates
            bare = recipe.decay_matrices_only and parameter.ndim < 2
            groups.setdefault((apart, bare), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": recipe.lr * (recipe.attention_lr if apart else 1),
            "weight_decay": 0.0 if bare else recipe.weight_decay,
        }
        for (apart, bare), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def make_optimizer(recipe: Recipe, parameters) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameters`."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
