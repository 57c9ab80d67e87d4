from . import agreement as agreement
from . import alignment as alignment
from . import clusters as clusters
from . import composition as composition
from . import conflict as conflict
from . import curricula as curricula
from . import drift as drift
from . import evaluation as evaluation
from . import explorer as explorer
from . import figures as figures
from . import layers as layers
from . import noise as noise
from . import plots as plots
from . import report as report
from . import staleness as staleness
from . import suspicion as suspicion
from . import trajectory as trajectory
from . import turning as turning

__version__: str
