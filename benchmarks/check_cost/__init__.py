"""What a check costs, beside PyHessian, hessian-eigenthings and curvlinops: see ``run``."""
