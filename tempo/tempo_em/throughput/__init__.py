"""`tempo-engine bench throughput`: whole RL steps of the engine and of other stacks on equal work."""
