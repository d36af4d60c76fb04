"""Cost tables and sizes in; the choice of least cost within a budget, with its certificate, out."""
