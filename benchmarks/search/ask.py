"""How long an ask and a tell take when a study has many trials.

python benchmarks/search/ask.py [--trials 1000] [--layers 24]
"""

import argparse
import random
import statistics
import time

import optuna
from landscapes import synthetic
from optuna.trial import create_trial
from rich.console import Console

from prunesearch.search.layer_sets import LayerSetSampler


def main(trials: int, layers: int, asks: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    landscape = synthetic(0, layers, layers // 2, (0, 4, 8, 16), noise=0.05)
    space, params_of, wer_of = landscape.space, landscape.params, landscape.trained
    study = optuna.create_study(directions=["minimize"] * 2, sampler=LayerSetSampler(space, params_of, scan=landscape.screened))
    draw, kinds = random.Random(0), space.distributions
    while len(study.get_trials(deepcopy=False)) < trials:
        candidate = space.draw(draw)
        values, attrs = [wer_of(candidate), params_of(candidate)], {"candidate": candidate.key}
        study.add_trial(create_trial(values=values, params=space.params(candidate), distributions=kinds, user_attrs=attrs))
    seconds = []
    for _ in range(asks):
        begin = time.perf_counter()
        trial = study.ask()
        candidate = space.candidate({n: trial._suggest(n, d) for n, d in space.distributions.items()})
        study.tell(trial, [wer_of(candidate), params_of(candidate)])
        seconds.append(time.perf_counter() - begin)
    first, *others = seconds
    usual = f"{1000 * statistics.median(others):.0f} ms an ask and tell (median of {len(others)})"
    Console().print(f"{trials} trials, {layers} layers: {usual}, {1000 * first:.0f} ms for the first, which fits the model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--asks", type=int, default=11)
    main(**vars(parser.parse_args()))
