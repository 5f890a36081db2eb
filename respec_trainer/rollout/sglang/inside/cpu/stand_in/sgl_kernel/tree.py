"""Draft trees: construction from the drafter's choices, and greedy verification.

A tree has n nodes for each request, the root (the last sampled token) first and parents before children. It is stored
as links: retrieve_next_token [B, n], a node's first child, and retrieve_next_sibling [B, n], its next sibling; -1 for
none. retrieve_index [B, n] is a node's index over all requests.
"""

from __future__ import annotations

import functools

import torch

QLEN_ONLY = 1  # the mask covers draft tokens only; all of them attend to the request's prefix


def build_tree_kernel_efficient_cpu(
    parent_list, selected_index, seq_lens, tree_mask, positions, retrieve_index, retrieve_next_token,
    retrieve_next_sibling, topk, depth, draft_token_num, tree_mask_mode,
) -> None:  # fmt: skip
    """Make a tree of the drafter's selected candidates; write `tree_mask` and the arguments after it, up to the links.

    selected_index: [B, n - 1] ascending candidate numbers. Candidate c was proposed by expansion c // topk: the root's
    expansion for 0, else that of candidate parent_list[b, c // topk].
    tree_mask: bool [B * n * n], True where the row's node may attend to the column's node, itself or an ancestor.
    """
    if int(tree_mask_mode) != QLEN_ONLY:
        raise NotImplementedError(f"the CPU stand-in of sgl_kernel builds QLEN_ONLY tree masks, not {tree_mask_mode!r}")
    batch, n = seq_lens.numel(), draft_token_num
    if topk == 1:
        mask, child, sibling = _chain(n)  # the same for all requests
    else:
        mask, child, sibling = _structure(_parents(parent_list, selected_index, topk), depth)
    tree_mask.view(-1)[: batch * n * n].view(batch, n, n).copy_(mask)
    positions.view(batch, n).copy_(seq_lens[:, None] + mask.sum(-1) - 1)
    retrieve_index.view(batch, n).copy_(torch.arange(batch * n).view(batch, n))
    retrieve_next_token.view(batch, n).copy_(child)
    retrieve_next_sibling.view(batch, n).copy_(sibling)


def verify_tree_greedy_cpu(
    predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
    target_predict,
) -> None:  # fmt: skip
    """Accept, from the root on, the child whose token is the target's choice.

    candidates, target_predict: [B, n] each node's token, and the target's choice after it.
    Write accept_index [B, K] (global node indices, then -1), accept_token_num [B] (number of accepted drafts) and, at
    accepted nodes, predicts [B * n].
    """
    batch, width = accept_index.shape
    request = torch.arange(batch)
    target = target_predict.view(candidates.shape)
    if is_chain(retrive_next_token, retrive_next_sibling):
        count = accept_chain(accept_index, retrive_index, candidates[:, 1:] == target[:, :-1])
        accept_token_num.copy_(count)
        return store_predictions(predicts, accept_index, count, target.flatten())
    node = torch.zeros(batch, dtype=torch.int64)
    count = torch.zeros(batch, dtype=torch.int64)
    accept_index[:, 0] = retrive_index[:, 0]
    for _ in range(1, width):
        wanted = target[request, node]
        child = retrive_next_token[request, node]
        wrong = (child >= 0) & (candidates[request, child] != wanted)
        while bool(wrong.any()):
            child = torch.where(wrong, retrive_next_sibling[request, child], child)
            wrong = (child >= 0) & (candidates[request, child] != wanted)
        accepted = child >= 0
        if not bool(accepted.any()):
            break
        count += accepted
        node = torch.where(accepted, child, node)
        # Requests that have stopped write their last node again, at the same index.
        accept_index[request, count] = retrive_index[request, node].to(accept_index.dtype)
        # A request that has stopped finds the same mismatch in every later round.
    accept_token_num.copy_(count)
    return store_predictions(predicts, accept_index, count, target.flatten())


def is_chain(retrive_next_token, retrive_next_sibling) -> bool:
    """Return whether each request's nodes form one chain, in order."""
    n = retrive_next_token.shape[1]
    in_order = retrive_next_token[:, :-1] == torch.arange(1, n)
    return bool(in_order.all()) and bool((retrive_next_sibling < 0).all())


def accept_chain(accept_index, retrive_index, good) -> torch.Tensor:
    """Accept a chain's drafts before the first that is not `good` [B, n - 1]; return their number [B]."""
    width = accept_index.shape[1]
    count = good[:, : width - 1].long().cumprod(1).sum(1)
    accepted = torch.arange(width) <= count[:, None]
    accept_index.copy_(torch.where(accepted, retrive_index[:, :width], -1))
    return count


def store_predictions(predicts, accept_index, count, tokens) -> None:
    """Set predicts[i] = tokens[i] at every accepted node i. tokens: [B * n]."""
    kept = accept_index[torch.arange(accept_index.shape[1]) <= count[:, None]].long()
    predicts[kept] = tokens[kept].to(predicts.dtype)


def _structure(parents, depth: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return attention mask [B, n, n], first children [B, n] and next siblings [B, n], from parents [B, n]."""
    n = parents.shape[1]
    mask = torch.eye(n, dtype=torch.bool).expand(len(parents), n, n)
    for _ in range(depth):
        mask = mask | mask.gather(1, parents[:, :, None].expand(mask.shape))
    # In `parents` the root is its own parent, but it must not become its own child.
    return mask, *links_of(torch.where(torch.arange(n) > 0, parents, -1))


def links_of(parents) -> tuple[torch.Tensor, torch.Tensor]:
    """Return first children [B, n] and next siblings [B, n], from parents [B, n], with -1 for the root."""
    node = torch.arange(parents.shape[1])
    is_child = parents[:, None, :] == node[:, None]
    follows = (parents[:, None, :] == parents[:, :, None]) & (node > node[:, None]) & (node[:, None] > 0)
    return _first_true(is_child), _first_true(follows)


@functools.cache
def _chain(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _structure(torch.arange(-1, n - 1).clamp(min=0)[None], depth=n)


def _parents(parent_list, selected_index, topk: int) -> torch.Tensor:
    """Return each node's parent node [B, n]; the root is its own parent."""
    expansion = selected_index // topk
    parents = torch.zeros_like(expansion)
    if parent_list.numel():
        proposer = parent_list.gather(1, expansion)  # candidate number, meaningless where expansion is 0
        same = selected_index[:, None, :] == proposer[:, :, None]
        parents = torch.where(expansion > 0, _first_true(same) + 1, 0)
    return torch.nn.functional.pad(parents, (1, 0))


def _first_true(mask: torch.Tensor) -> torch.Tensor:
    """Return the index of the first True along the last dimension, -1 for none."""
    return torch.where(mask.any(-1), mask.int().argmax(-1), -1)
