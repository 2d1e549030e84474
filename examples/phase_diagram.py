"""Phase diagrams: ``python examples/phase_diagram.py [linear|sinusoid|omniglot|miniimagenet] [--full]``.

The experiments of Takagi et al.: trains a grid of inner and outer learning rates, draws the training error with the
critical rates, and prints for each inner rate the largest outer rate that trained beside the measured limit. Writes
PANEL.png, PANEL_spectrum.png, PANEL.json and PANEL.npz into ``runs/phase_diagram``; run again, it continues where it
was interrupted. Image data is read from ``$LMG_DATA``. ``torchrun --nproc_per_node=N examples/phase_diagram.py ...``
divides the grid among N processes.
"""

from lightning_maml_guard.cli.phase_diagram import main

if __name__ == "__main__":
    main(prog="phase_diagram.py")
