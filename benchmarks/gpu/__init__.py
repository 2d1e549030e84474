"""All that is to be measured on one GPU, within eight minutes: ``python -m benchmarks.gpu [--out DIR] [--seconds 460]``.

Parts, in this order: the versions; measurements, meta-gradients and a guarded training on the GPU beside the CPU's, for
every criterion, order and optimizer (capturable and fused ones included); how often a training step and a check make
the host wait; the rows of ``benchmarks.meta_step`` beside the hand-written loop, with their memory; CUDA graphs; what a
check costs; a 16 x 16 phase diagram; JAX on the same card, if it is installed; ``torch.compile``; the paper's panels at
their full size, cut to what time is left. After each part ``gpu.json`` and ``gpu.md`` are written anew, so that a run
that is cut short leaves what it has; at the end come ``meta_step.png`` and ``phase.png``. A part that fails is reported
with its error, and makes the exit code 1. PyHessian and JAX are used where they can be imported. Without a GPU it runs
on the CPU, much smaller, which is a test of the program: its times say nothing.
"""
