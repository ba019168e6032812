"""Exports to the Hugging Face Hub, through huggingface_hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tempo_engine.errors import UserError, first_sentence


def connect(repository: str) -> HfApi:
    """The Hub, for somebody who may write there. Asked before an export is made, which can take long.

    Raises UserError when `repository` is no USER/NAME, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {first_sentence(error)}") from error
    if repository.count("/") != 1:
        raise UserError(f"--push {repository}: whose? Say USER/NAME")
    if constants.is_offline_mode():
        raise UserError("--push needs the Hub, but HF_HUB_OFFLINE is set; unset it, or export without --push")
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # of its HTTP library, which has changed between releases
        raise UserError(f"the Hub does not know you: {first_sentence(error)}; run `hf auth login` first") from error
    return api


def push(api: Any, repository: str, folder: Path, *, private: bool) -> str:
    """Upload the folder as a model repository, made if need be; returns its address.

    Raises UserError when the Hub refuses, or has the repository as a public one that shall be private.
    """
    try:
        address = api.create_repo(repository, private=private, repo_type="model", exist_ok=True)
        is_private = api.repo_info(repository, repo_type="model").private
        if private and not is_private:  # so it was before, and creating it again changed nothing
            raise UserError(f"{repository} exists already and is public; choose another name, or leave --private out")
        message = "Policy and critic by tempo-engine export"
        api.upload_folder(repo_id=repository, folder_path=folder, repo_type="model", commit_message=message)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(
            f"the Hub did not take {repository}: {first_sentence(error)}; the export is whole, try again by "
            f"`hf upload {repository} {folder}`"
        ) from error
    return str(address)
