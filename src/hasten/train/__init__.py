"""From data to weights: training, further training, and exact resumption. Called by the command line and by scripts."""
