"""Naive fp64 oracles, written for clarity only; tests and benchmarks compare the product against them."""

import torch

# --- pruning (scores, greedy removal, refit, statistics) -------------------------------------------------


def naive_ridge_refit(down, kept, inputs, ridge):
    """argmin over W' of mean ||W' x_S - W x||^2 + ridge ||W' - W_S||^2, by least squares on stacked rows.

    down [D, F], inputs [T, F], kept a list; all float64. Without normal equations, unlike the product.
    """
    rows = inputs[:, kept] / len(inputs) ** 0.5
    target = inputs @ down.T / len(inputs) ** 0.5
    eye = ridge**0.5 * torch.eye(len(kept), dtype=torch.float64)
    stacked = torch.cat([rows, eye])
    wanted = torch.cat([target, ridge**0.5 * down[:, kept].T])
    return torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution.T


def naive_ridge_objective(down, kept, inputs, ridge):
    """That minimum plus ridge ||W_P||^2: what removing all other channels costs under H = C + ridge I."""
    gone = [j for j in range(down.shape[1]) if j not in kept]
    damped = inputs.T @ inputs / len(inputs) + ridge * torch.eye(down.shape[1], dtype=torch.float64)
    inner = damped[gone][:, gone]
    if kept:
        across = damped[gone][:, kept]
        inner = inner - across @ torch.linalg.solve(damped[kept][:, kept], across.T)
    return float(torch.trace(down[:, gone] @ inner @ down[:, gone].T))


def naive_greedy_removal(down, inputs, count, ridge):
    """Channels in the order in which the objective grows least, every candidate tried from scratch."""
    gone = []
    for _ in range(count):
        alive = [j for j in range(down.shape[1]) if j not in gone]
        costs = {j: naive_ridge_objective(down, [k for k in alive if k != j], inputs, ridge) for j in alive}
        gone.append(min(costs, key=costs.get))
    return gone
