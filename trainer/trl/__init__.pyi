from .selecting_trainer import Selecting as Selecting
from .selecting_trainer import SelectingGRPOTrainer as SelectingGRPOTrainer
from .settings import TrlSettings as TrlSettings
