from .entry import main as main
from .entry import task_runner as task_runner
