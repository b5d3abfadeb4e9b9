"""Train many heads on the same minibatches at once, each as if it were alone.

Read `train_pack` first (`train.py`). `forms.py` tells which heads can be stacked, `stacks.py`
holds what is stacked, `inputs.py` what a step gives to all of them, `criteria.py` the losses and
their gradients, `size.py` how many heads are best taken together.
"""

from autoft.training.packs.size import best_pack_size
from autoft.training.packs.train import AfterPackRound, PackOutcome, Round, train_pack

__all__ = ["AfterPackRound", "PackOutcome", "Round", "best_pack_size", "train_pack"]
