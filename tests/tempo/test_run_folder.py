from pathlib import Path

import pytest
from tempo_em.run_folder import Lock
from tempo_engine.errors import UserError


def test_a_folder_that_another_run_holds_is_refused_until_it_ends(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "run"), Lock(tmp_path / "run")
    first.take()
    with pytest.raises(UserError, match=r"another process \(pid \d+ on .+\) is running in"):
        second.take()
    first.release()
    second.take()
