"""One pool for the tests of this folder that compare with the real library: it takes a while to load."""

from collections.abc import Iterator

import pytest
from tempo_engine.verify.pool import Pool


@pytest.fixture(scope="session")
def shared_pool() -> Iterator[Pool]:
    """With patience: tests of what is right must not depend on how busy the machine is."""
    pool = Pool(1, seconds=20.0)
    yield pool
    pool.close()
