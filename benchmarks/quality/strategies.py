"""Every strategy on real photographs with real weights: at its default, and after a short search.

For each data set, backbone and strategy, with two seeds: the default; some configurations of the
strategy's own parameters and the learning rate, of which the best by validation accuracy is
trained with the second seed as well; and `freeze` over the freeze depth. Test accuracy is measured
for every trial and chooses nothing. Seconds are of one core. Results are appended line by line,
so that the same command goes on where it was stopped.

    python benchmarks/quality/strategies.py --data DIR --weights DIR --results FILE.jsonl
    python benchmarks/quality/strategies.py --results FILE.jsonl --table docs/results
    python benchmarks/quality/strategies.py --data DIR --weights DIR --results OTHER.jsonl \
        --only flowers/mobilenetv2_100.in1k/full/ --images 10000 --image-size 224 --epochs 8 \
        --batch-size 32 --jobs 1 --threads 2 --stages default

The second writes the tables and the plot, the third trains one strategy on all images.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # trials side by side, one on each core

from lines import Row, measure_all, rows_of

if TYPE_CHECKING:
    from autoft.values import TrialConfig

DATASETS = ("hymenoptera", "sign-digits", "flowers")
BACKBONES = ("mobilenetv2_100.in1k", "squeezenet1_0.in1k")
STRATEGIES: dict[str, dict[str, Any]] = {  # more answers than the name
    "head_only": {},
    "freeze": {},
    "full": {},
    "full+l2sp": {"train.l2sp": 1e-2},
    "gradual": {},
    "probe_then_tune": {},
    "norm_bias": {"train.lr": 1e-3},
    "surgical": {},
    "rgn": {},
    "lora": {"train.lr": 1e-3},
    "scratch": {"train.lr": 2e-3},
}
STAGES = ("default", "depth", "search", "chosen")
SEEDS = (0, 1)
POINTS = 2  # of a strategy's own parameters, beside the default
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8)
EPOCHS = {"flowers": 6, "hymenoptera": 8, "sign-digits": 6}
BATCH = 16  # small parts of small data sets: steps are what is short
BF16 = ("squeezenet1_0.in1k",)  # faster so, by timing, where the published figures were made


def main() -> None:
    """Run what is missing, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds the data sets")
    parser.add_argument("--weights", type=Path, help="folder that holds the weights")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="write strategies.md and the plot here")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--images", type=int, default=500, help="to train on, at most")
    parser.add_argument("--stages", default=",".join(STAGES), help="only these, in this order")
    parser.add_argument("--only", default="", help="only the trials whose label holds this")
    parser.add_argument("--epochs", type=int, help="instead of those of the data set")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=int, default=1, help="of each job")
    parser.add_argument("--minutes", type=float, default=120.0)
    options = parser.parse_args()
    if options.table:
        from strategies_table import write

        write(rows_of(options.results), options.table, POINTS)
        return
    measure_all(
        options.stages.split(","),
        _specs,
        partial(_train, options),
        options.results,
        only=options.only,
        jobs=options.jobs,
        minutes=options.minutes,
    )


def _specs(stage: str, rows: list[Row]) -> Iterator[Row]:
    """Yield what a stage still has to train, seed by seed."""
    done = {row["label"] for row in rows}
    for seed in SEEDS:
        for dataset in DATASETS:
            for backbone in BACKBONES:
                for name, answers in _wanted(stage, dataset, backbone, seed, rows):
                    label = f"{dataset}/{backbone}/{name}/{seed}"
                    if label not in done:
                        yield {
                            "label": label,
                            "stage": stage,
                            "dataset": dataset,
                            "backbone": backbone,
                            "strategy": name.partition("@")[0],
                            "answers": answers,
                            "seed": seed,
                        }


