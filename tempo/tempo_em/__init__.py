"""TEMPO (arXiv 2604.19295): the EM schedule, its posteriors, recipes and the command line, on top of tempo_engine."""

__version__ = "0.1.0"
