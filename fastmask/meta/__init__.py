"""Meta-learning (FOMAML, Reptile) over subnetworks.

`fast_weights` changes what a language owns of a model (`fastmask.live`), how fast it is told to, and puts it back;
`learner` runs episodes, and draws the sentences that they see.
"""

from fastmask.meta.learner import Drawn, EpisodeSampler, MetaLearner, Task, TaskResult

__all__ = ["Drawn", "EpisodeSampler", "MetaLearner", "Task", "TaskResult"]
