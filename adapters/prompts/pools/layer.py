"""What the layers of pools share: the query, and how well their keys matched it."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from graftune.adapters.base.hooks import HookedLayer
from graftune.adapters.prompts.pools.query import Passing, Query


class PoolLayer(HookedLayer):
    """Base of layers that choose prompts by the frozen model's features of the images.

    Regularizers read `matching` and `orthogonality` after the adapted model has run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, int] = {}  # the number of the current task, by adapter
        self._prompt, self._matching = Passing(), Passing()

    def ask(self, query: Query) -> None:
        """Be told of queries from now on."""
        self.__dict__["query"] = query
        query.add(self)

    def unhook(self) -> None:
        """Take the hooks off, the query's too."""
        super().unhook()
        self.__dict__["query"].unhook()

    @abstractmethod
    def answer(self, queries: Tensor) -> None:
        """Choose prompts for the images that are about to come, by their queries, (B, W)."""

    def prompt(self) -> Tensor:
        """Return what `answer` has chosen, (B, n, D) or (n, D).

        Raises:
            RuntimeError: images came by another way than the one that the query listens at.
        """
        if self._prompt.tensor is None:
            raise RuntimeError(
                "no query came before the blocks ran: images must enter the model by the module "
                "that `entry` names in the config"
            )
        return self._prompt.tensor

    def keep(self, prompt: Tensor, distance: Tensor | None = None) -> None:
        """Keep what was chosen, and the distance of each query to the keys that it is to match."""
        self._prompt.tensor, self._matching.tensor = prompt, distance

    @property
    def matching(self) -> Tensor | None:
        """1 − cos of each image's query and its keys, (B,); None where keys need not match."""
        return self._matching.tensor

    def orthogonality(self) -> Tensor | None:
        """How far the components are from orthogonal; None where they need not be."""
        return None


def with_keys(prompt: Tensor, *others: Tensor) -> Tensor:
    """Return a prompt that depends on further parameters, with gradients of zero.

    Keys learn from a loss term alone. Where that is left out, DistributedDataParallel still has to
    see that they take part.
    """
    return prompt + 0 * sum(other.sum() for other in others)
