"""Numbers that cannot be are refused by the option that takes them, before anything is read."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("tool", "words", "message"),
    [
        ("ablate", "GRID --out o --seeds 0", "--seeds: 0: give 1 or more"),
        ("ablate", "GRID --out o --parallel 0", "--parallel: 0: give 1 or more"),
        ("ablate", "GRID --out o --max-failures -1", "--max-failures: -1: give 0 or more"),
        ("ablate", "GRID --out o --gpus-per-run -1", "--gpus-per-run: -1: give 0 or more"),
        ("ablate", "GRID --out o --cpus-per-run 0", "--cpus-per-run: 0: give 1 or more"),
        ("ablate", "GRID --out o --time-minutes 0", "--time-minutes: 0: give 1 or more"),
        ("adversarial_neighbours", "W shards --steps 0", "--steps: 0: give 1 or more"),
        ("embed", "W pictures --out f.npz --batch 0", "--batch: 0: give 1 or more"),
        ("embed", "W pictures --out f.npz --seed -1", "--seed: -1: give 0 or more"),
        ("embed", "W pictures --out f.npz --max-bad -1", "--max-bad: -1: give 0 or more"),
        ("embed", "W pictures --out f.npz --threads 0", "--threads: 0: give 1 or more"),
        ("make_dataset", "import o s --num-workers 0", "--num-workers: 0: give 1 or more"),
        ("make_shards", "pictures out --num-workers -1", "--num-workers: -1: give 0 or more"),
        ("make_shards", "pictures out --max-bad -1", "--max-bad: -1: give 0 or more"),
        ("predict", "W pictures --out o --every 0", "--every: 0: give 1 or more"),
        ("predict", "W pictures --out o --batch 0", "--batch: 0: give 1 or more"),
        ("predict", "W pictures --out o --threads 0", "--threads: 0: give 1 or more"),
        ("predict", "W pictures --out o --max-bad -1", "--max-bad: -1: give 0 or more"),
        ("run_trials", "--init random --seeds 0", "--seeds: 0: give 1 or more"),
        ("submit_pretrain", "CONFIG --nodes 0", "--nodes: 0: give 1 or more"),
        ("train_voc", "random --threads 0", "--threads: 0: give 1 or more"),
    ],
)
def test_impossible_numbers_are_refused(tool, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{tool}").main(words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
