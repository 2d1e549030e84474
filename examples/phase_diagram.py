"""Phase diagrams: ``python examples/phase_diagram.py [linear|sinusoid|omniglot|miniimagenet|near-minimum]``.

The experiments of Takagi et al.: trains a grid of inner and outer learning rates, draws the training error with the
largest outer rate that trained, and prints for each inner rate that rate beside the measured limits. Writes PANEL.png,
PANEL_ends.png, PANEL_spectrum.png, PANEL.json and PANEL.npz into ``runs/phase_diagram``; run again, it continues where
it was interrupted. ``--resampled`` draws tasks anew at every step, ``--full`` takes the published sizes, ``--seeds N``
repeats the panel. Image data is read from ``$LMG_DATA``. ``torchrun --nproc_per_node=N examples/phase_diagram.py ...``
divides the grid among N processes.
"""

from lightning_maml_guard.cli.phase_diagram import main

if __name__ == "__main__":
    main(prog="phase_diagram.py")
