"""A finished folder to the Hub, by huggingface_hub, and only when it is asked for."""

from __future__ import annotations

from pathlib import Path

from moejax.errors import UserError, first_line


def check_name(name: str) -> None:
    """Raises UserError where `name` can be no repository's."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if name.count("/") != 1:
            raise HFValidationError(f"{name.count('/')} slashes")
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: no name of a repository ({first_line(error)}): expected OWNER/NAME") from None


def push(folder: Path, name: str, *, public: bool) -> str:
    """Upload the files of `folder` as one commit of the model `name`, made private unless public. Returns its address.

    A repository that is there already keeps its other files. Raises UserError, and the folder stays, where nobody is logged in, the Hub
    cannot be reached, the name may not be written to, or a repository that others see is not asked for.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    stays = f"{folder} is complete and stays. Upload it later by: hf upload {name} {folder}{'' if public else ' --private'}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set: unset it. {stays}")
    if get_token() is None:
        raise UserError(f"--push {name}: not logged in: run `hf auth login`, or set HF_TOKEN, with a token that may write. {stays}")
    api = HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.model_info(name).private:
            raise UserError(f"--push {name}: that repository is there and public: give --public to upload to it, or another name. {stays}")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by moejax export")
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        why = {401: "the token is not valid", 403: "the token may not write there", 404: "no such owner, or not seen by this token"}
        raise UserError(f"--push {name}: {why.get(status or 0, first_line(error))}. {stays}") from None
    except Exception as error:  # httpx's and the operating system's kinds of "no network"
        raise UserError(f"--push {name}: the Hub could not be reached ({type(error).__name__}: {first_line(error)}). {stays}") from error
    return str(address)
