"""Back through one stage of training, on the query side (METHOD: multi-stage; B25).

    x_(k-1) = alpha_k (G_k + alpha_k + lambda_k)^-1 x_k        x_n = grad(-f) at theta_n

theta_k = argmin L_k(theta) + alpha_k/2 |theta - theta_(k-1)|^2, so d theta_k / d theta_(k-1) is alpha_k times the
inverse. Vectors lie in storage at full rank, a file per query and group of layers: the next stage reads them where a
single-stage run would take gradients, and no rank ever holds two models.
"""

from __future__ import annotations

from dataclasses import dataclass

from infscan.config import Solver
from infscan.influence.layers import Layer
from infscan.passes.factor_store import write_tensors
from infscan.passes.queries import Inverse, preconditioned
from infscan.passes.rank import Rank
from infscan.queries import Query
from infscan.storage import Store


@dataclass(frozen=True)
class StageTask:
    """A group of queries for a group of layers, at a rank with the stage's model. names: a file for each query."""

    store: Store
    names: tuple[str, ...]
    queries: tuple[Query, ...]
    layers: tuple[Layer, ...]
    inverse: Inverse


def stage_task(rank: Rank, task: StageTask) -> int:
    """Write x_(k-1) of every query, [O, I] by layer, in the statistics' dtype. Returns the tokens of the queries.

    Without factors (solver=identity) G_k and lambda_k are zero, and x_(k-1) = x_k: the limit of a large alpha.
    """
    P = preconditioned(rank, task.queries, task.layers, task.inverse)
    scale = 1.0 if task.inverse.solver is Solver.identity else task.inverse.alpha
    if rank.leads:
        for index, name in enumerate(task.names):
            write_tensors(task.store, name, {layer: scale * P_qoi[index] for layer, P_qoi in P.items()})
    return sum(len(part.token_ids) for query in task.queries for part in query.parts)
