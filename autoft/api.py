"""The Python door: search for a model, open a run, predict with what was found."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoft.errors import DataError, UsageError
from autoft.search.events import Event, Listener
from autoft.search.folder import RunFolder, open_run
from autoft.search.settings import read_settings

if TYPE_CHECKING:
    from autoft.export.runtime import Prediction
    from autoft.values import Estimate

RESULT = "result.json"


@dataclass(frozen=True)
class Artifact:
    """What a finished search found.

    `path` is the folder of the exported model, `score` its validation score, `test` its score on
    the locked test part (None where there is none) and `winner` its configuration: trial,
    backbone, strategy, head, params.
    """

    path: Path
    score: float
    test: Estimate | None
    winner: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One search and its folder, which is read anew at every question."""

    path: Path

    @property
    def result(self) -> dict[str, Any]:
        """Return the contents of `result.json`.

        Raises:
            UsageError: the search has not finished.
        """
        result = RunFolder(self.path).read_json(RESULT)
        if result is None:
            raise UsageError(
                f"The search in {self.path} has not finished: there is no {RESULT}. "
                f"`autoft resume {self.path}` finishes it."
            )
        return result

    @property
    def best(self) -> Artifact:
        """Return the exported winner.

        Raises:
            UsageError: the search has not finished.
        """
        from autoft.values import Estimate

        result = self.result
        test = Estimate(**result["test"]) if result["test"] else None
        return Artifact(RunFolder(self.path).best, result["score"], test, result["winner"])

    def leaderboard(self) -> list[dict[str, Any]]:
        """Return one row per finished trial, best first; works while the search is running.

        The columns are rank, trial, score, folds and mean (of finalists), loss, status, epochs,
        seconds, backbone, strategy, head and one for each further choice, such as
        `head.mlp.hidden`, that the trial faced.
        """
        from autoft.selection.leaderboard import leaderboard

        return leaderboard(RunFolder(self.path).trials())

    def predict(self, paths: str | Path | Iterable[str | Path]) -> list[Prediction]:
        """Return one prediction per image, in order; folders are searched for images.

        An image that cannot be read has its `error` set and does not stop the others.

        Raises:
            UsageError: the run has no exported model.
            DataError: there is no image at `paths`, or the model is damaged.
        """
        from autoft.export import runtime

        given = [paths] if isinstance(paths, str | Path) else list(paths)
        return list(runtime.load(self.path).predict(find_images(given)))


def search(
    dataset: str | os.PathLike[str], *, listen: Listener | None = None, **settings: Any
) -> Run:
    """Search for the best fine-tuned model of `dataset` and return the run.

    `settings` are the flags of `autoft search` by name (`time="15m"`, `image_size=224`). The same
    call again resumes a run that was stopped. `listen` is told every event as it happens.

    Raises:
        AutoftError: one of its kinds, each with a sentence that says what to do.
    """
    _refuse_in_importing_worker()
    paths = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in settings.items()}
    config = paths.pop("config", None)
    flags = {"dataset": os.fspath(dataset), **paths}
    checked = read_settings(flags, Path(config) if config else None)
    from autoft.search.run import run_search

    return Run(run_search(checked, listen or _ignore))


def load(path: str | os.PathLike[str]) -> Run:
    """Open the run folder at `path`, finished or not.

    Raises:
        UsageError: there is no run at `path`.
    """
    return Run(open_run(Path(path)).path)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files in `paths`, with folders replaced by the images in them, recursively.

    Raises:
        DataError: nothing is left.
    """
    from autoft.data.pixels.decode import IMAGE_SUFFIXES

    files, given = list[Path](), [Path(path) for path in paths]
    for path in given:
        inside = path.rglob("*") if path.is_dir() else ()
        files += sorted(file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES)
        files += [] if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"There is no image in {', '.join(map(str, given)) or 'an empty list of paths'}. "
            f"Looked for {', '.join(sorted(IMAGE_SUFFIXES))}; name the files themselves if they "
            "have other endings."
        )
    return files


def _ignore(event: Event) -> None:
    """Listen to nothing: a library does not write to the terminal."""


def _refuse_in_importing_worker() -> None:
    """Refuse to start a search while a new worker process imports the user's script.

    Worker processes import the script that started them under the name `__mp_main__`. A call at
    its top level would start a search inside each worker, and so on.
    """
    frame = inspect.currentframe()
    while frame is not None:
        module_level = frame.f_code.co_name == "<module>"
        if module_level and frame.f_globals.get("__name__") == "__mp_main__":
            raise UsageError(
                "autoft.search(...) was reached while a worker process imported your script "
                f"{frame.f_code.co_filename}. Put the call under "
                '`if __name__ == "__main__":` and run the script again.'
            )
        frame = frame.f_back
