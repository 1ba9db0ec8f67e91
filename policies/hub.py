"""Policies in folders and repositories of the Hugging Face Hub, as users of diffusers know them from models."""

from abc import ABC, abstractmethod
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from .error import PolicyError

FILE = "policy.json"


class Hub(ABC):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for what has `save` and `load`; the file is `policy.json`.

    Not huggingface_hub's own mixin, which keeps a second file and sets attributes, as frozen data does not let it.
    """

    @classmethod
    @abstractmethod
    def load(cls, path: str | PathLike[str]) -> Self: ...

    @abstractmethod
    def save(self, path: str | PathLike[str]) -> None: ...

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Writes `policy.json` into a folder, made where it is missing. Raises OSError where nothing can be written."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save(Path(save_directory) / FILE)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Reads `policy.json` of a folder, or of a repository of the Hub at a branch, tag or commit.

        Raises PolicyError when it is nowhere to be had or is not a valid policy.
        """
        from huggingface_hub import hf_hub_download

        name = pretrained_model_name_or_path
        if Path(name).is_dir():
            return cls.load(Path(name) / (subfolder or "") / FILE)
        try:
            path = hf_hub_download(
                str(name), FILE, subfolder=subfolder, revision=revision, token=token,
                cache_dir=None if cache_dir is None else str(cache_dir),
                force_download=force_download, local_files_only=local_files_only,
            )  # fmt: skip
        except (OSError, ValueError) as error:  # what huggingface_hub raises, and no network
            told = " ".join(str(error).split())[:300]
            raise PolicyError(f"{name} is no folder, and its {FILE} cannot be had from the Hub: {told}") from None
        return cls.load(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        commit_message: str = "Upload policy",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Commits `policy.json` to a repository of the Hub, made where it is missing, and returns the commit's URL.

        Raises what huggingface_hub does: HfHubHTTPError for what the Hub refuses, HFValidationError for a bad name.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, path_in_repo=subfolder, commit_message=commit_message,
                revision=revision, create_pr=create_pr,
            ).commit_url  # fmt: skip
