"""The poster's experiments: ``python examples/phase_diagram.py [linear|sinusoid|omniglot|miniimagenet] [--full]``.

Trains a grid of inner and meta rates, draws the training error with the critical rates, and prints for each inner rate
the largest meta rate that trained beside the guard's. Writes PANEL.png, PANEL_spectrum.png, PANEL.json and PANEL.npz
into ``runs/phase_diagram``; run again, it goes on where it was broken off. Image data is read from ``$LMG_DATA``.
``torchrun --nproc_per_node=N examples/phase_diagram.py ...`` deals the grid out over N processes.
"""

from lightning_maml_guard.cli.phase_diagram import main

if __name__ == "__main__":
    main(prog="phase_diagram.py")
