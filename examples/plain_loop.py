"""Without Lightning: ``measure()`` in your own training loop, which lowers an outer learning rate that is unsafe."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from lightning_maml_guard import MetaProblem, StabilityReport, measure


def sinusoids(tasks: int = 10, shots: int = 10) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draw support and query sets of sine waves, shapes (tasks, shots, 1)."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), math.pi * torch.rand(tasks, 1, 1)
    xs = 10 * torch.rand(2, tasks, shots, 1) - 5
    ys = amplitude * torch.sin(xs + phase)
    return (xs[0], ys[0]), (xs[1], ys[1])


def main(steps: int = 90) -> list[StabilityReport]:
    """Train MAML, measure every 30 steps, and continue at half of beta_c if the outer learning rate is unsafe."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    params: dict[str, Tensor] = dict(net.named_parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    alpha = 0.01

    def task_loss(at: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(functional_call(net, at, (data[0],)), data[1])

    reports = []
    for step in range(steps):
        support, query = sinusoids()
        if step % 30 == 0:
            problem = MetaProblem(params, task_loss, support, query, inner_lr=alpha)
            report = measure(problem, optimizer=optimizer, step=step)
            reports.append(report)
            print(f"step {step}: beta = {report.beta:.3g}, beta_c = {report.beta_c:.3g}: {report.status}")
            if report.beta_status == "unsafe":
                optimizer.param_groups[0]["lr"] = 0.5 * report.beta_c

        losses = []
        for x, y, query_x, query_y in zip(*support, *query, strict=True):
            gradients = torch.autograd.grad(task_loss(params, (x, y)), list(params.values()), create_graph=True)
            moved = zip(params.items(), gradients, strict=True)
            adapted = {name: value - alpha * gradient for (name, value), gradient in moved}
            losses.append(task_loss(adapted, (query_x, query_y)))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"query loss after {steps} steps: {float(loss.detach()):.3g}")
    return reports


if __name__ == "__main__":
    main()
