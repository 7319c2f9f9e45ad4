"""Learning rates set by statistics of the run itself, for any optax optimizer."""

from sasa_optax._adapt import AdaptOnProgressState, adapt_on_progress
from sasa_optax._average import AverageState, average_iterates, averaged_params
from sasa_optax._controller import ControllerState
from sasa_optax._history import Cut, Drop, History, Switch, metrics
from sasa_optax._line_search import LineSearchState
from sasa_optax._loss_gate import LossState
from sasa_optax._momentum import SasaState
from sasa_optax._progress import ProgressState, measure_progress
from sasa_optax._qhm import ScaleByQhmState, qhm, scale_by_qhm
from sasa_optax._salsa import salsa, scale_by_salsa, scale_by_ssls, ssls
from sasa_optax._sasa import (
    reduce_on_stationarity,
    sasa,
    sasa_plus,
    scale_by_sasa_plus,
)
from sasa_optax._slope import slope
from sasa_optax._stationarity import (
    EquivalenceTest,
    MeanEstimate,
    Samples,
    SlopeTest,
    StationarityTest,
    TestResult,
    ZeroMeanTest,
    estimate_mean,
)
from sasa_optax._statistics import (
    Sample,
    Statistic,
    Transition,
    centred_statistic,
    loss_statistic,
    master_statistic,
    yaida_statistic,
)
from sasa_optax._student_t import student_t_cdf, student_t_quantile
from sasa_optax._window import Window, resize_window

__version__ = "0.1.0"

__all__ = [
    "AdaptOnProgressState",
    "AverageState",
    "ControllerState",
    "Cut",
    "Drop",
    "EquivalenceTest",
    "History",
    "LineSearchState",
    "LossState",
    "MeanEstimate",
    "ProgressState",
    "Sample",
    "Samples",
    "SasaState",
    "ScaleByQhmState",
    "SlopeTest",
    "StationarityTest",
    "Statistic",
    "Switch",
    "TestResult",
    "Transition",
    "Window",
    "ZeroMeanTest",
    "adapt_on_progress",
    "average_iterates",
    "averaged_params",
    "centred_statistic",
    "estimate_mean",
    "loss_statistic",
    "master_statistic",
    "measure_progress",
    "metrics",
    "qhm",
    "reduce_on_stationarity",
    "resize_window",
    "salsa",
    "sasa",
    "sasa_plus",
    "scale_by_qhm",
    "scale_by_salsa",
    "scale_by_sasa_plus",
    "scale_by_ssls",
    "slope",
    "ssls",
    "student_t_cdf",
    "student_t_quantile",
    "yaida_statistic",
]
