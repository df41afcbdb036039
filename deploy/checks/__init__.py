"""What proves that a graph is its model: judges, comparisons, reports."""
