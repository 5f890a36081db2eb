"""Draft trees that are given as masks, such as n-gram drafts."""

from __future__ import annotations

import torch

from .tree import links_of


def reconstruct_indices_from_tree_mask(
    tree_mask, verified_seq_len, positions, retrive_index, retrive_next_token, retrive_next_sibling, batch_size,
    draft_token_num,
) -> None:  # fmt: skip
    """Write positions and links [B, n] of the trees in tree_mask, bool [B * n * n]: True at a node and its ancestors.

    Parents must come before children.
    """
    batch, n = batch_size, draft_token_num
    node = torch.arange(n)
    ancestors = tree_mask.view(-1)[: batch * n * n].view(batch, n, n) & (node < node[:, None])
    parents = torch.where(ancestors, node, -1).amax(-1)
    child, sibling = links_of(parents)
    positions.view(-1)[: batch * n].view(batch, n).copy_(verified_seq_len[:, None] + ancestors.sum(-1))
    retrive_index.copy_(torch.arange(batch * n).view(batch, n))
    retrive_next_token.copy_(child)
    retrive_next_sibling.copy_(sibling)
