from .local.grpo import UpdateSettings as UpdateSettings
from .local.policy import Sampling as Sampling
from .local.run import RunReport as RunReport
from .local.run import RunSettings as RunSettings
from .local.run import train as train
from .round.driver import Rounds as Rounds
from .round.settings import RoundSettings as RoundSettings
from .sampling.judge import JudgeSettings as JudgeSettings

__version__: str
