"""Critical rates and stability limits from numbers: eigenvalues, Ritz values, an optimizer's coefficients."""
