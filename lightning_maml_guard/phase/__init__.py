"""Phase diagrams: a grid of trainings, one for each pair of learning rates, as one vmapped program."""
