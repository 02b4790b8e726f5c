"""The configs of L2P, DualPrompt and CODA-Prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from graftune.adapters.base.registration import add_peft_type
from graftune.adapters.prompts.prefix.config import (
    PrefixConfig,
    check_blocks,
    check_count,
    check_length,
)

L2P = add_peft_type("L2P")
DUAL_PROMPT = add_peft_type("DUAL_PROMPT")
CODA_PROMPT = add_peft_type("CODA_PROMPT")


@dataclass
class PoolConfig(PrefixConfig):
    """The fields of configs whose prompts are chosen by the frozen model's features of an image.

    `graftune.wrap` finds the modules; with `peft.get_peft_model` name them here.

    Args:
        tower: name of the vision transformer, which the frozen features come from; "" if it is the
            model itself.
        entry: name of the module that images enter it by.
        query: name of the module whose output is features or tokens: usually the last norm.
        query_pool: of tokens "first" (the class token) or "mean".
    """

    tower: str | None = field(
        default=None, metadata={"help": "Name of the vision transformer; '' for the model itself."}
    )
    entry: str | None = field(
        default=None, metadata={"help": "Name of the module that images enter by."}
    )
    query: str | None = field(
        default=None, metadata={"help": "Name of the module whose output is features or tokens."}
    )
    query_pool: Literal["first", "mean"] = field(
        default="first", metadata={"help": "Which of the tokens: 'first' or their 'mean'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_pool not in ("first", "mean"):
            raise ValueError(f"`query_pool` is 'first' or 'mean', got {self.query_pool!r}")


@dataclass
class L2PConfig(PoolConfig):
    """Config of L2P: an image gets those prompts of a pool whose keys are nearest to its query.

    The chosen prompts join the tokens before the first block and leave behind the last one
    (Learning to Prompt for Continual Learning, arXiv 2112.08654, section 4). The order of tokens
    without positions does not matter to a transformer: they stand at the end, so that the class
    token keeps its place. Keys learn from `KeyMatching`.

    Args:
        pool_size: prompts in the pool, M.
        length: tokens of each, at least 1.
        chosen: prompts for each image, N ≤ M.
        blocks, attention, projections, tower, entry, query, query_pool: names of modules.
        init_weights: True draws from U(-1, 1); False from N(0, 1), for tests.
        modules_to_save: modules to train in full and to save with the adapter.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> L2PConfig(pool_size=20, length=5, chosen=4).pool_size
        20
    """

    about: ClassVar[str] = (
        "L2P gives each image the prompts of a pool whose keys are nearest to what the frozen "
        "vision transformer says of it ([Learning to Prompt](https://arxiv.org/abs/2112.08654))."
    )

    pool_size: int = field(default=10, metadata={"help": "Prompts in the pool."})
    length: int = field(default=5, metadata={"help": "Tokens of each prompt."})
    chosen: int = field(default=5, metadata={"help": "Prompts that an image gets."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = L2P
        for name in ("pool_size", "length", "chosen"):
            check_count(name, getattr(self, name))
        if self.chosen > self.pool_size:
            raise ValueError(
                f"chosen={self.chosen} prompts cannot be taken of a pool of {self.pool_size}"
            )

    @property
    def prompted(self) -> list[int]:
        """The first block, before which prompts join the tokens."""
        return [0]


@dataclass
class TaskPoolConfig(PoolConfig):
    """The fields of pools that are divided between tasks.

    Args:
        tasks: how many tasks the pool is made for.
        task: the number of the current task, from 0; `start_task` changes it, and it is saved.
    """

    tasks: int = field(default=10, metadata={"help": "Tasks that the pool is made for."})
    task: int = field(default=0, metadata={"help": "The current task, from 0; start_task sets it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("tasks", self.tasks)
        self.check_task(self.task)

    def check_task(self, task: Any) -> None:
        """Raise ValueError for a task that the pool was not made for."""
        check_count("task", task, least=0)
        if task >= self.tasks:
            raise ValueError(
                f"task {task} (the first is 0) is more than the pool was made for: it has "
                f"tasks={self.tasks}; make it for more with {type(self).__name__}(tasks=...)"
            )


@dataclass
class DualPromptConfig(TaskPoolConfig):
    """Config of DualPrompt: a prefix for all tasks, and one for each task, found by its key.

    General prompts, shared by all tasks, are prefixes of the first blocks; expert prompts, one a
    task, of some blocks behind. In training a task's own is used, in evaluation that of the tasks
    so far whose key is nearest to the image's query (arXiv 2204.04799, section 4; with keys for
    each block, as the comparisons of CODA-Prompt and OVOR train it). Keys learn from `KeyMatching`.

    Args:
        general_length: keys and values together of each general prompt; even, 0 for none.
        general_blocks: the blocks that have one.
        expert_length: the same of each expert prompt.
        expert_blocks: the blocks that have them; no general ones.
        tasks, task: as `TaskPoolConfig` says.
        blocks, attention, projections, tower, entry, query, query_pool: names of modules.
        init_weights: True draws from U(0, 1); False from N(0, 1), for tests.
        modules_to_save: modules to train in full and to save with the adapter.

    Raises:
        ValueError: a length is odd, a block has both prompts, or a field is out of range.

    Example:
        >>> DualPromptConfig(tasks=20).prompted
        [0, 1, 2, 3, 4]
    """

    about: ClassVar[str] = (
        "DualPrompt gives a vision transformer prefixes that all tasks share and one that belongs "
        "to the task an image seems to be of ([DualPrompt](https://arxiv.org/abs/2204.04799))."
    )

    general_length: int = field(default=10, metadata={"help": "Keys and values together; even."})
    general_blocks: list[int] = field(
        default_factory=lambda: [0, 1], metadata={"help": "Blocks with general prompts."}
    )
    expert_length: int = field(default=40, metadata={"help": "Keys and values together; even."})
    expert_blocks: list[int] = field(
        default_factory=lambda: [2, 3, 4], metadata={"help": "Blocks with expert prompts."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DUAL_PROMPT
        for name in ("general_length", "expert_length"):
            check_length(name, getattr(self, name))
        if not self.expert_length:
            raise ValueError("expert_length=0 leaves no expert prompts; OnePromptConfig has none")
        check_blocks("expert_blocks", self.expert_blocks)
        if self.general_length:
            both = [*self.general_blocks, *self.expert_blocks]
            check_blocks("general_blocks and expert_blocks", both)

    @property
    def prompted(self) -> list[int]:
        """The numbers of the blocks that have prompts."""
        return [*(self.general_blocks if self.general_length else []), *self.expert_blocks]


@dataclass
class CodaPromptConfig(TaskPoolConfig):
    """Config of CODA-Prompt: a prefix for each image, a weighted sum of components.

    p = Σ_m cos(q ⊙ A_m, K_m) P_m with components P, keys K and attention A in each block
    (arXiv 2211.13218, section 4). A task adds `pool_size / tasks` components and leaves those of
    earlier tasks as they are. They are kept orthogonal by `PromptOrthogonality`.

    Args:
        pool_size: components of all tasks together, a multiple of `tasks`.
        length: keys and values together of the prefix; even.
        prompt_blocks: the blocks that have one.
        tasks, task: as `TaskPoolConfig` says.
        blocks, attention, projections, tower, entry, query, query_pool: names of modules.
        init_weights: True starts orthonormal; False draws from N(0, 1), for tests.
        modules_to_save: modules to train in full and to save with the adapter.

    Raises:
        ValueError: the length is odd, or a field is out of range.

    Example:
        >>> CodaPromptConfig(pool_size=100, tasks=20).share
        5
    """

    about: ClassVar[str] = (
        "CODA-Prompt gives each image a prefix composed of weighted components, to which each task "
        "adds its own ([CODA-Prompt](https://arxiv.org/abs/2211.13218))."
    )

    pool_size: int = field(default=100, metadata={"help": "Components of all tasks together."})
    length: int = field(default=8, metadata={"help": "Keys and values together; even."})
    prompt_blocks: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Blocks with a prefix."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CODA_PROMPT
        check_length("length", self.length)
        check_count("pool_size", self.pool_size)
        check_blocks("prompt_blocks", self.prompt_blocks)
        if not self.length:
            raise ValueError("`length` must be at least 2, got 0")
        if self.pool_size % self.tasks:
            raise ValueError(
                f"pool_size={self.pool_size} components cannot be divided evenly between "
                f"tasks={self.tasks}; give a multiple"
            )

    @property
    def prompted(self) -> list[int]:
        """The numbers of the blocks that have prompts."""
        return list(self.prompt_blocks)

    @property
    def share(self) -> int:
        """Components of each task."""
        return self.pool_size // self.tasks
