"""Whether measured limits lie in their intervals: ``python -m benchmarks.coverage [--problems 1000]``.

Random meta-learning problems of at most 120 parameters, in float64: nine activations, three norm layers or none, one to
three inner steps, all orders, one to four tasks, regression and classification, learned inner rates, and SGD, momentum
or Adam as the meta-optimizer. ``lambda_max``, ``beta_c`` of the simplified criterion and ``exact_beta_c`` are compared
with the eigenvalues of dense matrices, made here from a forward pass and meta-gradients written anew. As in the guard,
an eigenvalue smaller than ``tol`` times the largest, or with a real part that is not positive, limits no rate.

Printed are, by order: how many values lie inside their intervals, how many are resolved (the interval is
narrower than 10 %), and each value outside with its problem. A ReLU that sits exactly on its kink is named as such.
"""
