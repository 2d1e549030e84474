"""Cost of a check, beside PyHessian, hessian-eigenthings and curvlinops: ``python -m benchmarks.check_cost``."""
