"""What the guard's limits are compared with."""

import torch

from benchmarks.limits_networks import Objective, problem_of


def test_the_networks_gradient_and_hessian_are_those_of_their_loss():
    objective = Objective(problem_of("tanh", 0, 0.05))
    theta, step = objective.start, 1e-5
    way = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    (above, rising), (below, falling) = (objective(theta + sign * step * way) for sign in (1, -1))
    assert abs((above - below) / (2 * step) - float(objective(theta)[1] @ way)) < 1e-6 * abs(above)
    assert torch.allclose(objective.hessian(theta) @ way, (rising - falling) / (2 * step), rtol=1e-5, atol=1e-6)
