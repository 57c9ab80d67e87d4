"""Gradients to sketches, targets, search and selection, over a gradstore store.

Names are loaded when first used, so that searching a store does not wait for torch.
"""

from typing import TYPE_CHECKING

from gradstore.lazy import names_of

if TYPE_CHECKING:
    from gradstore.engine.gradients.directions import Direction as Direction
    from gradstore.engine.gradients.directions import validation_gradient as validation_gradient
    from gradstore.engine.gradients.exact import ExactBatch as ExactBatch
    from gradstore.engine.gradients.exact import LayerGradients as LayerGradients
    from gradstore.engine.gradients.exact import exact_dots as exact_dots
    from gradstore.engine.gradients.exact import layer_gradients as layer_gradients
    from gradstore.engine.gradients.logprobs import Reference as Reference
    from gradstore.engine.gradients.objectives import PRESETS as PRESETS
    from gradstore.engine.gradients.objectives import Objective as Objective
    from gradstore.engine.gradients.objectives import objective as objective
    from gradstore.engine.gradients.optimizer_direction import AdamState as AdamState
    from gradstore.engine.gradients.optimizer_direction import OptimizerDirection as OptimizerDirection
    from gradstore.engine.probing.batch import ProbeBatch as ProbeBatch
    from gradstore.engine.probing.probe import Probe as Probe
    from gradstore.engine.reliability.fidelity import Fidelity as Fidelity
    from gradstore.engine.reliability.fidelity import fidelity as fidelity
    from gradstore.engine.reliability.refit import Refit as Refit
    from gradstore.engine.reliability.refit import refit as refit
    from gradstore.engine.reliability.split_half import Reliability as Reliability
    from gradstore.engine.reliability.split_half import exact_scores as exact_scores
    from gradstore.engine.reliability.split_half import reliability as reliability
    from gradstore.engine.reliability.split_half import sketch_scores as sketch_scores
    from gradstore.engine.reliability.stored_halves import StoredHalves as StoredHalves
    from gradstore.engine.reliability.stored_halves import collect_halves as collect_halves
    from gradstore.engine.reliability.stored_halves import stored_halves as stored_halves
    from gradstore.engine.searching.fusion import FusedHits as FusedHits
    from gradstore.engine.searching.fusion import fuse_scores as fuse_scores
    from gradstore.engine.searching.fusion import search_each as search_each
    from gradstore.engine.searching.fusion import search_fused as search_fused
    from gradstore.engine.searching.indexes import Index as Index
    from gradstore.engine.searching.indexes import IndexWarning as IndexWarning
    from gradstore.engine.searching.indexes import index_for as index_for
    from gradstore.engine.searching.query import Hits as Hits
    from gradstore.engine.searching.query import search as search
    from gradstore.engine.searching.shares import layer_contributions as layer_contributions
    from gradstore.engine.searching.targets import Target as Target
    from gradstore.engine.searching.targets import target as target
    from gradstore.engine.searching.where import Where as Where
    from gradstore.engine.selecting.candidates import Candidates as Candidates
    from gradstore.engine.selecting.candidates import Scored as Scored
    from gradstore.engine.selecting.candidates import Selector as Selector
    from gradstore.engine.selecting.diversity import Diversity as Diversity
    from gradstore.engine.selecting.history import History as History
    from gradstore.engine.selecting.selection import Selection as Selection
    from gradstore.engine.selecting.selection import select as select
    from gradstore.engine.selecting.selectors import SELECTORS as SELECTORS
    from gradstore.engine.sketches.bases import add_basis as add_basis
    from gradstore.engine.sketches.bases import bases_in_use as bases_in_use
    from gradstore.engine.sketches.bases import create_store as create_store
    from gradstore.engine.sketches.bases import sketcher_of as sketcher_of
    from gradstore.engine.sketches.collector import CollectReport as CollectReport
    from gradstore.engine.sketches.collector import collect as collect
    from gradstore.engine.sketches.fitting import fit_projection as fit_projection
    from gradstore.engine.sketches.sketcher import Sketcher as Sketcher
    from gradstore.engine.sketches.spec import SketchBatch as SketchBatch
    from gradstore.engine.sketches.spec import SketchSpec as SketchSpec

_MODULE_OF = {
    "add_basis": "sketches.bases",
    "bases_in_use": "sketches.bases",
    "create_store": "sketches.bases",
    "sketcher_of": "sketches.bases",
    "AdamState": "gradients.optimizer_direction",
    "Candidates": "selecting.candidates",
    "CollectReport": "sketches.collector",
    "Direction": "gradients.directions",
    "ExactBatch": "gradients.exact",
    "Fidelity": "reliability.fidelity",
    "Index": "searching.indexes",
    "IndexWarning": "searching.indexes",
    "Diversity": "selecting.diversity",
    "FusedHits": "searching.fusion",
    "History": "selecting.history",
    "Hits": "searching.query",
    "LayerGradients": "gradients.exact",
    "Objective": "gradients.objectives",
    "Reference": "gradients.logprobs",
    "OptimizerDirection": "gradients.optimizer_direction",
    "PRESETS": "gradients.objectives",
    "Probe": "probing.probe",
    "ProbeBatch": "probing.batch",
    "Refit": "reliability.refit",
    "Reliability": "reliability.split_half",
    "StoredHalves": "reliability.stored_halves",
    "collect_halves": "reliability.stored_halves",
    "refit": "reliability.refit",
    "stored_halves": "reliability.stored_halves",
    "SELECTORS": "selecting.selectors",
    "Selection": "selecting.selection",
    "Scored": "selecting.candidates",
    "Selector": "selecting.candidates",
    "SketchBatch": "sketches.spec",
    "SketchSpec": "sketches.spec",
    "Sketcher": "sketches.sketcher",
    "Target": "searching.targets",
    "Where": "searching.where",
    "collect": "sketches.collector",
    "exact_dots": "gradients.exact",
    "exact_scores": "reliability.split_half",
    "fidelity": "reliability.fidelity",
    "fit_projection": "sketches.fitting",
    "index_for": "searching.indexes",
    "layer_contributions": "searching.shares",
    "layer_gradients": "gradients.exact",
    "objective": "gradients.objectives",
    "fuse_scores": "searching.fusion",
    "reliability": "reliability.split_half",
    "search": "searching.query",
    "search_each": "searching.fusion",
    "search_fused": "searching.fusion",
    "select": "selecting.selection",
    "sketch_scores": "reliability.split_half",
    "target": "searching.targets",
    "validation_gradient": "gradients.directions",
}

__all__ = sorted(_MODULE_OF)
__getattr__ = names_of(__name__, _MODULE_OF)
