"""Transfer sets, views, and the join by sample id."""
