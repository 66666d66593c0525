"""Meta-learning (FOMAML, Reptile) over subnetworks: the loop of an episode, and which sentences it sees.

`fast_weights` changes what a language owns of a model (`fastmask.live`) and puts it back, `inner_rates` says how fast,
`learner` runs episodes, `episodes` draws support and query sentences.
"""

from fastmask.meta.episodes import Draw, EpisodeSampler
from fastmask.meta.learner import Adapted, MetaLearner, Task, TaskResult

__all__ = ["Adapted", "Draw", "EpisodeSampler", "MetaLearner", "Task", "TaskResult"]