def _wanted(
    stage: str, dataset: str, backbone: str, seed: int, rows: list[Row]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if stage == "default":
        yield from STRATEGIES.items()
    elif stage == "depth" and seed == 0:
        for depth in DEPTHS:
            answers = {"strategy.depth": depth} if depth else {}
            yield f"{'freeze' if depth else 'full'}@depth{depth}", answers
    elif stage == "search" and seed == 0:
        for strategy, given in STRATEGIES.items():
            for index, answers in enumerate(_points(strategy) if strategy != "scratch" else ()):
                yield f"{strategy}@{index}", given | answers
    elif stage == "chosen" and seed == 1:
        mine = [r for r in rows if r["dataset"] == dataset and r["backbone"] == backbone]
        yield from _chosen([r for r in mine if r["seed"] == 0 and "test" in r])


def _chosen(rows: list[Row]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what was best of each strategy by validation, where that is not the default."""
    for strategy in STRATEGIES:
        mine = [r for r in rows if r["strategy"] == strategy and r["stage"] != "depth"]
        best = max(mine, key=lambda row: (row["validation"], -row["loss"]), default=None)
        if best and best["stage"] == "search":
            yield best["label"].split("/")[2], best["answers"]


def _points(strategy: str) -> Iterator[dict[str, Any]]:
    """Yield configurations spread over the strategy's own parameters and the learning rate."""
    import optuna

    from autoft import plugins
    from autoft.space import Choice, Int, read_signature, searched
    from autoft.training import recipe

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    own = searched(read_signature(plugins.load("strategy", strategy.partition("+")[0])))
    ranges = {f"strategy.{name}": range_ for name, range_ in own.items()}
    how = recipe.probing if strategy == "head_only" else recipe.tuning
    rates = ("head_lr", "weight_decay") if strategy == "head_only" else ("lr",)
    trained = searched(read_signature(how))
    ranges |= {f"train.{name}": trained[name] for name in rates}
    ranges |= {"train.l2sp": trained["l2sp"]} if strategy.endswith("+l2sp") else {}
    study = optuna.create_study(sampler=optuna.samplers.QMCSampler(scramble=True, seed=0))
    for _ in range(POINTS + 1):
        trial = study.ask()
        answers: dict[str, Any] = {}
        for name, range_ in ranges.items():
            if isinstance(range_, Choice):
                answers[name] = trial.suggest_categorical(name, range_.options)
            elif isinstance(range_, Int):
                answers[name] = trial.suggest_int(name, range_.low, range_.high, log=range_.log)
            else:
                answers[name] = trial.suggest_float(name, range_.low, range_.high, log=range_.log)
        if trial.number:  # the first of the sequence is drawn before its space is known
            yield answers
        study.tell(trial, 0.0)


def _train(options: argparse.Namespace, spec: Row) -> Row:
    import torch
    from one_trial import open_data, some, train_and_score

    from autoft.network.sources import in_folder
    from autoft.training.job import Precision

    torch.set_num_threads(options.threads)
    sources = {spec["backbone"]: in_folder(options.weights)[0][spec["backbone"]]}
    with tempfile.TemporaryDirectory() as folder:
        dataset = str(options.data / spec["dataset"])
        setup, data = open_data(
            dataset, options.image_size, sources, Path(folder), options.threads
        )
        setup = replace(
            setup,
            train=some(setup.train, options.images),
            validation=some(setup.validation, max(250, options.images // 10)),
        )
        precision = Precision(bf16=spec["backbone"] in BF16, channels_last=True)
        epochs = options.epochs or EPOCHS[spec["dataset"]]
        epochs = 4 if spec["strategy"] == "head_only" else epochs
        test = data.part(data.split.test)
        return train_and_score(setup, _config(options, spec), epochs, precision, test)


def _config(options: argparse.Namespace, spec: Row) -> TrialConfig:
    from autoft.values import Part, TrialConfig

    answers: dict[str, Any] = spec["answers"]
    chosen = {n.partition(".")[2]: v for n, v in answers.items() if n.startswith("strategy.")}
    how = {n.partition(".")[2]: v for n, v in answers.items() if n.startswith("train.")}
    if spec["strategy"] != "head_only":
        upright = spec["dataset"] == "sign-digits"  # a mirrored hand may be another sign
        how |= {
            "augment": "crop" if upright else "crop_flip",
            "batch_size": options.batch_size,
        }
    strategy = Part(spec["strategy"].partition("+")[0], chosen)
    return TrialConfig(Part(spec["backbone"]), strategy, Part("linear"), how, seed=spec["seed"])


if __name__ == "__main__":
    main()
