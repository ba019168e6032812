from pathlib import Path

import pytest
from tempo_em.loading import load_recipe
from tempo_em.run_folder import Lock, check_start
from tempo_engine.errors import UserError


def test_a_folder_that_another_run_holds_is_refused_until_it_ends(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "run"), Lock(tmp_path / "run")
    first.take()
    with pytest.raises(UserError, match=r"another process \(pid \d+ on .+\) is running in"):
        second.take()
    first.release()
    second.take()


def test_a_setting_that_is_newer_than_a_run_had_its_default_there(tmp_path: Path) -> None:
    resolved = load_recipe("tiny", [])
    lines = resolved.to_yaml().splitlines()
    (tmp_path / "recipe.yaml").write_text("\n".join(line for line in lines if not line.startswith("  stop:")))
    check_start(resolved.recipe, tmp_path)
    with pytest.raises(UserError, match=r"was started with rollout\.stop = \[\], the recipe now says \['7'\]"):
        check_start(load_recipe("tiny", ["rollout.stop=['7']"]).recipe, tmp_path)


def test_a_run_with_a_setting_that_is_no_more_names_it(tmp_path: Path) -> None:
    resolved = load_recipe("tiny", [])
    (tmp_path / "recipe.yaml").write_text(resolved.to_yaml().replace("rollout:\n", "rollout:\n  beams: 4\n"))
    with pytest.raises(UserError, match=r"was started with rollout\.beams = 4, the recipe now says None"):
        check_start(resolved.recipe, tmp_path)
