"""Verification by sampling: the output follows the target's distribution exactly.

Usually the draft tokens are chosen and not drawn, so their draft probabilities are not used (Leviathan et al. 2023 with
a draft distribution of one point; for trees Miao et al. 2024, SpecInfer). At a node, a uniform number u in [0, 1) falls
either into the target's probability of one of the children, taken in order, and that child is accepted; or into the
rest, and a token is drawn from the rest. So no two children of a node may be the same token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .tree import accept_chain, is_chain, store_predictions


def top_k_renorm_prob(probs: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """Keep each row's k most probable tokens, the first ones if equal, and renormalize the row. probs: [rows, V]."""
    order = probs.sort(stable=True, dim=-1, descending=True).indices
    kept = torch.arange(probs.shape[-1]) < top_ks.view(-1, 1)
    return _renormalize(probs, order, kept)


def top_p_renorm_prob(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """Keep each row's most probable tokens until they sum to top_p, and renormalize the row. probs: [rows, V]."""
    ordered, order = probs.sort(stable=True, dim=-1, descending=True)
    kept = ordered.cumsum(-1) - ordered <= top_ps.view(-1, 1)
    return _renormalize(probs, order, kept)


def tree_speculative_sampling_target_only(
    predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
    uniform_samples, uniform_samples_for_final_sampling, target_probs, draft_probs, threshold_single=1.0,
    threshold_acc=1.0, deterministic=True,
) -> None:  # fmt: skip
    """Accept drafts and draw one more token, by the target's probabilities [B, n, V] after each node.

    uniform_samples: [B, n], one number for each node's children. uniform_samples_for_final_sampling: [B].
    Write the same three outputs as `tree.verify_tree_greedy_cpu`. Thresholds below 1 accept drafts too often for the
    target's distribution. `draft_probs` is not read.
    """
    if candidates.shape[1] == 1:  # verification without drafts must cost no more than decoding
        only = target_probs[:, 0]
        predicts.copy_(_draw(only.double(), uniform_samples_for_final_sampling, only))
        accept_index.copy_(retrive_index)
        accept_token_num.zero_()
        return
    rule = _AcceptanceRule(candidates, uniform_samples, target_probs, threshold_single, threshold_acc)
    links = retrive_next_token, retrive_next_sibling
    if is_chain(*links):
        count, node, rejected = _walk_chain(rule, accept_index, retrive_index)
        tokens = torch.nn.functional.pad(candidates[:, 1:].long(), (0, 1))
    else:
        count, node, rejected, tokens = _walk_tree(rule, accept_index, retrive_index, *links)
    request = torch.arange(len(candidates))
    last_probs = target_probs[request, node]
    tokens[request, node] = draw_rest(last_probs, candidates, rejected, uniform_samples_for_final_sampling)
    accept_token_num.copy_(count)
    store_predictions(predicts, accept_index, count, tokens.flatten())


def chain_speculative_sampling(
    predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
    uniform_samples, uniform_samples_for_final_sampling, target_probs, draft_probs, threshold_single=1.0,
    threshold_acc=1.0, deterministic=True,
) -> None:  # fmt: skip
    """Accept each draft with probability min(1, p / q), and draw one more token (Leviathan et al. 2023).

    p are the target's probabilities, q the drafter's. The last token is drawn from p if all drafts were accepted, else
    in proportion to max(p - q, 0) at the rejected draft. The function is for chains whose drafts were drawn from
    draft_probs [B, n - 1, V]. Other arguments are as in `tree_speculative_sampling_target_only`; the thresholds are
    not read.
    """
    drafts = candidates[:, 1:].long()
    p = target_probs[:, :-1].gather(2, drafts[:, :, None]).squeeze(2)
    q = draft_probs.gather(2, drafts[:, :, None]).squeeze(2)
    count = accept_chain(accept_index, retrive_index, (q > 0) & (uniform_samples[:, :-1] * q < p))
    accept_token_num.copy_(count)
    request, length = torch.arange(len(candidates)), drafts.shape[1]
    target = target_probs[request, count].double()
    surplus = (target - draft_probs[request, count.clamp(max=length - 1)]).clamp(min=0)
    rest = torch.where((count < length)[:, None], surplus, target)
    tokens = torch.nn.functional.pad(drafts, (0, 1))
    tokens[request, count] = _draw(rest, uniform_samples_for_final_sampling, target)
    store_predictions(predicts, accept_index, count, tokens.flatten())


class _AcceptanceRule(NamedTuple):
    candidates: torch.Tensor  # [B, n]
    uniform: torch.Tensor  # [B, n]
    probs: torch.Tensor  # [B, n, V]
    threshold_single: float
    threshold_acc: float

    def accepts(self, uniform, mass, p) -> torch.Tensor:
        """Return whether to accept a child of probability p; `mass`: the sum of p and its earlier siblings'."""
        return (uniform < mass / self.threshold_acc) | (p >= self.threshold_single)


def _walk_chain(rule: _AcceptanceRule, accept_index, retrive_index):
    """Return (number of accepted drafts [B], last accepted node [B], mask of rejected drafts [B, n])."""
    p = rule.probs[:, :-1].gather(2, rule.candidates[:, 1:, None].long()).squeeze(2)
    count = accept_chain(accept_index, retrive_index, rule.accepts(rule.uniform[:, :-1], p, p))
    rejected = torch.arange(rule.candidates.shape[1]) == count[:, None] + 1
    return count, count, rejected


def _walk_tree(rule: _AcceptanceRule, accept_index, retrive_index, next_token, next_sibling):
    """Return the same as `_walk_chain`, and the draft accepted after each node [B, n]."""
    candidates = rule.candidates
    batch, width = accept_index.shape
    request = torch.arange(batch)
    node, count = torch.zeros(2, batch, dtype=torch.int64)
    tokens = torch.zeros(candidates.shape, dtype=torch.int64)
    rejected = torch.zeros(candidates.shape, dtype=torch.bool)
    walking = torch.ones(batch, dtype=torch.bool)
    accept_index[:, 0] = retrive_index[:, 0]
    for _ in range(1, width):
        child = torch.where(walking, next_token[request, node], -1)
        mass = torch.zeros(batch)
        accepted = torch.zeros(batch, dtype=torch.bool)
        while bool((trying := (child >= 0) & ~accepted).any()):
            p = rule.probs[request, node, candidates[request, child].long()]
            mass += torch.where(trying, p, 0)
            accepted |= trying & rule.accepts(rule.uniform[request, node], mass, p)
            refused = trying & ~accepted
            rejected[request[refused], child[refused]] = True
            child = torch.where(refused, next_sibling[request, child], child)
        walking = accepted
        if not bool(walking.any()):
            break
        who, new = request[walking], child[walking]
        tokens[who, node[walking]] = candidates[who, new].long()
        rejected[who] = False
        node[who] = new
        count += walking
        accept_index[who, count[who]] = retrive_index[who, new].to(accept_index.dtype)
    return count, node, rejected, tokens


def draw_rest(probs, candidates, rejected, uniform) -> torch.Tensor:
    """Draw a token [B] from probs [B, V] without the rejected candidates."""
    who, which = rejected.nonzero(as_tuple=True)
    rest = probs.double()
    rest[who, candidates[who, which].long()] = 0
    return _draw(rest, uniform, probs)


def _draw(rest, uniform, probs) -> torch.Tensor:
    """Draw a token [B] in proportion to rest [B, V]."""
    cumulative = rest.cumsum(-1)
    total = cumulative[:, -1:]
    # u < 1, so u * total < total, and the first token whose cumulative mass exceeds it has a mass above zero.
    token = torch.searchsorted(cumulative, uniform.view(-1, 1).double() * total, right=True).squeeze(1)
    # If the rejected tokens had all the mass but for rounding, nothing is left: take the most probable token.
    return torch.where(total.squeeze(1) > 0, token.clamp(max=probs.shape[-1] - 1), probs.argmax(-1))


def _renormalize(probs, order, kept) -> torch.Tensor:
    keep = torch.empty_like(kept.expand(probs.shape)).scatter_(-1, order, kept.expand(probs.shape))
    kept_probs = probs.masked_fill(~keep, 0)
    return kept_probs / kept_probs.sum(-1, keepdim=True)
