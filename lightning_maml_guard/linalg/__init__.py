"""Matrix-vector products in, spectra out."""
