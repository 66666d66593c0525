"""What a run spends: gradients on plain batches, episodes, and how many sentences both see.

A *step* is a gradient over `batch_size` sentences. An episode counts as many steps as its sentences make, so runs of
the same `steps` see the same number of sentences with and without meta-learning, up to what is less than an episode,
and their learning rate, scores and checkpoints follow the same axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmask.training.config import ConfigError, TrainConfig

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """How the steps of a run are spent.

    Attributes:
        steps: of the run, in all.
        plain_steps: of them, optimiser steps on one mixed batch each.
        episodes: optimiser steps on the meta-gradient of one episode each; 0 without meta-learning.
        episode_sentences: that one episode sees, a sentence as often as it is in a batch: each language's support
            batch counts once for each of the K inner steps.
        gradient_passes: forward and backward passes over a batch (of all processes together: a batch that is split
            counts once): one for a plain step; K, and for FOMAML one more, for each language of an episode. What
            looking for better masks takes (method `dynamic`) is not in it.
        sentences: seen in all.
    """

    steps: int
    plain_steps: int
    episodes: int
    episode_sentences: int
    gradient_passes: int
    sentences: int

    @classmethod
    def of(cls, config: TrainConfig, n_languages: int) -> Budget:
        """The budget of a run with `n_languages` training languages.

        Raises:
            ConfigError: the steps after the switch hold less than one episode, or there are fewer languages than a
                meta-batch takes.
        """
        if config.meta == "none":
            return cls(config.steps, config.steps, 0, 0, config.steps, config.steps * config.batch_size)
        members = n_languages if config.meta_batch is None else config.meta_batch
        if members > n_languages:
            raise ConfigError(f"meta_batch is {members} (expected at most the number of languages, {n_languages})")
        query = config.query_sentences if config.meta == "fomaml" else 0
        sentences = members * (config.inner_steps * config.support_sentences + query)
        plain = config.shared_steps
        episodes = (config.steps - plain) * config.batch_size // sentences
        if episodes < 1:
            raise ConfigError(
                f"an episode sees {sentences} sentences ({members} languages, {config.inner_steps} inner steps on "
                f"{config.support_sentences} sentences, {query} query sentences), and the {config.steps - plain} steps "
                f"after the switch have only {(config.steps - plain) * config.batch_size}: expected more steps, or "
                "fewer of inner_steps, support_sentences, query_sentences or meta_batch"
            )
        passes = members * (config.inner_steps + (query > 0))
        return cls(
            steps=config.steps,
            plain_steps=plain,
            episodes=episodes,
            episode_sentences=sentences,
            gradient_passes=plain + episodes * passes,
            sentences=plain * config.batch_size + episodes * sentences,
        )

    def step_after(self, episode: int) -> int:
        """The run's step after episode number `episode` (from 1): its share of the steps, rounded.

        The last step is reached with the last episode and not before, also where an episode is less than a step.
        """
        if episode == self.episodes:
            return self.steps
        share = (self.steps - self.plain_steps) * episode / self.episodes
        return min(self.plain_steps + round(share), self.steps - 1)

    def passes_after(self, episode: int) -> int:
        """`gradient_passes` after `episode` episodes."""
        of_episodes = self.gradient_passes - self.plain_steps
        return self.plain_steps + of_episodes * episode // max(self.episodes, 1)
