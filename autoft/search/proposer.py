"""What is tried next: the portfolio, then what the study proposes.

The director says which number comes next, and tells of what has begun; `policy.py` has what is
decided by.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from autoft.search import policy
from autoft.search.budget import LEAST_EPOCHS, Budget
from autoft.search.configs import Space, wants_stages
from autoft.search.study import Study
from autoft.values import TrialConfig, TrialResult, Value


@dataclass
class Proposer:
    """Proposes configurations, from the results so far.

    `results` grow as the director learns them, `first` is what is left of the portfolio, `number`
    that of the next trial.
    """

    space: Space
    study: Study
    budget: Budget
    seed: int
    results: list[TrialResult]
    first: deque[Mapping[str, Value]] = field(default_factory=deque)
    number: int = 0
    _tried: set[str] = field(default_factory=set)

    def note(self, config: TrialConfig) -> None:
        """Learn that a configuration is tried: the portfolio does not repeat it."""
        self._tried.add(_key(config))

    def forget(self, count: int) -> None:
        """Have the study forget the next `count` proposals, which were not used."""
        for place in range(count):
            self.study.forget(self.number + place)

    def candidates(self, room: int, running: int) -> Iterator[list[TrialConfig]]:
        """Yield what may come next: the portfolio, then the phases that promise most.

        There is room for so many trials beside those `running`. Heads of the portfolio that train
        together take as many with them as take seconds, too.
        """
        while self.first:
            configs = self._from_portfolio(room if self.results or running else 1)
            if len(configs) > 1:
                more = min(room, self._pack_size()) - len(configs)
                backbone = configs[0].backbone.name
                configs += self._heads(backbone, more, self.number + len(configs))
            if configs:
                yield configs
        for phase in policy.order(self.results, self.space, self._expected_seconds):
            if phase == "heads":
                best = policy.best_by(self._of(phase), lambda config: config.backbone.name)
                known = [name for name in self.space.backbones if name in best]
                number, count = self.number, min(room, self._pack_size())
                names = known or self.space.backbones[:1]
                backbone = policy.draw(names, best, self._trial_seed(number))
                yield self._heads(backbone, count, number)
            else:
                yield [self._propose(phase, self.number, {})]

    def _from_portfolio(self, room: int) -> list[TrialConfig]:
        """Take the next from the portfolio: a trial, or heads in a row on one backbone.

        The first trial of all is alone, so that there soon is a model.
        """
        taken: list[TrialConfig] = []
        most = min(room, policy.PACK_MOST)
        self._affordable_first()
        while self.first and len(taken) < most:
            config = self._configured(self.first[0])
            pairs = taken and self.space.trains_backbone(config)
            if pairs or (taken and config.backbone.name != taken[0].backbone.name):
                break
            self.first.popleft()
            if _key(config) in self._tried:
                continue
            taken.append(config)
            if self.space.trains_backbone(config):
                break
        return taken

    def _affordable_first(self) -> None:
        """Bring forward what gets a few epochs where the next in turn does not.

        Where there is much time, all do: the order stays.
        """
        for place, answers in enumerate(self.first):
            config = self._configured(answers)
            trains = self.space.trains_backbone(config)
            if self.budget.epochs(config, trains) >= (LEAST_EPOCHS if trains else 1):
                del self.first[place]
                self.first.appendleft(answers)
                return

    def _heads(self, backbone: str, count: int, number: int) -> list[TrialConfig]:
        """Propose `count` heads on one backbone, as the trials from `number` on."""
        fixed: dict[str, Value] = {"backbone": backbone}
        return [
            self._propose("heads", number + place, fixed, at_random=place >= policy.PACK_MODELLED)
            for place in range(count)
        ]

    def in_step(self, first: TrialConfig, epochs: int, room: int) -> list[TrialConfig]:
        """Propose trials that take their steps together with the next, where that saves time.

        They freeze the same stages and are given the same batches; all else is their own. There
        is room for so many trials with the first.
        """
        alone = self.first or policy.phase_of(first.strategy.name, self.space) != "tails"
        if alone or wants_stages(self.space.heads[first.head.name]):
            return []
        count = min(room, self.budget.together(first, epochs))
        places = range(self.number + 1, self.number + count)
        fixed = policy.in_common(first)
        return [self.study.propose(place, first.seed, fixed) for place in places]

    def _propose(
        self,
        phase: policy.Phase,
        number: int,
        fixed: Mapping[str, Value],
        *,
        at_random: bool = False,
    ) -> TrialConfig:
        """Ask the study for a trial of a phase, with one of its strategies."""
        best = policy.best_by(self._of(phase), lambda config: config.strategy.name)
        names, seed = policy.strategies_of(phase, self.space), self._trial_seed(number)
        chosen = {**fixed, "strategy": policy.draw(names, best, seed)}
        config = self.study.propose(number, seed, chosen, at_random=at_random)
        return self._seeded(config, number)

    def _of(self, phase: policy.Phase) -> list[TrialResult]:
        return policy.of_phase(self.results, phase, self.space)

    def _pack_size(self) -> int:
        return policy.pack_size(self._of("heads"), self.budget.left())

    def _expected_seconds(self, phase: policy.Phase) -> float:
        """Return what a trial of a phase that has none yet will take, by the measured speeds."""
        strategy = policy.strategies_of(phase, self.space)[0]
        config = self._configured({"strategy": strategy})
        trains = self.space.trains_backbone(config)
        return self.budget.expected(config, self.budget.epochs(config, trains) or 1, trains)

    def _configured(self, answers: Mapping[str, Value]) -> TrialConfig:
        return self._seeded(self.space.default(answers, 0), self.number)

    def _seeded(self, config: TrialConfig, number: int) -> TrialConfig:
        """Give a trial its seed; heads have one in common: they see the same minibatches."""
        own = number if self.space.trains_backbone(config) else 0
        return replace(config, seed=self._trial_seed(own))

    def _trial_seed(self, number: int) -> int:
        return self.seed * 100_003 + number


def _key(config: TrialConfig) -> str:
    return repr(sorted(config.answers().items(), key=lambda pair: pair[0]))
