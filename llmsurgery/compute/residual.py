"""The residual stream of a model: read it after every block, read what is added to it, or change it.

Entry 0 is the embedding output, entry l the residual after block l, before the final norm. The last of transformers'
`hidden_states` is already normed; here no entry is, so that norm and head read all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import Structure
from llmsurgery.compute.blocks import blocks_path
from llmsurgery.compute.head import Head, backbone, read_head


def block_modules(model: PreTrainedModel, structure: Structure) -> list[torch.nn.Module]:
    """Return the blocks of a model in order."""
    path = blocks_path(structure)
    return [model.get_submodule(f"{path}.{layer}") for layer in range(structure.layers)]


def final_norm(model: PreTrainedModel, structure: Structure) -> torch.nn.Module:
    """Return the norm before the head."""
    norm: torch.nn.Module = model.get_submodule(structure.family.roles["norm.final"])
    return norm


def first_tensor(output: Any) -> torch.Tensor:
    """Return the hidden states of what a module returned; some return a tuple."""
    value: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return value


@contextmanager
def _hooks(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_entries(
    model: PreTrainedModel, structure: Structure, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> list[torch.Tensor]:
    """Return the residual stream: entry 0 and the one after every block.

    Args:
        model: A causal language model.
        structure: Its roles.
        input_ids: Token ids [batch, time].
        attention_mask: 1 for tokens, 0 for padding [batch, time].

    Returns:
        Blocks + 1 tensors [batch, time, width], none of them normed.
    """
    caught: list[torch.Tensor] = []

    def before(_module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        caught.append(arguments[0] if arguments else keywords["hidden_states"])

    blocks = block_modules(model, structure)
    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(final_norm(model, structure).register_forward_pre_hook(before, with_kwargs=True))
    with _hooks(handles):
        backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return caught


def site_paths(model: PreTrainedModel, structure: Structure, site: str) -> list[tuple[str, bool]] | None:
    """Return where a site is read in every block: module path, and whether it is the module's input.

    Args:
        model: A causal language model.
        structure: Its roles.
        site: "attention", "mlp" or "middle".

    Returns:
        One pair per block, None where the family has no such site: no residual stands between attention and MLP where
        both read the block's input, or where no norm stands before the MLP.
    """
    roles, present = structure.family.roles, set(structure.roles)
    if site == "middle":
        parallel = bool(getattr(model.config, "use_parallel_residual", False))
        if "norm.mlp" not in present or parallel:
            return None
        return [(roles["norm.mlp"].format(layer=layer), True) for layer in range(structure.layers)]
    post, inside = {"attention": ("norm.attn_post", ("attn.o",)), "mlp": ("norm.mlp_post", ("mlp.down", "router"))}[
        site
    ]
    if post in present:
        # Norms after a sublayer: what is added to the residual is their output.
        return [(roles[post].format(layer=layer), False) for layer in range(structure.layers)]
    role = next(role for role in inside if role in present)
    parent = roles[role].rpartition(".")[0]
    return [(parent.format(layer=layer), False) for layer in range(structure.layers)]


def read_sites(
    model: PreTrainedModel, structure: Structure, site: str, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> list[torch.Tensor] | None:
    """Return what one site holds in every block; arguments as for `read_entries` and `site_paths`.

    Returns:
        One tensor [batch, time, width] per block, None where the family has no such site.
    """
    paths = site_paths(model, structure, site)
    if paths is None:
        return None
    caught: list[torch.Tensor] = []

    def reads_input(_module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        caught.append(arguments[0] if arguments else keywords["hidden_states"])

    def reads_output(_module: torch.nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        caught.append(first_tensor(output))

    handles = [
        model.get_submodule(path).register_forward_pre_hook(reads_input, with_kwargs=True)
        if is_input
        else model.get_submodule(path).register_forward_hook(reads_output)
        for path, is_input in paths
    ]
    with _hooks(handles):
        backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return caught


Change = Callable[[int, torch.Tensor], torch.Tensor]
"""Returns the residual to go on with, given the entry's number and the residual [batch, time, width]."""


@contextmanager
def changed_residual(model: PreTrainedModel, structure: Structure, change: Change) -> Iterator[None]:
    """Let every entry of the residual stream pass through a function for the length of a `with` block.

    Args:
        model: A causal language model.
        structure: Its roles.
        change: Called with entry 0 to the number of blocks, out of place.
    """

    def embedded(_module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            return (change(0, arguments[0]), *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": change(0, keywords["hidden_states"])}

    def after(entry: int) -> Callable[..., Any]:
        def hook(_module: torch.nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
            value = change(entry, first_tensor(output))
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    blocks = block_modules(model, structure)
    handles = [blocks[0].register_forward_pre_hook(embedded, with_kwargs=True)]
    handles += [block.register_forward_hook(after(entry)) for entry, block in enumerate(blocks, start=1)]
    with _hooks(handles):
        yield


class Lens:
    """The final norm and the head, to read any entry as if it were the last.

    Args:
        model: A causal language model.
        structure: Its roles.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        self.norm = final_norm(model, structure)
        self.head: Head = read_head(model)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits [positions, vocabulary], fp32, of states [positions, width] before the final norm."""
        normed: torch.Tensor = self.norm(states)
        return self.head.to(normed.dtype).logits(normed).float()
