from .local.run import RunReport as RunReport
from .local.run import train as train
from .local.settings import RunSettings as RunSettings
from .local.settings import Sampling as Sampling
from .local.settings import UpdateSettings as UpdateSettings
from .round.driver import Rounds as Rounds
from .round.settings import RoundSettings as RoundSettings
from .sampling.judge import JudgeSettings as JudgeSettings

__version__: str
