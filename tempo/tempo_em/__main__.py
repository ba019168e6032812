"""`python -m tempo_em` is `tempo-engine`."""

from tempo_em.cli import main

if __name__ == "__main__":
    main()
