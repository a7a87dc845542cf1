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
            own_lr = recipe.attention_lr != 1 and id(parameter) in gates
            no_decay = recipe.decay_matrices_only and parameter.ndim < 2
            groups.setdefault((own_lr, no_decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": recipe.lr * (recipe.attention_lr if own_lr else 1),
            "weight_decay": 0.0 if no_decay else recipe.weight_decay,
        }
        for (own_lr, no_decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def make_optimizer(recipe: Recipe, parameters) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameters`."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
