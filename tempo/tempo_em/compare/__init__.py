"""Methods against each other: one start, equal work, several bases and seeds; a table with intervals and the curves."""
