"""The fit of adapters at the start of a Trainer's run."""

import logging

from torch import nn
from transformers import Trainer

from ..evaluation import preserved_random_state
from ..model import EASModel
from ..recovery.fit import begins_anew, fit_by_passes
from .rewards import RewardSet

logger = logging.getLogger(__name__)


def fit_in_trainer(trainer: Trainer, model: nn.Module, eas: EASModel, num_tokens: int, seed: int) -> None:
    """Fits the adapters of `eas` to training batches, as `fit_adapters`; where that cannot be done, warns of it.

    Adapters that are trained already stay as they are.
    """
    if trainer.train_dataset is None or hasattr(trainer, "num_generations"):
        logger.info("EAS: %s makes its training batches itself, so no adapter is fitted.", type(trainer).__name__)
        return
    try:
        if not begins_anew(eas):
            logger.info("EAS: the adapters are no longer as they begin, so they are not fitted.")
            return
        with preserved_random_state(seed):
            batches = RewardSet(trainer, trainer.train_dataset, "training set", seed)
            numbers = range(batches.num_batches)
            errors = fit_by_passes(model, eas, numbers, batches.loss, num_tokens, not trainer.args.disable_tqdm)
    except Exception as error:  # whatever it is, a start that is not the best is no reason not to train
        logger.warning(
            "EAS: the adapters begin as the identity, because they cannot be fitted to training batches (%s: %s). "
            "EASCallback(fit_tokens=0) leaves the fit out.",
            type(error).__name__,
            error,
        )
        return
    logger.info("EAS: fitted the adapters of %d attentions.", len(errors))
