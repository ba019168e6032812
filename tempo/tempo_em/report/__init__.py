"""`tempo-engine report`: run folders as one HTML page that needs nothing else."""
