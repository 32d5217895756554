"""Search with Optuna: each setting is chosen by the results of the earlier ones."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from clipfusionvad.io.errors import UserError
from clipfusionvad.io.files import read_json, write_json
from clipfusionvad.tools.sweep.plan import Cell, Search


class SearchState:
    """The chosen settings of a search and their results, stored in a JSON file.

    The state is in that file, not in Optuna: a search that is interrupted and continued chooses the same settings. The
    setting's number seeds the sampler.
    """

    def __init__(self, search: Search, path: Path, seed: int, fresh: bool = False):
        self.search, self.path, self.seed = search, path, seed
        self.optuna = _import_optuna()
        self.space = {name: self._distribution(name, values) for name, values in search.space.items()}
        self.chosen: list[dict[str, Any]] = []
        self.values: dict[int, float | None] = {}
        if path.is_file() and not fresh:
            self._read()

    def ask(self) -> None:
        """Choose the next setting."""
        sampler = self.optuna.samplers.TPESampler(seed=self.seed + len(self.chosen))
        study = self.optuna.create_study(direction="maximize", sampler=sampler)
        for number, value in sorted(self.values.items()):
            state = self.optuna.trial.TrialState.FAIL if value is None else self.optuna.trial.TrialState.COMPLETE
            study.add_trial(
                self.optuna.trial.create_trial(
                    params=self.chosen[number], distributions=self.space, value=value, state=state
                )
            )
        self.chosen.append(study.ask(self.space).params)
        self._write()

    def tell(self, number: int, value: float | None) -> None:
        """Record the result of setting ``number``; None where it failed."""
        self.values[number] = value
        self._write()

    @property
    def is_complete(self) -> bool:
        return len(self.chosen) >= self.search.trials

    def cell(self, number: int) -> Cell:
        options = dict(self.search.options) | self.chosen[number]
        return Cell(f"{self.search.name}-{number:03d}", options, self.search.source)

    def _write(self) -> None:
        trials = [
            {"options": options, "value": self.values.get(number), "told": number in self.values}
            for number, options in enumerate(self.chosen)
        ]
        write_json(self.path, {"space": dict(self.search.space), "seed": self.seed, "trials": trials})

    def _read(self) -> None:
        content = read_json(self.path, "search")
        if content.get("space") != dict(self.search.space) or content.get("seed") != self.seed:
            raise UserError(f"{self.path} is a search of another space or seed: name another --output-dir")
        try:
            self.chosen = [dict(trial["options"]) for trial in content["trials"]]
            self.values = {i: trial["value"] for i, trial in enumerate(content["trials"]) if trial["told"]}
        except (KeyError, TypeError) as error:
            raise UserError(f"search {self.path} is damaged: name another --output-dir") from error
        if any(options.keys() != self.space.keys() for options in self.chosen):
            raise UserError(f"search {self.path} is damaged: name another --output-dir")

    def _distribution(self, name: str, values: Any) -> Any:
        kinds = self.optuna.distributions
        if isinstance(values, list):
            if not all(isinstance(value, bool | int | float | str) for value in values):
                raise UserError(f"sweep {self.search.source}: search: {name} may choose among plain values only")
            return kinds.CategoricalDistribution(values)
        return self._range(values)

    def _range(self, values: Mapping[str, Any]) -> Any:
        low, high, log, step = values["low"], values["high"], bool(values.get("log", False)), values.get("step")
        if isinstance(low, int) and isinstance(high, int):
            return self.optuna.distributions.IntDistribution(low, high, log=log, step=step or 1)
        return self.optuna.distributions.FloatDistribution(float(low), float(high), log=log, step=step)


def _import_optuna() -> ModuleType:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError("a search needs Optuna, which is not installed: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
